"""The state space recurrence (SSD) in Triton, forward and backward; the contract is :func:`mmmamba.ops.ssd`'s.

The tokens of all rows lie one after another. Each sequence is cut into chunks of q tokens, and no chunk belongs to two
sequences (an empty sequence has one chunk without tokens). The chunks, in order, are divided into segments. For each
head one program walks through a segment with the state in registers: in the forward pass no chunk's state goes to
memory. With t tokens, c chunks, s segments (fixed by the number of heads), e bytes an element of x, B, C and y, and f
of a stored state (2 for bfloat16 inputs, else 4), each tensor counted once (re-reads by other heads and tiles of the
state hit the L2)::

    forward                                                            bytes
    0 decays   what the steps weigh, by chunk and head                 16 t h
    1 states   what each segment adds to the state, how it decays      t g (p+n) e + 4 t h + 4 s h p n
    2 output   the state entering each segment, then y chunk by chunk  t (g+h) (p+n) e + 12 t h + 4 s h p n
    backward
    0 decays   as above                                                16 t h
    1 states   as above, and for the states' gradients from the end    t (g+h) (p+n) e + 8 t h + 8 s h p n
    2 chunks   state entering, gradient leaving, of every chunk        as 1, and 2 c h p n f
    3 reads    dC, and the gradients of the steps                      2 c h p n f + t (g (p+n) + h (p+2n)) e + 12 t h
    4 writes   dx and dB, a group's heads summed                       c h p n f + t (2 g + h) (p+n) e + 8 t h

Launch 1 does nothing for a segment if a new sequence starts right after it. The sum of dA over chunks is one more
reduction, a tiny one. Nothing is added atomically: two runs give the same bits.

In a chunk with inclusive log decays a_i (float32, a_q at its end), entering state S and leaving gradient D::

    y_i = sum_{j<=i} exp(a_i - a_j) dt_j (C_i.B_j) x_j + exp(a_i) S C_i
    S'  = exp(a_q) S + sum_j exp(a_q - a_j) dt_j x_j B_j^T          D' = exp(a_q) D + sum_i exp(a_i) dy_i C_i^T

Decays are kept as powers of two, with the steps folded into them where that saves a product; the result of an
exponential is never above a step's size. The gradient of a step's log decay sums over just the pairs (earlier token,
later token) that the step lies between: nothing cancels, no matter how strong the decay is.

bfloat16 products use the tensor cores with float32 sums. float16 inputs are multiplied in TF32, which holds them
exactly and does not overflow for large states; float32 ones in three TF32 products. Their tiles have 32 rows, too few
for Hopper's asynchronous products: those have given wrong last digits, another time an illegal access, in three-part
TF32 with Triton 3.6.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mmmamba.ops.chunk_kernels import ceil_div, dot_types, even_rows
from mmmamba.ops.dispatch import on_device, operator, why_not
from mmmamba.ops.packing import layout_for
from mmmamba.ops.ssd.backward_kernels import reads_kernel, writes_kernel
from mmmamba.ops.ssd.forward_kernels import decays_kernel, scan_kernel
from mmmamba.ops.ssd.shapes import check_shapes
from mmmamba.ops.ssd.tuning import TUNED, Tiles, Tuning


class _Shape:
    """The sizes that the launches of one call share."""

    def __init__(self, x: Tensor, C: Tensor, table: Tensor | None, chunk: int, segments: int) -> None:
        self.b, self.length, self.g, self.p = x.shape
        self.h, self.n = C.shape[2:]
        self.chunks = self.b * max(ceil_div(self.length, chunk), 1) if table is None else table.shape[0]
        self.per_segment = max(ceil_div(self.chunks, segments), 1)
        self.segments = ceil_div(self.chunks, self.per_segment)

    def tiles(self, tiles: Tiles) -> tuple[int, int]:
        return min(tiles.p, self.p), min(tiles.n, self.n)


def _tuning(x: Tensor, B: Tensor, C: Tensor) -> Tuning:
    return TUNED[max(x.shape[3], C.shape[3]), dot_types(x, B, C)[2].itemsize]


def _decays(
    shape: _Shape, dt: Tensor, A: Tensor, table: Tensor | None, chunk: int, *, backward: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What all launches read of each chunk's steps, (c, h, q) float32: decays, steps, sources and writes."""
    decays, other, writes = dt.new_empty(3, shape.chunks, shape.h, chunk).unbind()
    steps, sources = (other, None) if backward else (None, other)
    block = min(1 << (shape.h - 1).bit_length(), 16)
    with on_device(dt):
        decays_kernel[(shape.chunks, ceil_div(shape.h, block))](
            dt, dt.stride(1), dt.stride(2), A, decays, steps, sources, writes, table, shape.length, shape.h,
            CHUNK=chunk, HEADS=block,
        )  # fmt: skip
    return decays, steps, sources, writes


