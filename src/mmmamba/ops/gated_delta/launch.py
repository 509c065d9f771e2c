"""The gated delta rule in Triton, forward and backward; the contract is :func:`mmmamba.ops.gated_delta`'s.

Tokens of all rows lie in one line; each sequence is cut into chunks of q tokens (an empty one has one chunk without
tokens). In a chunk with inclusive log decays a_i, strengths b_i, entering state S and leaving gradient D::

    X_i = v_i - exp(a_i) S k_i                                   what is to be written, less what is held
    U   = T (b X),  T = (I + L)^-1,  L_ij = b_i exp(a_i - a_j) (k_i.k_j) for j < i
    y_i = exp(a_i) S q_i + sum_{j<=i} P_ij u_j,                  P_ij = exp(a_i - a_j) (q_i.k_j)
    S'  = exp(a_q) S + sum_j exp(a_q - a_j) u_j k_j^T

    dU  = P^T dy + exp(a_q - a) (D' k),  dW = T^T dU,  dv = b dW,  dL = -dW U^T
    D   = exp(a_q) D' + sum_i exp(a_i) (dy_i q_i^T - b_i dW_i k_i^T)

T is the only thing that is solved for, and it is the same for all rows of the state, which are independent given k, q
and T: a program walks through a sequence's chunks with some rows of one head's state in registers, transposed, so that
no product needs a transposed operand. What needs no order is computed for all chunks at once.

A long sequence is cut into segments, so that enough programs walk at once. A segment turns the state S that enters it
into S M + R: R is what it makes of nothing, and M (n, n) what it makes of the rows of the identity without values. All
segments find theirs at once; one launch puts them together, segment after segment; then all walk at once. Backward the
gradient D that leaves a segment becomes D M^T + R', with the same M::

    forward (t tokens, c chunks, e bytes an input, f a stored one)   bytes
    0 prepare   decays and T, by chunk and head                      t (g n e + h (12 + q f))
    1 states    y chunk by chunk, the final states                   t (g (p+n) + h (p+n)) e + t h (8 + q f)
    backward
    1 states    the state that enters every chunk, and U             t g (p+n) e + t h (8 + q f + p f) + c h p n f
    2 leaving   the gradient that leaves it, and dW                t (g n + h (p+n)) e + t h (8 + q f + p f) + c h p n f
    3 gradients everything else                                      2 c h p n f + t (g+h) (p+2n) e + t h (20 + 2 p f)

Segments add a second walk with p + n rows to 1, and one to 2. The last launch takes a group's heads one after another
where it holds whole columns of the state; else it takes them apart, and a group's dv and dk are summed afterwards, as
dA's parts are. Nothing is added atomically: two runs give the same bits.

T is found by substitution, row after row of the 16-row blocks on its diagonal, which then give the blocks below. (The
product of (I - L)(I + L^2)(I + L^4)… has the same value, but where keys are alike its factors grow to 1e8 and more, and
nothing is left of it in float32.) The gradient of a step's log decay sums over just the pairs that the step lies
between, as in :mod:`mmmamba.ops.ssd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmamba.ops.chunk_kernels import ceil_div, dot_types, even_rows
from mmmamba.ops.dispatch import on_device, operator, why_not
from mmmamba.ops.gated_delta.backward_kernels import gradients_kernel, leaving_kernel
from mmmamba.ops.gated_delta.forward_kernels import join_kernel, prepare_kernel, states_kernel
from mmmamba.ops.gated_delta.shapes import check_shapes
from mmmamba.ops.gated_delta.tuning import ACCURATE, JOINED, JOINING, TUNED, Tuning, held_rows, segment_chunks
from mmmamba.ops.packing import layout_for


class _Call:
    """What the launches of one call share: sizes, tuning, the inputs with their strides.

    ``segment``: chunks of a segment; 0 where every sequence is walked through as a whole.
    """

    def __init__(
        self, v: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, beta: Tensor, table: Tensor | None,
        begins: Tensor | None, segment: int,
    ) -> None:  # fmt: skip
        self.v, self.dt, self.k, self.q, self.beta, self.A = *map(even_rows, (v, dt, k, q, beta)), A.contiguous()
        b, self.length, self.g, self.p = v.shape
        self.h, self.n = q.shape[2:]
        dot, precision, self.stored = dot_types(v, k, q)
        self.tuning = tuning = tuning_of(v, k, q)
        self.table, self.begins = table, begins
        self.chunks = b * max(ceil_div(self.length, tuning.chunk), 1) if table is None else table.shape[0]
        self.options = {"N": self.n, "CHUNK": tuning.chunk, "DOT": dot, "PRECISION": precision}
        self.rows = held_rows(tuning, self.p, self.n)
        self.segment = segment or 2**30
        of_row = max(ceil_div(self.chunks // max(b, 1), self.segment), 1)
        self.segments = b * of_row if begins is None else len(begins)
        slots = self.chunks // segment + 1 if segment else 0
        self.added = v.new_empty(slots, self.h, self.p, self.n, dtype=torch.float32)
        self.moves = v.new_empty(slots, self.h, self.n, self.n, dtype=torch.float32)

    @property
    def place(self) -> tuple[Tensor | None, int, int, int]:
        """Where chunks lie, and the heads: arguments of every launch."""
        return self.table, self.length, self.h, self.h // self.g

    def prepare(self) -> tuple[Tensor, Tensor]:
        """Decays (c, h, q) float32 and T (c, h, q, q) of every chunk, which the walks take."""
        size = self.tuning.chunk
        decays = self.v.new_empty(self.chunks, self.h, size, dtype=torch.float32)
        inverses = self.v.new_empty(self.chunks, self.h, size, size, dtype=self.stored)
        with on_device(self.v):
            prepare_kernel[(self.chunks * self.h,)](
                *_strided(self.k), *_strided(self.dt), *_strided(self.beta), self.A, decays, inverses, *self.place,
                ACCURATE=ACCURATE, num_warps=self.tuning.prepare, **self.options,
            )  # fmt: skip
        return decays, inverses

    def states(
        self, decays: Tensor, inverses: Tensor, *, initial: Tensor | None, y: Tensor | None = None,
        final: Tensor | None = None, kept: Tensor | None = None, writes: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The walks from the start, through all segments at once where sequences are cut into some."""
        initial = None if initial is None else initial.contiguous()
        shared = (
            *_strided(self.v), *_strided(self.k), *_strided(self.q), *_strided(self.beta), decays, inverses,
        )  # fmt: skip
        for local in self._turns():
            outputs = (None, initial, None, None, None) if local else (y, initial, final, kept, writes)
            with on_device(self.v):
                states_kernel[self._walks(self.p + self.n * local)](
                    *shared, *outputs, self.added, self.moves, self.table, self.begins, *self.place[1:], self.segment,
                    LOCAL=local,
                    **self._walking(),
                )  # fmt: skip
            if local:
                self._join(back=False)

    def leaving(
        self, decays: Tensor, inverses: Tensor, dy: Tensor, *, d_final: Tensor | None, d_initial: Tensor | None,
        kept: Tensor, d_wants: Tensor,
    ) -> None:  # fmt: skip
        """The walks from the end; after :meth:`states`, whose moves they take."""
        d_final = None if d_final is None else d_final.contiguous()
        for local in self._turns():
            with on_device(self.v):
                leaving_kernel[self._walks(self.p)](
                    *_strided(self.k), *_strided(self.q), *_strided(self.beta), decays, inverses, *_strided(dy),
                    d_final, d_initial, kept, d_wants, self.added, self.table, self.begins, *self.place[1:],
                    self.segment, LOCAL=local,
                    **self._walking(),
                )  # fmt: skip
            if local:
                self._join(back=True)

    def _turns(self) -> tuple[bool, ...]:
        return (True, False) if len(self.added) else (False,)

    def _walks(self, rows: int) -> tuple[int]:
        return (self.segments * self.h * (rows // self.rows),)

    def _walking(self) -> dict[str, Any]:
        tuning = self.tuning
        return {
            "P": self.p, "BLOCK": self.rows, "num_warps": tuning.walk, "num_stages": tuning.stages, **self.options
        }  # fmt: skip

    def _join(self, *, back: bool) -> None:
        with on_device(self.v):
            join_kernel[(self.segments * self.h * (self.p // JOINED),)](
                self.added, self.moves, self.table, self.begins, self.length, self.h, self.segment, ROWS=self.p,
                N=self.n, CHUNK=self.tuning.chunk, BLOCK=JOINED, BACK=back, num_warps=JOINING,
            )  # fmt: skip


def tuning_of(v: Tensor, k: Tensor, q: Tensor) -> Tuning:
    """How a call with these inputs runs."""
    return TUNED[int(max(v.shape[3], q.shape[3])), dot_types(v, k, q)[2].itemsize]


def _strided(t: Tensor) -> tuple[Tensor, int, int]:
    """A tensor (b, l, heads, …) as the kernels take it: with its strides from token to token and from head to head."""
    return t, t.stride(1), t.stride(2)


@operator("gated_delta")
def _delta(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    begins: Tensor | None,
    final_rows: int,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (b, l, h, p), the final states (final_rows, h, p, n), decays and T, which the backward pass takes.

    ``final_rows``: 0 when nobody wants the states.
    """
    y, final, _, _ = _delta_fake(v, dt, A, k, q, beta, initial_state, table, begins, final_rows, segment)
    call = _Call(v, dt, A, k, q, beta, table, begins, segment)
    decays, inverses = call.prepare()
    call.states(decays, inverses, initial=initial_state, y=y, final=final if final_rows else None)
    return y, final, decays, inverses


@_delta.register_fake
def _delta_fake(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    begins: Tensor | None,
    final_rows: int,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, length, h, n = q.shape
    size = tuning_of(v, k, q).chunk
    chunks = b * max(ceil_div(length, size), 1) if table is None else table.shape[0]
    return (
        v.new_empty(b, length, h, v.shape[3]),
        v.new_empty(final_rows, h, v.shape[3], n, dtype=torch.float32),
        v.new_empty(chunks, h, size, dtype=torch.float32),
        v.new_empty(chunks, h, size, size, dtype=dot_types(v, k, q)[2]),
    )


@operator("gated_delta_backward")
def _delta_backward(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    begins: Tensor | None,
    decays: Tensor,
    inverses: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of v, dt, A, k, q, beta and the initial state (0 rows when there is none)."""
    dv, ddt, _, dk, dq, d_beta, d_initial = _delta_backward_fake(
        v, dt, A, k, q, beta, initial_state, table, begins, decays, inverses, dy, d_final, segment
    )
    call = _Call(v, dt, A, k, q, beta, table, begins, segment)
    dy = even_rows(dy)
    kept = v.new_empty(2, call.chunks, call.h, call.n, call.p, dtype=call.stored)
    writes, d_wants = v.new_empty(2, *dy.shape, dtype=call.stored)
    dA = v.new_empty(call.chunks, call.h, dtype=torch.float32)
    call.states(decays, inverses, initial=initial_state, kept=kept[0], writes=writes)
    call.leaving(
        decays, inverses, dy, d_final=d_final, d_initial=None if initial_state is None else d_initial, kept=kept[1],
        d_wants=d_wants,
    )  # fmt: skip
    block, ratio = min(call.tuning.columns, call.p), call.h // call.g
    together = ratio if block == call.p else 1
    shared = together == ratio
    own_dv, own_dk = (t if shared else t.new_empty(*q.shape[:3], t.shape[3]) for t in (dv, dk))
    with on_device(v):
        gradients_kernel[(call.chunks * (call.h // together),)](
            *_strided(call.v), *_strided(call.k), *_strided(call.q), *_strided(call.dt), *_strided(call.beta), call.A,
            decays, *_strided(dy), kept, writes, d_wants, own_dv, own_dk, dq, ddt, d_beta, dA,
            call.table, call.length, call.chunks, call.h, ratio,
            P=call.p, BLOCK=block, TOGETHER=together, num_warps=call.tuning.gradients, num_stages=1, **call.options,
        )  # fmt: skip
    if not shared:
        dv, dk = (t.unflatten(2, (call.g, ratio)).sum(3) for t in (own_dv, own_dk))
    return dv, ddt, dA.sum(0), dk, dq, d_beta, d_initial


@_delta_backward.register_fake
def _delta_backward_fake(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    begins: Tensor | None,
    decays: Tensor,
    inverses: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
    segment: int,
) -> tuple[Tensor, ...]:
    inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v, dt, A, k, q, beta)]
    if initial_state is None:
        return *inputs, v.new_empty(0, dtype=torch.float32)
    return *inputs, torch.empty_like(initial_state, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.final_rows, ctx.segment = inputs
    _, _, decays, inverses = output
    ctx.mark_non_differentiable(decays, inverses)
    ctx.save_for_backward(*tensors, decays, inverses)


def _differentiate(
    ctx: Any, dy: Tensor | None, d_final: Tensor | None, _decays: None, _inverses: None
) -> tuple[Tensor | None, ...]:
    *inputs, initial_state, table, begins, decays, inverses = ctx.saved_tensors
    if dy is None:
        v, q = inputs[0], inputs[4]
        dy = v.new_zeros(*q.shape[:3], v.shape[3])
    *gradients, d_initial = _delta_backward(
        *inputs, initial_state, table, begins, decays, inverses, dy, d_final if ctx.final_rows else None, ctx.segment
    )
    return *gradients, None if initial_state is None else d_initial, None, None, None, None


_delta.register_autograd(_differentiate, setup_context=_save)


def gated_delta(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    segment: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences; arguments, shapes and results as in :func:`mmmamba.ops.gated_delta`.

    Args:
        segment: chunks of the parts of a sequence that are walked through at the same time; 0: no parts. As tuned when
            absent.

    Raises:
        ValueError: for shapes that do not fit together, or that :func:`~mmmamba.ops.dispatch.why_not` names.
    """
    layout = None if cu_seqlens is None else layout_for(v, cu_seqlens)
    rows = v.shape[0] if layout is None else layout.sequences
    check_shapes(v, dt, A, k, q, beta, initial_state, rows)
    reason = why_not(v, dt, A, k, q, beta, initial_state, head_dim=v.shape[3], state_dim=q.shape[3])
    if reason is not None:
        raise ValueError(f"gated_delta: {reason}")
    tuning = tuning_of(v, k, q)
    table = None if layout is None else layout.cuts(tuning.chunk)
    state = None if initial_state is None else initial_state.float()
    if segment is None:
        longest = v.shape[1] if layout is None else layout.longest
        walks = q.shape[2] * (v.shape[3] // held_rows(tuning, v.shape[3], q.shape[3]))
        segment = segment_chunks(v.shape[0] * v.shape[1], longest, walks, tuning.chunk)
    begins = None if layout is None else layout.begins(tuning.chunk, segment)
    y, final, _, _ = _delta(
        v, dt.float(), A.float(), k, q, beta.float(), state, table, begins, rows if return_final_state else 0, segment
    )
    return y, final if return_final_state else None
