"""The gated delta rule in Triton, forward and backward; the contract is :func:`mmmamba.ops.delta.gated_delta`'s.

Tokens of all rows lie behind one another; each sequence is cut into chunks of q = 32 tokens (an empty one has one chunk
without tokens). In a chunk with inclusive log decays a_i, strengths b_i, entering state S and leaving gradient D::

    X_i = v_i - exp(a_i) S k_i                                   what is to be written, less what is held
    U   = T (b X),  T = (I + L)^-1,  L_ij = b_i exp(a_i - a_j) (k_i.k_j) for j < i
    y_i = exp(a_i) S q_i + sum_{j<=i} P_ij u_j,                  P_ij = exp(a_i - a_j) (q_i.k_j)
    S'  = exp(a_q) S + sum_j exp(a_q - a_j) u_j k_j^T

    dU  = P^T dy + exp(a_q - a) (D' k),  dW = T^T dU,  dv = b dW,  dL = -dW U^T
    D   = exp(a_q) D' + sum_i exp(a_i) (dy_i q_i^T - b_i dW_i k_i^T)

T is the only thing that is solved for, and it is the same for all rows of the state, which are independent given k, q
and T: a program walks through a sequence's chunks with some rows of one head's state in registers. Whatever needs no
order is worked out by all chunks at once.

A long sequence is cut into segments, so that enough programs walk at once. A segment turns the state S that enters it
into S M + R: R is what it makes of nothing, and M (n, n) what it makes of the rows of the identity without values. Both
are found first, by all segments at once; then each segment puts the M and R of those before it together, and walks.
Backward the gradient that leaves it, D, becomes D M^T + R', with the same M::

    forward (t tokens, c chunks, e bytes an input, f a stored one)   bytes
    0 prepare   decays and T, by chunk and head                      t (g n e + h (12 + q f))
    1 states    y chunk by chunk, the final states                   t (g (p+n) + h (p+n)) e + t h (8 + q f)
    backward
    0 prepare   as above
    1 states    the state that enters every chunk                    t g (p+n) e + t h (8 + q f) + c h p n f
    2 leaving   the gradient that leaves it, from the end            t (g n + h (p+n)) e + t h (8 + q f) + c h p n f
    3 gradients everything else                                      2 c h p n f + t (g+h) (p+2n) e + t h (20 + q f)

The last launch takes a group's heads one after another; where p is 128 it takes them apart, and a group's dv and dk are
summed afterwards, as dA's parts are. Nothing is added atomically: two runs give the same bits.

T is found by substitution, row after row of both 16-row blocks on its diagonal, which then give the block below. (The
product of (I - L)(I + L^2)(I + L^4)… has the same value, but where keys are alike its factors grow to 1e8 and more, and
nothing is left of it in float32.) The gradient of a step's log decay sums over just the pairs that the step lies
between, as in :mod:`mmmamba.ops.triton.ssd`.

Products have 32 rows at most: too few for Hopper's asynchronous ones, with which Triton has miscompiled this
recurrence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.delta import check
from mmmamba.ops.layout import layout_for
from mmmamba.ops.triton import on_device, operator, why_not
from mmmamba.ops.triton.ssd import LOG2_E, _dot, _locate, _parts, _rows, _rows_of

CHUNK = 32
BLOCK = 32  # rows of a state that a program holds
PROGRAMS = 256  # walks that fill the machine
LEAST = 32  # chunks of a segment
JOINING = 8  # warps of a program that joins segments
COLUMNS = 64  # of a state that the launch of the gradients holds at once, at most


class Tuning(NamedTuple):
    """Warps of each launch's programs, and stages of the loads' pipeline of those that walk."""

    prepare: int
    walk: int
    stages: int
    gradients: int


# By the larger of p and n, for 2-byte and for 4-byte products.
TUNED = {
    (32, 2): Tuning(1, 2, 2, 4),
    (64, 2): Tuning(1, 2, 3, 4),
    (128, 2): Tuning(1, 4, 3, 4),
    (32, 4): Tuning(1, 4, 1, 4),
    (64, 4): Tuning(1, 4, 1, 4),
    (128, 4): Tuning(2, 8, 1, 8),
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


@triton.jit(do_not_specialize=["length"])
def _prepare_kernel(
    k, k_token, k_head, dt, dt_token, dt_head, beta, beta_token, beta_head, A, decays, inverses, table, length, heads,
    ratio,
    N: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × head): inclusive log2 decays (c, h, q), flat behind the end, and T (c, h, q, q)."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    _row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    if stop == start:
        return
    HALF: tl.constexpr = CHUNK // 2
    at, at_n = tl.arange(0, HALF), tl.arange(0, N)
    token = start + (chunk - first) * CHUNK
    left = tl.minimum(stop - token, CHUNK).to(tl.int32)
    upper, lower = at < left, at + HALF < left
    rate = tl.load(A + head) * LOG2_E
    dt += token * dt_token + head * dt_head
    beta += token * beta_token + head * beta_head
    k += (head // ratio) * k_head
    here = chunk.to(tl.int64) * heads + head

    first_change = tl.load(dt + at * dt_token, mask=upper, other=0.0) * rate
    first_decay = tl.cumsum(first_change, 0)
    second_decay = tl.cumsum(tl.load(dt + (at + HALF) * dt_token, mask=lower, other=0.0) * rate, 0)
    second_decay += tl.sum(first_change, 0)
    tl.store(decays + here * CHUNK + at, first_decay)
    tl.store(decays + here * CHUNK + HALF + at, second_decay)

    first_strength = tl.load(beta + at * beta_token, mask=upper, other=0.0)
    second_strength = tl.load(beta + (at + HALF) * beta_token, mask=lower, other=0.0)
    ks = _rows_of(k, token, k_token, at, at_n, upper).to(DOT)
    more = _rows_of(k, token, k_token, at + HALF, at_n, lower).to(DOT)
    inverse = _substitute(tl.dot(ks, tl.trans(ks), input_precision=PRECISION), first_strength, first_decay, HALF)
    below = _substitute(tl.dot(more, tl.trans(more), input_precision=PRECISION), second_strength, second_decay, HALF)
    across = tl.dot(more, tl.trans(ks), input_precision=PRECISION)
    across *= tl.exp2(second_decay[:, None] - first_decay[None, :]) * second_strength[:, None]
    across = tl.dot(across, inverse, input_precision="ieee")
    across = -tl.dot(below, across, input_precision="ieee")

    inverses += here * CHUNK * CHUNK
    corner = at[:, None] * CHUNK + at[None, :]
    tl.store(inverses + corner, inverse)
    tl.store(inverses + corner + HALF, tl.zeros([HALF, HALF], tl.float32))
    tl.store(inverses + corner + HALF * CHUNK, across)
    tl.store(inverses + corner + HALF * CHUNK + HALF, below)


@triton.jit
def _segment(table, chunk, length, per, CHUNK: tl.constexpr):
    """Of a chunk: its sequence, which chunk of that it is, and whether a segment begins there.

    The sequence as its row, its first chunk, its first token, the token after it, and (last) how many chunks it has.
    """
    row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    index = chunk - first
    whole = tl.cdiv(stop - start, CHUNK).to(tl.int32)
    begins = (index % per == 0) & ((index == 0) | (index < whole))
    return row, first, start, stop, index, begins, whole


@triton.jit(do_not_specialize=["length", "per"])
def _states_kernel(
    v, v_token, v_head, k, k_token, k_head, q, q_token, q_head, beta, beta_token, beta_head, decays, inverses,
    y, initial, final, kept, added, moves, table, length, heads, ratio, per,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × head × rows of the state); those of a segment's first chunk walk through the segment.

    What the state was before each chunk goes to ``kept``, what is read to ``y``, what it is at the end to ``final``,
    each unless None. Sequences begin with ``initial`` (zeros if None).

    LOCAL: for the segments that others of their sequence follow, what the state becomes of nothing goes to ``added``,
    and what it becomes of each unit row to ``moves``, which more programs work out. Without LOCAL ``added`` holds the
    states that leave the segments (:func:`_join_kernel`).
    """
    tiles: tl.constexpr = (P + N if LOCAL else P) // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk = tl.program_id(0) // tiles // heads
    row, _first, start, stop, index, begins, whole_count = _segment(table, chunk, length, per, CHUNK)
    if not begins:
        return
    unit = tile >= P // BLOCK
    if LOCAL:
        if (index + per >= whole_count) | (unit & (index == 0)):
            return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    at_p = tl.where(unit, tile - P // BLOCK, tile) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = inside[:, None], inside[None, :]
    at = at_p[:, None] * N + at_n[None, :]
    edge = (row.to(tl.int64) * heads + head) * P * N + at
    v += (head // ratio) * v_head
    k += (head // ratio) * k_head
    q += head * q_head
    beta += head * beta_head
    state = tl.zeros([BLOCK, N], tl.float32)
    if index == 0:
        if initial is not None:
            state = tl.load(initial + edge)
    elif LOCAL:
        state = tl.where(unit & (at_p[:, None] == at_n[None, :]), 1.0, 0.0)
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
            tl.store(kept + here * P * N + at, state)
        entered = tl.trans(state.to(DOT))  # (n, rows)
        held = tl.dot(ks, entered, input_precision=PRECISION) * tl.exp2(decay)[:, None]
        wanted = (vs - held) * strength[:, None]
        written = tl.dot(inverse, wanted.to(DOT), input_precision=PRECISION)
        if y is not None:
            qs = _rows_of(q, token, q_token, inside, at_n, valid).to(DOT)
            scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
            scores *= tl.exp2(tl.where(rows >= columns, decay[:, None] - decay[None, :], float("-inf")))
            out = tl.dot(qs, entered, input_precision=PRECISION) * tl.exp2(decay)[:, None]
            out = tl.dot(scores.to(DOT), written.to(DOT), out, input_precision=PRECISION)
            place = token * heads * P + head * P + (rows * (heads * P) + at_p[None, :])
            tl.store(y + place, out, mask=valid[:, None])
        leaving = tl.trans((written * tl.exp2(whole - decay)[:, None]).to(DOT))
        state = tl.dot(leaving, ks, state * tl.exp2(whole), input_precision=PRECISION)
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
    d_final, d_initial, kept, added, table, length, heads, ratio, per,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """As :func:`_states_kernel`, from the end: the gradient of the state after each chunk to ``kept``.

    LOCAL: for the segments that follow others of their sequence, what the gradient becomes of nothing to ``added``.
    """
    tiles: tl.constexpr = P // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk = tl.program_id(0) // tiles // heads
    row, _first, start, stop, index, begins, whole_count = _segment(table, chunk, length, per, CHUNK)
    if not begins:
        return
    if LOCAL:
        if index == 0:
            return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    at_p = tile * BLOCK + tl.arange(0, BLOCK)
    rows, columns = inside[:, None], inside[None, :]
    at = at_p[:, None] * N + at_n[None, :]
    edge = (row.to(tl.int64) * heads + head) * P * N + at
    k += (head // ratio) * k_head
    q += head * q_head
    beta += head * beta_head
    dy += head * dy_head
    gradient = tl.zeros([BLOCK, N], tl.float32)
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
            tl.store(kept + here * P * N + at, gradient)
        scores = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)  # (j, i)
        scores *= tl.exp2(tl.where(rows <= columns, decay[None, :] - decay[:, None], float("-inf")))
        d_written = tl.dot(ks, tl.trans(gradient.to(DOT)), input_precision=PRECISION)
        d_written *= tl.exp2(whole - decay)[:, None]
        d_written = tl.dot(scores.to(DOT), dys.to(DOT), d_written, input_precision=PRECISION)
        d_wanted = tl.dot(transposed, d_written.to(DOT), input_precision=PRECISION)
        fade = tl.exp2(decay)[:, None]
        read = tl.trans((dys.to(tl.float32) * fade).to(DOT))
        taken = tl.trans((d_wanted * -(fade * strength[:, None])).to(DOT))
        gradient = tl.dot(read, qs, gradient * tl.exp2(whole), input_precision=PRECISION)
        gradient = tl.dot(taken, ks, gradient, input_precision=PRECISION)
    if LOCAL:
        here = (chunk // per).to(tl.int64) * heads + head
        tl.store(added + here * P * N + at, gradient)
    elif d_initial is not None:
        if index == 0:
            tl.store(d_initial + edge, gradient)


@triton.jit(do_not_specialize=["length", "per"])
def _join_kernel(
    added, moves, table, length, heads, per,
    ROWS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Programs as those of the walks: turn what segments make of nothing into what leaves them, one after another.

    In place in ``added``: R_i + X_{i-1} M_i for the states of a sequence's segments but its last; BACK, from the end,
    R_i + X_{i+1} M_i^T for the gradients of all but its first.
    """
    tiles: tl.constexpr = ROWS // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk = tl.program_id(0) // tiles // heads
    _row, _first, _start, _stop, index, _begins, whole_count = _segment(table, chunk, length, per, CHUNK)
    segments = tl.cdiv(whole_count, per)
    if (index != 0) | (segments < 3):
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
    decays, inverses, dy, dy_token, dy_head, kept, dv, dk, dq, ddt, d_beta, dA, table, length, chunks, heads, ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × heads): all gradients of a chunk's tokens, from the state before and the gradient after it.

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
    gram = tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
    v += group * v_head
    dv += token * owners * P + owner * P
    dks = tl.zeros([CHUNK, N], tl.float32)
    dvs = tl.zeros([CHUNK, BLOCK], tl.float32)
    for i in range(TOGETHER):
        head = owner * TOGETHER + i
        here = chunk.to(tl.int64) * heads + head
        qs = _rows_of(q + head * q_head, token, q_token, inside, at_n, valid).to(DOT)
        strength = tl.load(beta + head * beta_head + token * beta_token + inside * beta_token, mask=valid, other=0.0)
        decay = tl.load(decays + here * CHUNK + inside)
        whole = tl.load(decays + here * CHUNK + CHUNK - 1)
        inverse = tl.load(inverses + here * CHUNK * CHUNK + rows * CHUNK + columns).to(DOT)
        transposed = tl.load(inverses + here * CHUNK * CHUNK + columns * CHUNK + rows).to(DOT)
        between = tl.exp2(tl.where(rows >= columns, decay[:, None] - decay[None, :], float("-inf")))
        fade, to_end = tl.exp2(decay), tl.exp2(whole - decay)
        scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        reach = tl.trans((scores * between).to(DOT))  # (j, i)

        d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        d_gram = tl.zeros([CHUNK, CHUNK], tl.float32)
        dqs = tl.zeros([CHUNK, N], tl.float32)
        d_strength = tl.zeros([CHUNK], tl.float32)
        reads = tl.zeros([CHUNK], tl.float32)  # what passes from the entering state to a token
        writes = tl.zeros([CHUNK], tl.float32)  # and from a token to the leaving one
        through = tl.zeros([BLOCK], tl.float32)
        for part in range(0, P, BLOCK):
            at_p = part + tl.arange(0, BLOCK)
            at = at_p[:, None] * N + at_n[None, :]
            state = tl.load(kept + here * P * N + at).to(DOT)
            leaving = tl.load(kept + (chunks.to(tl.int64) * heads + here) * P * N + at).to(DOT)
            vs = _rows_of(v, token, v_token, inside, at_p, valid).to(tl.float32)
            dys = _rows_of(dy + head * dy_head, token, dy_token, inside, at_p, valid)
            held = tl.dot(ks, tl.trans(state), input_precision=PRECISION) * fade[:, None]
            rest = vs - held
            written = tl.dot(inverse, (rest * strength[:, None]).to(DOT), input_precision=PRECISION)
            d_written = tl.dot(ks, tl.trans(leaving), input_precision=PRECISION) * to_end[:, None]
            writes += tl.sum(d_written * written, 1)
            d_written = tl.dot(reach, dys.to(DOT), d_written, input_precision=PRECISION)
            d_wanted = tl.dot(transposed, d_written.to(DOT), input_precision=PRECISION)
            d_strength += tl.sum(d_wanted * rest, 1)
            reads -= strength * tl.sum(d_wanted * held, 1)
            backward = tl.trans(written.to(DOT))
            d_scores = tl.dot(dys.to(DOT), backward, d_scores, input_precision=PRECISION)
            d_gram = tl.dot((-d_wanted).to(DOT), backward, d_gram, input_precision=PRECISION)
            d_wanted *= strength[:, None]
            if BLOCK == P:
                dvs += d_wanted
            else:
                tl.store(dv + (rows * (owners * P) + at_p[None, :]), d_wanted, mask=valid[:, None])
            dqs = tl.dot((dys.to(tl.float32) * fade[:, None]).to(DOT), state, dqs, input_precision=PRECISION)
            dks = tl.dot((d_wanted * -fade[:, None]).to(DOT), state, dks, input_precision=PRECISION)
            dks = tl.dot((written * to_end[:, None]).to(DOT), leaving, dks, input_precision=PRECISION)
            through += tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1)
        reads += tl.sum(dqs * qs.to(tl.float32), 1)

        d_scores *= between
        d_gram = tl.where(rows > columns, d_gram * between, 0.0)
        d_strength += tl.sum(d_gram * gram, 1)
        d_gram *= strength[:, None]
        dqs = tl.dot(d_scores.to(DOT), ks, dqs, input_precision=PRECISION)
        dks = tl.dot(tl.trans(d_scores.to(DOT)), qs, dks, input_precision=PRECISION)
        dks = tl.dot((d_gram + tl.trans(d_gram)).to(DOT), ks, dks, input_precision=PRECISION)
        place = token * heads * N + head * N + (rows * (heads * N) + at_n[None, :])
        tl.store(dq + place, dqs, mask=valid[:, None])

        # A step's log decay touches the pairs around it, the reads after it, the writes before it, and what passes
        # through the whole chunk. Column t of ``before`` sums what each token takes from those before t.
        share = d_scores * scores + d_gram * gram
        before = tl.cumsum(share, 1) - share
        crossing = tl.where(rows >= columns, before + reads[:, None], writes[:, None])
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
    """What the launches of one call share: sizes, tuning, the inputs with their strides, decays and T.

    ``segment``: chunks of a segment; 0 where every sequence is walked through as a whole.
    """

    def __init__(
        self, v: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, beta: Tensor, table: Tensor | None, segment: int
    ) -> None:
        self.v, self.dt, self.k, self.q, self.beta, self.A = *map(_rows, (v, dt, k, q, beta)), A.contiguous()
        b, self.length, self.g, self.p = v.shape
        self.h, self.n = q.shape[2:]
        self.table = table
        self.chunks = b * max(_parts(self.length, CHUNK), 1) if table is None else table.shape[0]
        dot, precision, self.stored = _dot(v, k, q)
        self.tuning = TUNED[max(self.p, self.n), self.stored.itemsize]
        self.options = {"P": self.p, "N": self.n, "CHUNK": CHUNK, "DOT": dot, "PRECISION": precision}
        self.walking = {"BLOCK": BLOCK, "num_warps": self.tuning.walk, "num_stages": self.tuning.stages}
        self.decays = v.new_empty(self.chunks, self.h, CHUNK, dtype=torch.float32)
        self.inverses = v.new_empty(self.chunks, self.h, CHUNK, CHUNK, dtype=self.stored)
        with on_device(v):
            _prepare_kernel[(self.chunks * self.h,)](
                *_strided(self.k), *_strided(self.dt), *_strided(self.beta), self.A, self.decays, self.inverses,
                *self.place, N=self.n, CHUNK=CHUNK, DOT=dot, PRECISION=precision, num_warps=self.tuning.prepare,
            )  # fmt: skip
        self.segment = segment or 2**30
        self.segmented = segment > 0
        slots = self.chunks // segment + 1 if segment else 0
        self.added = v.new_empty(slots, self.h, self.p, self.n, dtype=torch.float32)
        self.moves = v.new_empty(slots, self.h, self.n, self.n, dtype=torch.float32)

    @property
    def place(self) -> tuple[Tensor | None, int, int, int]:
        """Where chunks lie, and the heads: arguments of every launch."""
        return self.table, self.length, self.h, self.h // self.g

    def states(
        self, *, initial: Tensor | None, y: Tensor | None = None, final: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The walks from the start, through all segments at once where sequences are cut into some."""
        initial = None if initial is None else initial.contiguous()
        if self.segmented:
            self._states(self.p + self.n, None, initial, None, None, local=True)
            self._join(back=False)
        self._states(self.p, y, initial, final, kept, local=False)

    def _states(
        self, rows: int, y: Tensor | None, initial: Tensor | None, final: Tensor | None, kept: Tensor | None, *,
        local: bool,
    ) -> None:  # fmt: skip
        with on_device(self.v):
            _states_kernel[(self.chunks * self.h * (rows // BLOCK),)](
                *_strided(self.v), *_strided(self.k), *_strided(self.q), *_strided(self.beta), self.decays,
                self.inverses, y, initial, final, kept, self.added, self.moves, *self.place, self.segment,
                LOCAL=local, **self.walking, **self.options,
            )  # fmt: skip

    def leaving(self, dy: Tensor, *, d_final: Tensor | None, d_initial: Tensor | None, kept: Tensor) -> None:
        """The walks from the end; after :meth:`states`, whose moves they take."""
        d_final = None if d_final is None else d_final.contiguous()
        for local in (True, False) if self.segmented else (False,):
            with on_device(self.v):
                _leaving_kernel[(self.chunks * self.h * (self.p // BLOCK),)](
                    *_strided(self.k), *_strided(self.q), *_strided(self.beta), self.decays, self.inverses,
                    *_strided(dy), d_final, d_initial, kept, self.added, *self.place, self.segment,
                    LOCAL=local, **self.walking, **self.options,
                )  # fmt: skip
            if local:
                self._join(back=True)

    def _join(self, *, back: bool) -> None:
        with on_device(self.v):
            _join_kernel[(self.chunks * self.h * (self.p // BLOCK),)](
                self.added, self.moves, self.table, self.length, self.h, self.segment,
                ROWS=self.p, N=self.n, CHUNK=CHUNK, BLOCK=BLOCK, BACK=back, num_warps=JOINING,
            )  # fmt: skip


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
    final_rows: int,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) and the final states (final_rows, h, p, n); ``final_rows`` 0 when nobody wants them."""
    y, final = _delta_fake(v, dt, A, k, q, beta, initial_state, table, final_rows, segment)
    call = _Call(v, dt, A, k, q, beta, table, segment)
    call.states(initial=initial_state, y=y, final=final if final_rows else None)
    return y, final


@_delta.register_fake
def _delta_fake(v, dt, A, k, q, beta, initial_state, table, final_rows, segment):
    h, n = q.shape[2:]
    y = v.new_empty(v.shape[0], v.shape[1], h, v.shape[3])
    return y, v.new_empty(final_rows, h, v.shape[3], n, dtype=torch.float32)


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
    dy: Tensor,
    d_final: Tensor | None,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of v, dt, A, k, q, beta and the initial state (0 rows when there is none)."""
    dv, ddt, _, dk, dq, d_beta, d_initial = _delta_backward_fake(
        v, dt, A, k, q, beta, initial_state, table, dy, d_final, segment
    )
    call = _Call(v, dt, A, k, q, beta, table, segment)
    dy = _rows(dy)
    kept = v.new_empty(2, call.chunks, call.h, call.p, call.n, dtype=call.stored)
    dA = v.new_empty(call.chunks, call.h, dtype=torch.float32)
    call.states(initial=initial_state, kept=kept[0])
    call.leaving(dy, d_final=d_final, d_initial=None if initial_state is None else d_initial, kept=kept[1])
    block, ratio = min(COLUMNS, call.p), call.h // call.g
    together = ratio if block == call.p else 1
    shared = together == ratio
    own_dv, own_dk = (t if shared else t.new_empty(*q.shape[:3], t.shape[3]) for t in (dv, dk))
    with on_device(v):
        _gradients_kernel[(call.chunks * (call.h // together),)](
            *_strided(call.v), *_strided(call.k), *_strided(call.q), *_strided(call.dt), *_strided(call.beta), call.A,
            call.decays, call.inverses, *_strided(dy), kept, own_dv, own_dk, dq, ddt, d_beta, dA,
            call.table, call.length, call.chunks, call.h, ratio,
            BLOCK=block, TOGETHER=together, num_warps=call.tuning.gradients, num_stages=1, **call.options,
        )  # fmt: skip
    if not shared:
        dv, dk = (t.unflatten(2, (call.g, ratio)).sum(3) for t in (own_dv, own_dk))
    return dv, ddt, dA.sum(0), dk, dq, d_beta, d_initial


@_delta_backward.register_fake
def _delta_backward_fake(v, dt, A, k, q, beta, initial_state, table, dy, d_final, segment):
    inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v, dt, A, k, q, beta)]
    if initial_state is None:
        return *inputs, v.new_empty(0, dtype=torch.float32)
    return *inputs, torch.empty_like(initial_state, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.final_rows, ctx.segment = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy, d_final):
    *inputs, initial_state, table = ctx.saved_tensors
    if dy is None:
        v, q = inputs[0], inputs[4]
        dy = v.new_zeros(*q.shape[:3], v.shape[3])
    *gradients, d_initial = _delta_backward(
        *inputs, initial_state, table, dy, d_final if ctx.final_rows else None, ctx.segment
    )  # fmt: skip
    return *gradients, None if initial_state is None else d_initial, None, None, None


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
    table = None if layout is None else layout.cuts(CHUNK)
    state = None if initial_state is None else initial_state.float()
    if segment is None:
        longest = v.shape[1] if layout is None else layout.longest
        segment = _segment_chunks(v.shape[0] * v.shape[1], longest, q.shape[2] * (v.shape[3] // BLOCK))
    y, final = _delta(
        v, dt.float(), A.float(), k, q, beta.float(), state, table, rows if return_final_state else 0, segment
    )  # fmt: skip
    return y, final if return_final_state else None


def _segment_chunks(tokens: int, longest: int, walks: int) -> int:
    """Chunks of a segment, such that about PROGRAMS walks run at once; 0 where no sequence is longer than one.

    Walking in segments costs nearly three times the products, so that short sequences are never cut.
    """
    chunks = max(_parts(_parts(tokens, CHUNK), max(PROGRAMS // walks, 1)), LEAST)
    return chunks if _parts(longest, CHUNK) > chunks else 0