def _scan(
    shape: _Shape,
    tiles: Tiles,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor],
    table: Tensor | None,
    chunk: int,
    *,
    initial: Tensor | None,
    local: Tensor | None,
    decay: Tensor | None,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    final: Tensor | None = None,
    d_final: Tensor | None = None,
    d_initial: Tensor | None = None,
    kept: Tensor | None = None,
    only_local: bool = False,
) -> None:
    """One launch of the scan over ``inputs`` (x, B, C, decays, sources, writes)."""
    x, B, C, decays, sources, writes = inputs
    block_p, block_n = shape.tiles(tiles)
    dot, precision, _ = dot_types(x, B, C)
    grid = (shape.h * (shape.p // block_p) * (shape.n // block_n), shape.segments, 1 if dy is None else 2)
    with on_device(x):
        scan_kernel[grid](
            x, x.stride(1), x.stride(2), B, B.stride(1), B.stride(2), C, C.stride(1), C.stride(2),
            decays, sources, writes, dy, *((0, 0) if dy is None else (dy.stride(1), dy.stride(2))),
            y, initial, final, d_final, d_initial, local, decay, kept,
            table, shape.length, shape.chunks, shape.per_segment, shape.segments, shape.h, shape.h // shape.g,
            P=shape.p, N=shape.n, CHUNK=chunk, BLOCK_P=block_p, BLOCK_N=block_n, DOT=dot, PRECISION=precision,
            LOCAL=only_local, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


@operator("ssd")
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    final_rows: int,
    chunk: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) and the final states (final_rows, h, p, n); ``final_rows`` 0 when nobody wants them."""
    y, final = _ssd_fake(x, dt, A, B, C, initial_state, table, final_rows, chunk, segments)
    x, dt, B, C, A = even_rows(x), even_rows(dt), even_rows(B), even_rows(C), A.contiguous()
    shape, tuning = _Shape(x, C, table, chunk, segments), _tuning(x, B, C)
    initial = None if initial_state is None else initial_state.contiguous()
    local = x.new_empty(shape.segments, shape.h, shape.p, shape.n, dtype=torch.float32)
    decay = x.new_empty(shape.segments, shape.h, dtype=torch.float32)
    decays, _, sources, writes = _decays(shape, dt, A, table, chunk, backward=False)
    inputs = (x, B, C, decays, sources, writes)
    if shape.segments > 1:
        _scan(
            shape, tuning.states, inputs, table, chunk, initial=initial, local=local, decay=decay, only_local=True
        )  # fmt: skip
    _scan(
        shape, tuning.output._replace(n=shape.n), inputs, table, chunk,
        initial=initial, local=local, decay=decay, y=y, final=final if final_rows else None,
    )  # fmt: skip
    return y, final


@_ssd.register_fake
def _ssd_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    final_rows: int,
    chunk: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    h, n = C.shape[2:]
    y = x.new_empty(x.shape[0], x.shape[1], h, x.shape[3])
    return y, x.new_empty(final_rows, h, x.shape[3], n, dtype=torch.float32)


@operator("ssd_backward")
def _ssd_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    dy: Tensor,
    d_final: Tensor | None,
    chunk: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C and the initial state (0 rows when there is none)."""
    dx, ddt, _, dB, dC, d_initial = _ssd_backward_fake(
        x, dt, A, B, C, initial_state, table, dy, d_final, chunk, segments
    )
    x, dt, B, C, dy, A = even_rows(x), even_rows(dt), even_rows(B), even_rows(C), even_rows(dy), A.contiguous()
    shape, tuning = _Shape(x, C, table, chunk, segments), _tuning(x, B, C)
    dot, precision, stored = dot_types(x, B, C)
    size = (shape.h, shape.p, shape.n)
    local = x.new_empty(2, shape.segments, *size, dtype=torch.float32)
    decay = x.new_empty(2, shape.segments, shape.h, dtype=torch.float32)
    kept = x.new_empty(2, shape.chunks, *size, dtype=stored)
    dA = x.new_empty(shape.chunks, shape.h, dtype=torch.float32)
    decays, steps, _, writes = _decays(shape, dt, A, table, chunk, backward=True)
    inputs = (x, B, C, decays, None, writes)
    initial = None if initial_state is None else initial_state.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    scan = functools.partial(
        _scan, shape, tuning.states, inputs, table, chunk,
        dy=dy, initial=initial, d_final=d_final, local=local, decay=decay,
    )  # fmt: skip
    if shape.segments > 1:
        scan(only_local=True)
    scan(kept=kept, d_initial=None if initial is None else d_initial)
    sources = (
        x, x.stride(1), x.stride(2), B, B.stride(1), B.stride(2), C, C.stride(1), C.stride(2), steps, decays,
    )  # fmt: skip
    seed = (dy, dy.stride(1), dy.stride(2))
    options = {"P": shape.p, "N": shape.n, "CHUNK": chunk, "DOT": dot, "PRECISION": precision}
    ratio = shape.h // shape.g
    with on_device(x):
        reads_kernel[(shape.chunks * shape.h,)](
            *sources, A, *seed, kept, ddt, dA, dC, table, shape.length, shape.chunks, shape.h, ratio,
            BLOCK_N=shape.tiles(tuning.reads)[1],
            num_warps=tuning.reads.warps, num_stages=tuning.reads.stages, **options,
        )  # fmt: skip
        writes_kernel[(shape.chunks * shape.g * 2,)](
            *sources, *seed, kept, dx, dB, table, shape.length, shape.chunks, shape.h, shape.g, ratio,
            num_warps=tuning.writes.warps, num_stages=tuning.writes.stages, **options,
        )  # fmt: skip
    return dx, ddt, dA.sum(0), dB, dC, d_initial


@_ssd_backward.register_fake
def _ssd_backward_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    table: Tensor | None,
    dy: Tensor,
    d_final: Tensor | None,
    chunk: int,
    segments: int,
) -> tuple[Tensor, ...]:
    inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)]
    if initial_state is None:
        return *inputs, x.new_empty(0, dtype=torch.float32)
    return *inputs, torch.empty_like(initial_state, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, dt, A, B, C, initial_state, table, ctx.final_rows, ctx.chunk, ctx.segments = inputs
    ctx.save_for_backward(x, dt, A, B, C, initial_state, table)


def _differentiate(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, initial_state, table = ctx.saved_tensors
    if dy is None:
        dy = C.new_zeros(*C.shape[:3], x.shape[3], dtype=x.dtype)
    *gradients, d_initial = _ssd_backward(
        x, dt, A, B, C, initial_state, table, dy, d_final if ctx.final_rows else None, ctx.chunk, ctx.segments
    )
    return *gradients, None if initial_state is None else d_initial, None, None, None, None


_ssd.register_autograd(_differentiate, setup_context=_save)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences; arguments, shapes and results as in :func:`mmmamba.ops.ssd`.

    Args:
        chunk: tokens a chunk, a power of two from 16; segments: parts of the row that are walked through at the same
            time. Both as tuned when absent.

    Raises:
        ValueError: for shapes that do not fit together, or that :func:`~mmmamba.ops.dispatch.why_not` names.
    """
    layout = None if cu_seqlens is None else layout_for(x, cu_seqlens)
    rows = x.shape[0] if layout is None else layout.sequences
    check_shapes(x, dt, A, B, C, initial_state, rows)
    reason = why_not(x, dt, A, B, C, initial_state, head_dim=x.shape[3], state_dim=C.shape[3])
    if reason is not None:
        raise ValueError(f"ssd: {reason}")
    tuning = _tuning(x, B, C)
    chunk = chunk or tuning.chunk
    segments = segments or max(tuning.programs // (C.shape[2] * ceil_div(x.shape[3], tuning.output.p)), 1)
    table = None if layout is None else layout.cuts(chunk)
    state = None if initial_state is None else initial_state.float()
    y, final = _ssd(
        x, dt.float(), A.float(), B, C, state, table, rows if return_final_state else 0, chunk, segments
    )  # fmt: skip
    return y, final if return_final_state else None
