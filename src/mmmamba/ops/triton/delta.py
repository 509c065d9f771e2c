"""The gated delta rule in Triton, forward and backward; the contract is :func:`mmmamba.ops.delta.gated_delta`'s.

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
no product needs an operand turned round. Whatever needs no order is worked out by all chunks at once.

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
between, as in :mod:`mmmamba.ops.triton.ssd`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.delta import check
from mmmamba.ops.layout import layout_for
from mmmamba.ops.triton import on_device, operator, why_not
from mmmamba.ops.triton.ssd import LOG2_E, _dot, _locate, _parts, _rows, _rows_of

ACCURATE = "tf32x3"  # how T's blocks are multiplied
JOINED = 32  # rows of a state that a program joins
PROGRAMS = 256  # walks that fill the machine
LEAST = 1024  # tokens of a segment
JOINING = 8  # warps of a program that joins segments


class Tuning(NamedTuple):
    """Tokens of a chunk, rows of a state that a walk holds, and how each launch runs.

    Warps of each launch's programs, stages of the loads' pipeline of those that walk, and how many rows of a state the
    launch of the gradients holds at once.
    """

    chunk: int
    rows: int
    prepare: int
    walk: int
    stages: int
    gradients: int
    columns: int


# By the larger of p and n, for 2-byte and for 4-byte products. The latter stay too small for Hopper's asynchronous
# products, which have given wrong digits in three-part TF32.
TUNED = {
    (32, 2): Tuning(32, 32, 1, 1, 3, 2, 32),
    (64, 2): Tuning(32, 64, 1, 4, 3, 2, 32),
    (128, 2): Tuning(64, 64, 1, 4, 2, 8, 64),
    (32, 4): Tuning(32, 32, 1, 2, 1, 4, 32),
    (64, 4): Tuning(32, 32, 1, 2, 1, 4, 64),
    (128, 4): Tuning(32, 32, 2, 2, 1, 8, 64),
}


@triton.jit
def _substitute(gram, strength, decay, SIZE: tl.constexpr):
    """(I + L)^-1 of a diagonal block from its k_i.k_j, by forward substitution."""
    at = tl.arange(0, SIZE)
    # L transposed (the k_i.k_j are symmetric), so that a row of it comes as a column, which scales rows.
    lower = gram * tl.exp2(tl.where(at[:, None] < at[None, :], decay[None, :] - decay[:, None], float("-inf")))
    lower *= strength[None, :]
    inverse = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    for i in range(1, SIZE):
        row = tl.sum(tl.where(at[None, :] == i, lower, 0.0), 1)
        known = tl.sum(row[:, None] * inverse, 0)
        inverse -= tl.where(at[:, None] == i, known[None, :], 0.0)
    return inverse


@triton.jit
def _times(a, b, ACCURATE: tl.constexpr):
    return tl.dot(a, b, input_precision=ACCURATE)


@triton.jit
def _block(k, k_token, dt, dt_token, beta, beta_token, token, left, rate, before, at_n, FROM: tl.constexpr,
           SIZE: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Rows FROM … of a chunk: their keys, strengths and inclusive log2 decays, ``before`` being the decay so far."""
    at = FROM + tl.arange(0, SIZE)
    inside = at < left
    change = tl.load(dt + at * dt_token, mask=inside, other=0.0) * rate
    strength = tl.load(beta + at * beta_token, mask=inside, other=0.0)
    ks = _rows_of(k, token, k_token, at, at_n, inside).to(DOT)
    return ks, strength, tl.cumsum(change, 0) + before, before + tl.sum(change, 0)


@triton.jit
def _below(ks, strength, decay, earlier, earlier_decay, PRECISION: tl.constexpr):
    """The block of L between rows and columns of two blocks."""
    gram = tl.dot(ks, tl.trans(earlier), input_precision=PRECISION)
    return gram * tl.exp2(decay[:, None] - earlier_decay[None, :]) * strength[:, None]


@triton.jit(do_not_specialize=["length"])
def _prepare_kernel(
    k, k_token, k_head, dt, dt_token, dt_head, beta, beta_token, beta_head, A, decays, inverses, table, length, heads,
    ratio,
    N: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × head): inclusive log2 decays (c, h, q), flat after the end, and T (c, h, q, q)."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    _row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    if stop == start:
        return
    SIZE: tl.constexpr = 16
    at, at_n = tl.arange(0, SIZE), tl.arange(0, N)
    token = start + (chunk - first) * CHUNK
    left = tl.minimum(stop - token, CHUNK).to(tl.int32)
    rate = tl.load(A + head) * LOG2_E
    dt += token * dt_token + head * dt_head
    beta += token * beta_token + head * beta_head
    k += (head // ratio) * k_head
    here = chunk.to(tl.int64) * heads + head
    decays += here * CHUNK
    inverses += here * CHUNK * CHUNK
    corner = at[:, None] * CHUNK + at[None, :]
    nothing = tl.zeros([SIZE, SIZE], tl.float32)

    k0, b0, a0, so_far = _block(k, k_token, dt, dt_token, beta, beta_token, token, left, rate, 0.0, at_n, 0, SIZE, DOT)
    k1, b1, a1, so_far = _block(
        k, k_token, dt, dt_token, beta, beta_token, token, left, rate, so_far, at_n, 16, SIZE, DOT
    )  # fmt: skip
    tl.store(decays + at, a0)
    tl.store(decays + 16 + at, a1)
    t00 = _substitute(tl.dot(k0, tl.trans(k0), input_precision=PRECISION), b0, a0, SIZE)
    t11 = _substitute(tl.dot(k1, tl.trans(k1), input_precision=PRECISION), b1, a1, SIZE)
    t10 = -_times(t11, _times(_below(k1, b1, a1, k0, a0, PRECISION), t00, ACCURATE), ACCURATE)
    tl.store(inverses + corner, t00)
    tl.store(inverses + corner + 16, nothing)
    tl.store(inverses + corner + 16 * CHUNK, t10)
    tl.store(inverses + corner + 16 * CHUNK + 16, t11)
    if CHUNK == 64:
        k2, b2, a2, so_far = _block(
            k, k_token, dt, dt_token, beta, beta_token, token, left, rate, so_far, at_n, 32, SIZE, DOT
        )  # fmt: skip
        k3, b3, a3, so_far = _block(
            k, k_token, dt, dt_token, beta, beta_token, token, left, rate, so_far, at_n, 48, SIZE, DOT
        )  # fmt: skip
        tl.store(decays + 32 + at, a2)
        tl.store(decays + 48 + at, a3)
        t22 = _substitute(tl.dot(k2, tl.trans(k2), input_precision=PRECISION), b2, a2, SIZE)
        t33 = _substitute(tl.dot(k3, tl.trans(k3), input_precision=PRECISION), b3, a3, SIZE)
        t32 = -_times(t33, _times(_below(k3, b3, a3, k2, a2, PRECISION), t22, ACCURATE), ACCURATE)
        # Both halves are done: what lies below is -T_lower L T_upper, in blocks.
        l20, l21 = _below(k2, b2, a2, k0, a0, PRECISION), _below(k2, b2, a2, k1, a1, PRECISION)
        l30, l31 = _below(k3, b3, a3, k0, a0, PRECISION), _below(k3, b3, a3, k1, a1, PRECISION)
        y20 = _times(l20, t00, ACCURATE) + _times(l21, t10, ACCURATE)
        y30 = _times(l30, t00, ACCURATE) + _times(l31, t10, ACCURATE)
        y21, y31 = _times(l21, t11, ACCURATE), _times(l31, t11, ACCURATE)
        inverses += corner
        tl.store(inverses + 32, nothing)
        tl.store(inverses + 48, nothing)
        tl.store(inverses + 16 * CHUNK + 32, nothing)
        tl.store(inverses + 16 * CHUNK + 48, nothing)
        tl.store(inverses + 32 * CHUNK + 48, nothing)
        tl.store(inverses + 32 * CHUNK, -_times(t22, y20, ACCURATE))
        tl.store(inverses + 32 * CHUNK + 16, -_times(t22, y21, ACCURATE))
        tl.store(inverses + 32 * CHUNK + 32, t22)
        tl.store(inverses + 48 * CHUNK, -_times(t32, y20, ACCURATE) - _times(t33, y30, ACCURATE))
        tl.store(inverses + 48 * CHUNK + 16, -_times(t32, y21, ACCURATE) - _times(t33, y31, ACCURATE))
        tl.store(inverses + 48 * CHUNK + 32, t32)
        tl.store(inverses + 48 * CHUNK + 48, t33)


@triton.jit
def _segment(table, begins, program, length, per, CHUNK: tl.constexpr):
    """Of the program's segment: its first chunk, or -1 if it has none, and which chunk of the sequence that is.

    And of the sequence: its row, its first token, the token after it, and how many chunks it has.
    """
    if table is None:
        several = tl.maximum(tl.cdiv(tl.maximum(tl.cdiv(length, CHUNK), 1), per), 1)  # segments of a row
        chunk = program // several * tl.maximum(tl.cdiv(length, CHUNK), 1) + program % several * per
    else:
        chunk = tl.load(begins + program)
    row, first, _last, start, stop = _locate(table, tl.maximum(chunk, 0), length, CHUNK)
    return chunk, chunk - first, row, start, stop, tl.cdiv(stop - start, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["length", "per"])
def _states_kernel(
    v, v_token, v_head, k, k_token, k_head, q, q_token, q_head, beta, beta_token, beta_head, decays, inverses,
    y, initial, final, kept, writes, added, moves, table, begins, length, heads, ratio, per,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Programs (segment × head × rows of the state): walk through a segment's chunks.

    What the state was before each chunk goes to ``kept``, transposed, and what is written (u) to ``writes``; what is
    read to ``y``, what the state is at the end to ``final``; each unless None. Sequences begin with ``initial`` (zeros
    if None).

    LOCAL: for the segments that others of their sequence follow, what the state becomes of nothing goes to ``added``,
    and what it becomes of each unit row to ``moves``, which more programs work out. Without LOCAL ``added`` holds the
    states that leave the segments (:func:`_join_kernel`).
    """
    tiles: tl.constexpr = (P + N if LOCAL else P) // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk, index, row, start, stop, whole_count = _segment(
        table, begins, tl.program_id(0) // tiles // heads, length, per, CHUNK
    )  # fmt: skip
    if chunk < 0:
        return
    unit = tile >= P // BLOCK
    if LOCAL:
        if (index + per >= whole_count) | (unit & (index == 0)):
            return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    at_p = tl.where(unit, tile - P // BLOCK, tile) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = inside[:, None], inside[None, :]
    at = at_p[None, :] * N + at_n[:, None]  # the state lies transposed, (n, p): no product needs it otherwise
    edge = (row.to(tl.int64) * heads + head) * P * N + at
    v += (head // ratio) * v_head
    k += (head // ratio) * k_head
    q += head * q_head
    beta += head * beta_head
    state = tl.zeros([N, BLOCK], tl.float32)
    if index == 0:
        if initial is not None:
            state = tl.load(initial + edge)
    elif LOCAL:
        state = tl.where(unit & (at_p[None, :] == at_n[:, None]), 1.0, 0.0)
    else:
        here = ((chunk - per) // per).to(tl.int64) * heads + head
        state = tl.load(added + here * P * N + at)
    for step in range(0, tl.minimum(per, whole_count - index)):
        token = start + (index + step) * CHUNK
        valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
        here = (chunk + step).to(tl.int64) * heads + head
        ks = _rows_of(k, token, k_token, inside, at_n, valid).to(DOT)
        vs = _rows_of(v, token, v_token, inside, at_p, valid & (not unit)).to(tl.float32)
        strength = tl.load(beta + token * beta_token + inside * beta_token, mask=valid, other=0.0)
        decay = tl.load(decays + here * CHUNK + inside)
        whole = tl.load(decays + here * CHUNK + CHUNK - 1)
        inverse = tl.load(inverses + here * CHUNK * CHUNK + rows * CHUNK + columns).to(DOT)
        if kept is not None:
            tl.store(kept + here * P * N + (at_n[:, None] * P + at_p[None, :]), state)
        entered = state.to(DOT)
        held = tl.dot(ks, entered, input_precision=PRECISION) * tl.exp2(decay)[:, None]
        wanted = (vs - held) * strength[:, None]
        written = tl.dot(inverse, wanted.to(DOT), input_precision=PRECISION)
        place = token * heads * P + head * P + (rows * (heads * P) + at_p[None, :])
        if writes is not None:
            tl.store(writes + place, written, mask=valid[:, None])
        if y is not None:
            qs = _rows_of(q, token, q_token, inside, at_n, valid).to(DOT)
            scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
            scores *= tl.exp2(tl.where(rows >= columns, decay[:, None] - decay[None, :], float("-inf")))
            out = tl.dot(qs, entered, input_precision=PRECISION) * tl.exp2(decay)[:, None]
            out = tl.dot(scores.to(DOT), written.to(DOT), out, input_precision=PRECISION)
            tl.store(y + place, out, mask=valid[:, None])
        leaving = (written * tl.exp2(whole - decay)[:, None]).to(DOT)
        state = tl.dot(tl.trans(ks), leaving, state * tl.exp2(whole), input_precision=PRECISION)
    if LOCAL:
        here = (chunk // per).to(tl.int64) * heads + head
        if unit:
            tl.store(moves + here * N * N + at, state)
        else:
            tl.store(added + here * P * N + at, state)
    elif final is not None:
        if index + per >= whole_count:
            tl.store(final + edge, state)


@triton.jit(do_not_specialize=["length", "per"])
def _leaving_kernel(
    k, k_token, k_head, q, q_token, q_head, beta, beta_token, beta_head, decays, inverses, dy, dy_token, dy_head,
    d_final, d_initial, kept, d_wants, added, table, begins, length, heads, ratio, per,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """As :func:`_states_kernel`, from the end: the gradient of the state after each chunk to ``kept``, and dW.

    LOCAL: for the segments that follow others of their sequence, what the gradient becomes of nothing to ``added``.
    """
    tiles: tl.constexpr = P // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk, index, row, start, stop, whole_count = _segment(
        table, begins, tl.program_id(0) // tiles // heads, length, per, CHUNK
    )  # fmt: skip
    if chunk < 0:
        return
    if LOCAL:
        if index == 0:
            return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    at_p = tile * BLOCK + tl.arange(0, BLOCK)
    rows, columns = inside[:, None], inside[None, :]
    at = at_p[None, :] * N + at_n[:, None]
    edge = (row.to(tl.int64) * heads + head) * P * N + at
    k += (head // ratio) * k_head
    q += head * q_head
    beta += head * beta_head
    dy += head * dy_head
    gradient = tl.zeros([N, BLOCK], tl.float32)
    if index + per >= whole_count:  # no segment of the sequence follows
        if d_final is not None:
            gradient = tl.load(d_final + edge)
    elif not LOCAL:
        here = ((chunk + per) // per).to(tl.int64) * heads + head
        gradient = tl.load(added + here * P * N + at)
    count = tl.minimum(per, whole_count - index)
    for back in range(0, count):
        step = count - 1 - back
        token = start + (index + step) * CHUNK
        valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
        here = (chunk + step).to(tl.int64) * heads + head
        ks = _rows_of(k, token, k_token, inside, at_n, valid).to(DOT)
        qs = _rows_of(q, token, q_token, inside, at_n, valid).to(DOT)
        dys = _rows_of(dy, token, dy_token, inside, at_p, valid)
        strength = tl.load(beta + token * beta_token + inside * beta_token, mask=valid, other=0.0)
        decay = tl.load(decays + here * CHUNK + inside)
        whole = tl.load(decays + here * CHUNK + CHUNK - 1)
        transposed = tl.load(inverses + here * CHUNK * CHUNK + columns * CHUNK + rows).to(DOT)
        if not LOCAL:
            tl.store(kept + here * P * N + (at_n[:, None] * P + at_p[None, :]), gradient)
        scores = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)  # (j, i)
        scores *= tl.exp2(tl.where(rows <= columns, decay[None, :] - decay[:, None], float("-inf")))
        d_written = tl.dot(ks, gradient.to(DOT), input_precision=PRECISION) * tl.exp2(whole - decay)[:, None]
        d_written = tl.dot(scores.to(DOT), dys.to(DOT), d_written, input_precision=PRECISION)
        d_wanted = tl.dot(transposed, d_written.to(DOT), input_precision=PRECISION)
        if not LOCAL:
            place = token * heads * P + head * P + (rows * (heads * P) + at_p[None, :])
            tl.store(d_wants + place, d_wanted, mask=valid[:, None])
        fade = tl.exp2(decay)[:, None]
        read = (dys.to(tl.float32) * fade).to(DOT)
        taken = (d_wanted * -(fade * strength[:, None])).to(DOT)
        gradient = tl.dot(tl.trans(qs), read, gradient * tl.exp2(whole), input_precision=PRECISION)
        gradient = tl.dot(tl.trans(ks), taken, gradient, input_precision=PRECISION)
    if LOCAL:
        here = (chunk // per).to(tl.int64) * heads + head
        tl.store(added + here * P * N + at, gradient)
    elif d_initial is not None:
        if index == 0:
            tl.store(d_initial + edge, gradient)


@triton.jit(do_not_specialize=["length", "per"])
def _join_kernel(
    added, moves, table, begins, length, heads, per,
    ROWS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Programs as those of the walks: turn what segments make of nothing into what leaves them, one after another.

    In place in ``added``: R_i + X_{i-1} M_i for the states of a sequence's segments but its last; BACK, from the end,
    R_i + X_{i+1} M_i^T for the gradients of all but its first.
    """
    tiles: tl.constexpr = ROWS // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk, index, _row, _start, _stop, whole_count = _segment(
        table, begins, tl.program_id(0) // tiles // heads, length, per, CHUNK
    )  # fmt: skip
    segments = tl.cdiv(whole_count, per)
    if (chunk < 0) | (index != 0) | (segments < 3):
        return
    at_n = tl.arange(0, N)
    at = (tile * BLOCK + tl.arange(0, BLOCK))[:, None] * N + at_n[None, :]
    here = ((chunk + (segments - 1) * per if BACK else chunk) // per).to(tl.int64) * heads + head
    value = tl.load(added + here * ROWS * N + at)
    for i in range(1, segments - 1):
        here = ((chunk + (segments - 1 - i if BACK else i) * per) // per).to(tl.int64) * heads + head
        move = moves + here * N * N
        if BACK:
            move = tl.load(move + at_n[None, :] * N + at_n[:, None])
        else:
            move = tl.load(move + at_n[:, None] * N + at_n[None, :])
        value = tl.dot(value, move, tl.load(added + here * ROWS * N + at), input_precision="tf32x3")
        tl.store(added + here * ROWS * N + at, value)


@triton.jit(do_not_specialize=["length", "chunks"])
def _gradients_kernel(
    v, v_token, v_head, k, k_token, k_head, q, q_token, q_head, dt, dt_token, dt_head, beta, beta_token, beta_head, A,
    decays, dy, dy_token, dy_head, kept, writes, d_wants, dv, dk, dq, ddt, d_beta, dA, table, length, chunks, heads,
    ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × heads): all gradients of a chunk's tokens, from what the walks have kept.

    Where a program holds whole columns of the state (BLOCK is P), it takes the heads of a group one after another
    (TOGETHER), so that what they share is read and written once; else a head, whose dv and dk are its own.
    """
    owners = heads // TOGETHER
    owner, chunk = tl.program_id(0) % owners, tl.program_id(0) // owners
    _row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    if stop == start:
        for i in range(TOGETHER):
            tl.store(dA + chunk.to(tl.int64) * heads + owner * TOGETHER + i, 0.0)
        return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    rows, columns = inside[:, None], inside[None, :]
    token = start + (chunk - first) * CHUNK
    valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
    group = owner * TOGETHER // ratio
    ks = _rows_of(k + group * k_head, token, k_token, inside, at_n, valid).to(DOT)
    v += group * v_head
    dv += token * owners * P + owner * P
    dks = tl.zeros([CHUNK, N], tl.float32)
    dvs = tl.zeros([CHUNK, BLOCK], tl.float32)
    for i in range(TOGETHER):
        head = owner * TOGETHER + i
        here = chunk.to(tl.int64) * heads + head
        strength = tl.load(beta + head * beta_head + token * beta_token + inside * beta_token, mask=valid, other=0.0)
        decay = tl.load(decays + here * CHUNK + inside)
        whole = tl.load(decays + here * CHUNK + CHUNK - 1)
        fade, to_end = tl.exp2(decay), tl.exp2(whole - decay)

        d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        d_gram = tl.zeros([CHUNK, CHUNK], tl.float32)
        dqs = tl.zeros([CHUNK, N], tl.float32)
        taken = tl.zeros([CHUNK, N], tl.float32)
        added = tl.zeros([CHUNK, N], tl.float32)
        d_strength = tl.zeros([CHUNK], tl.float32)
        through = tl.zeros([BLOCK], tl.float32)
        for part in range(0, P, BLOCK):
            at_p = part + tl.arange(0, BLOCK)
            at = at_n[:, None] * P + at_p[None, :]  # (n, p)
            place = token * heads * P + head * P + (rows * (heads * P) + at_p[None, :])
            written = tl.load(writes + place, mask=valid[:, None], other=0.0).to(DOT)
            d_wanted = tl.load(d_wants + place, mask=valid[:, None], other=0.0).to(DOT)
            dys = _rows_of(dy + head * dy_head, token, dy_token, inside, at_p, valid)
            vs = _rows_of(v, token, v_token, inside, at_p, valid)
            d_scores = tl.dot(dys.to(DOT), tl.trans(written), d_scores, input_precision=PRECISION)
            d_gram = tl.dot(d_wanted, tl.trans(written), d_gram, input_precision=PRECISION)
            wide = d_wanted.to(tl.float32)
            d_strength += tl.sum(wide * vs.to(tl.float32), 1)
            if BLOCK == P:
                dvs += wide * strength[:, None]
            else:
                d_value = wide * strength[:, None]
                tl.store(dv + (rows * (owners * P) + at_p[None, :]), d_value, mask=valid[:, None])
            leaving = tl.load(kept + (chunks.to(tl.int64) * heads + here) * P * N + at).to(DOT)
            added = tl.dot(written, tl.trans(leaving), added, input_precision=PRECISION)
            state = tl.load(kept + here * P * N + at).to(DOT)
            dqs = tl.dot(dys.to(DOT), tl.trans(state), dqs, input_precision=PRECISION)
            taken = tl.dot(d_wanted, tl.trans(state), taken, input_precision=PRECISION)
            through += tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 0)
        # What passes from a token to the leaving state, and from the entering one to a token.
        wide = ks.to(tl.float32)
        added *= to_end[:, None]
        taken *= fade[:, None]
        writing = tl.sum(added * wide, 1)
        held = tl.sum(taken * wide, 1)
        d_strength -= held
        dks += added - taken * strength[:, None]
        dqs *= fade[:, None]
        qs = _rows_of(q + head * q_head, token, q_token, inside, at_n, valid).to(DOT)
        reading = tl.sum(dqs * qs.to(tl.float32), 1) - strength * held

        between = tl.exp2(tl.where(rows >= columns, decay[:, None] - decay[None, :], float("-inf")))
        gram = tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
        d_gram = tl.where(rows > columns, -d_gram * between, 0.0)
        d_strength += tl.sum(d_gram * gram, 1)
        d_gram *= strength[:, None]
        share = d_gram * gram
        dks = tl.dot((d_gram + tl.trans(d_gram)).to(DOT), ks, dks, input_precision=PRECISION)
        scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        d_scores *= between
        share += d_scores * scores
        narrow = d_scores.to(DOT)
        dqs = tl.dot(narrow, ks, dqs, input_precision=PRECISION)
        dks = tl.dot(tl.trans(narrow), qs, dks, input_precision=PRECISION)
        place = token * heads * N + head * N + (rows * (heads * N) + at_n[None, :])
        tl.store(dq + place, dqs, mask=valid[:, None])

        # A step's log decay touches the pairs around it, the reads after it, the writes before it, and what passes
        # through the whole chunk. Column t of ``before`` sums what each token takes from those before t.
        before = tl.cumsum(share, 1) - share
        crossing = tl.where(rows >= columns, before + reading[:, None], writing[:, None])
        d_decay = tl.sum(crossing, 0) + tl.exp2(whole) * tl.sum(through, 0)
        step = tl.load(dt + head * dt_head + token * dt_token + inside * dt_token, mask=valid, other=0.0)
        at_token = token * heads + head + inside * heads
        tl.store(ddt + at_token, tl.load(A + head) * d_decay, mask=valid)
        tl.store(d_beta + at_token, d_strength, mask=valid)
        tl.store(dA + here, tl.sum(d_decay * step, 0))
    if BLOCK == P:
        tl.store(dv + (rows * (owners * P) + tl.arange(0, BLOCK)[None, :]), dvs, mask=valid[:, None])
    place = token * owners * N + owner * N + (rows * (owners * N) + at_n[None, :])
    tl.store(dk + place, dks, mask=valid[:, None])


class _Call:
    """What the launches of one call share: sizes, tuning, the inputs with their strides.

    ``segment``: chunks of a segment; 0 where every sequence is walked through as a whole.
    """

    def __init__(
        self, v: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, beta: Tensor, table: Tensor | None,
        begins: Tensor | None, segment: int,
    ) -> None:  # fmt: skip
        self.v, self.dt, self.k, self.q, self.beta, self.A = *map(_rows, (v, dt, k, q, beta)), A.contiguous()
        b, self.length, self.g, self.p = v.shape
        self.h, self.n = q.shape[2:]
        dot, precision, self.stored = _dot(v, k, q)
        self.tuning = tuning = tuning_of(v, k, q)
        self.table, self.begins = table, begins
        self.chunks = b * max(_parts(self.length, tuning.chunk), 1) if table is None else table.shape[0]
        self.options = {"N": self.n, "CHUNK": tuning.chunk, "DOT": dot, "PRECISION": precision}
        self.rows = held_rows(tuning, self.p, self.n)
        self.segment = segment or 2**30
        of_row = max(_parts(self.chunks // max(b, 1), self.segment), 1)
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
            _prepare_kernel[(self.chunks * self.h,)](
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
                _states_kernel[self._walks(self.p + self.n * local)](
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
                _leaving_kernel[self._walks(self.p)](
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
            _join_kernel[(self.segments * self.h * (self.p // JOINED),)](
                self.added, self.moves, self.table, self.begins, self.length, self.h, self.segment, ROWS=self.p,
                N=self.n, CHUNK=self.tuning.chunk, BLOCK=JOINED, BACK=back, num_warps=JOINING,
            )  # fmt: skip


def tuning_of(v: Tensor, k: Tensor, q: Tensor) -> Tuning:
    """How a call with these inputs runs."""
    return TUNED[int(max(v.shape[3], q.shape[3])), _dot(v, k, q)[2].itemsize]


def held_rows(tuning: Tuning, p: int, n: int) -> int:
    """Rows of a state that a program walks with."""
    return min(tuning.rows, p, n)


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
def _delta_fake(v, dt, A, k, q, beta, initial_state, table, begins, final_rows, segment):
    b, length, h, n = q.shape
    size = tuning_of(v, k, q).chunk
    chunks = b * max(_parts(length, size), 1) if table is None else table.shape[0]
    return (
        v.new_empty(b, length, h, v.shape[3]),
        v.new_empty(final_rows, h, v.shape[3], n, dtype=torch.float32),
        v.new_empty(chunks, h, size, dtype=torch.float32),
        v.new_empty(chunks, h, size, size, dtype=_dot(v, k, q)[2]),
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
    dy = _rows(dy)
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
        _gradients_kernel[(call.chunks * (call.h // together),)](
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
    v, dt, A, k, q, beta, initial_state, table, begins, decays, inverses, dy, d_final, segment
):  # fmt: skip
    inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v, dt, A, k, q, beta)]
    if initial_state is None:
        return *inputs, v.new_empty(0, dtype=torch.float32)
    return *inputs, torch.empty_like(initial_state, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.final_rows, ctx.segment = inputs
    _, _, decays, inverses = output
    ctx.mark_non_differentiable(decays, inverses)
    ctx.save_for_backward(*tensors, decays, inverses)


def _differentiate(ctx, dy, d_final, _decays, _inverses):
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
    """The recurrence over whole sequences; arguments, shapes and results as in :func:`mmmamba.ops.delta.gated_delta`.

    Args:
        segment: chunks of the parts of a sequence that are walked through at the same time; 0: no parts. As tuned when
            absent.

    Raises:
        ValueError: for shapes that do not fit together, or that :func:`~mmmamba.ops.triton.why_not` names.
    """
    layout = None if cu_seqlens is None else layout_for(v, cu_seqlens)
    rows = v.shape[0] if layout is None else layout.sequences
    check(v, dt, A, k, q, beta, initial_state, rows)
    reason = why_not(v, dt, A, k, q, beta, initial_state, head_dim=v.shape[3], state_dim=q.shape[3])
    if reason is not None:
        raise ValueError(f"gated_delta: {reason}")
    tuning = tuning_of(v, k, q)
    table = None if layout is None else layout.cuts(tuning.chunk)
    state = None if initial_state is None else initial_state.float()
    if segment is None:
        longest = v.shape[1] if layout is None else layout.longest
        walks = q.shape[2] * (v.shape[3] // held_rows(tuning, v.shape[3], q.shape[3]))
        segment = _segment_chunks(v.shape[0] * v.shape[1], longest, walks, tuning.chunk)
    begins = None if layout is None else layout.begins(tuning.chunk, segment)
    y, final, _, _ = _delta(
        v, dt.float(), A.float(), k, q, beta.float(), state, table, begins, rows if return_final_state else 0, segment
    )
    return y, final if return_final_state else None


def _segment_chunks(tokens: int, longest: int, walks: int, chunk: int) -> int:
    """Chunks of a segment, such that about PROGRAMS walks run at once; 0 where no sequence is longer than one.

    Walking in segments costs nearly three times the products, so that short sequences are never cut.
    """
    chunks = max(_parts(_parts(tokens, chunk), max(PROGRAMS // walks, 1)), _parts(LEAST, chunk))
    return chunks if _parts(longest, chunk) > chunks else 0
