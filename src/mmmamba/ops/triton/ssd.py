"""The state space recurrence (SSD) in Triton, forward and backward; the contract is :func:`mmmamba.ops.ssd.ssd`'s.

Tokens of all rows lie behind one another; each sequence is cut into chunks of q tokens, and no chunk straddles two
sequences (an empty sequence has one chunk without tokens). The chunks, in order, are dealt to segments, one a program
and head. A program walks through its segment with the state in registers: in the forward pass no chunk's state goes to
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

Launch 1 does nothing for a segment behind which a sequence starts. The sum of dA over chunks is one more, tiny,
reduction. Nothing is added atomically: two runs give the same bits.

In a chunk with inclusive log decays a_i (float32, a_q at its end), entering state S and leaving gradient D::

    y_i = sum_{j<=i} exp(a_i - a_j) dt_j (C_i.B_j) x_j + exp(a_i) S C_i
    S'  = exp(a_q) S + sum_j exp(a_q - a_j) dt_j x_j B_j^T          D' = exp(a_q) D + sum_i exp(a_i) dy_i C_i^T

Decays are kept as powers of two, with the steps folded into them where that saves a product; what is exponentiated is
never above a step's size. The gradient of a step's log decay sums over just the pairs (earlier token, later token) that
the step lies between: nothing cancels, however strong the decay.

bfloat16 products use the tensor cores with float32 sums. float16 inputs are multiplied in TF32, which holds them
exactly and does not overflow for large states; float32 ones in three TF32 products. Their tiles have 32 rows, too few
for Hopper's asynchronous products: those have given wrong last digits, another time an illegal access, in three-part
TF32 with Triton 3.6.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.layout import layout_for
from mmmamba.ops.ssd import _check
from mmmamba.ops.triton import interpreted, on_device, operator, why_not


class Tiles(NamedTuple):
    """What a launch is cut into: tile of the state (p, n), warps of a program, stages of the loads' pipeline."""

    p: int
    n: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """Warps of a program and stages of its loads' pipeline, for a launch that is not cut into tiles."""

    warps: int
    stages: int


class Tuning(NamedTuple):
    """Tokens a chunk, programs of the output launch that fill the machine, and how each launch runs.

    The output launch has whole rows of the state (n is not cut), the launch of the reads whole columns (p is not cut).
    """

    chunk: int
    programs: int
    states: Tiles
    output: Tiles
    reads: Tiles
    writes: Launch


# By the larger of p and n, for 2-byte and for 4-byte products; a tile is never larger than p and n.
TUNED = {
    (32, 2): Tuning(64, 264, Tiles(32, 32, 4, 3), Tiles(32, 32, 4, 3), Tiles(32, 32, 4, 2), Launch(4, 1)),
    (64, 2): Tuning(64, 264, Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 1), Launch(4, 1)),
    (128, 2): Tuning(64, 256, Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 32, 4, 3), Launch(4, 1)),
    (32, 4): Tuning(32, 528, Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Launch(4, 1)),
    (64, 4): Tuning(32, 264, Tiles(32, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1), Launch(4, 1)),
    (128, 4): Tuning(16, 264, Tiles(32, 128, 4, 1), Tiles(32, 128, 4, 1), Tiles(128, 32, 8, 1), Launch(8, 1)),
}
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(table, chunk, length, CHUNK: tl.constexpr):
    """Of a chunk's sequence: its row, its first and its last chunk, its first token, and the token behind it."""
    if table is None:
        row = chunk // tl.maximum(tl.cdiv(length, CHUNK), 1)
        first = row * tl.maximum(tl.cdiv(length, CHUNK), 1)
        start = row.to(tl.int64) * length
        tokens = length
    else:
        row = tl.load(table + chunk * 4)
        first = tl.load(table + chunk * 4 + 1)
        start = tl.load(table + chunk * 4 + 2).to(tl.int64)
        tokens = tl.load(table + chunk * 4 + 3)
        first = tl.where(tokens == 0, chunk, first)  # what pads a table counts as empty sequences
    return row, first, first + tl.maximum(tl.cdiv(tokens, CHUNK), 1) - 1, start, start + tokens


@triton.jit(do_not_specialize=["length"])
def _decays_kernel(
    dt, dt_token, dt_head, A, decays, steps, sources, writes, table, length, heads,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Programs (chunk, tile of heads), all (c, h, q): inclusive log2 decays a_i, and what is wanted of the others.

    Those are the steps dt_j, ``sources`` a_j - log2 dt_j, ``writes`` exp2(a_q - a_j) dt_j. There is no step behind a
    sequence's end.
    """
    chunk = tl.program_id(0)
    _row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    token = start + (chunk - first) * CHUNK
    inside = tl.arange(0, CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (inside < stop - token)[:, None] & (head < heads)[None, :]
    rate = tl.load(A + head, mask=head < heads, other=0.0) * LOG2_E
    step = tl.load(dt + token * dt_token + (inside[:, None] * dt_token + head[None, :] * dt_head), mask=mask, other=0.0)
    at = (chunk.to(tl.int64) * heads + head)[None, :] * CHUNK + inside[:, None]
    here = (head < heads)[None, :]
    change = step * rate[None, :]
    decay = tl.cumsum(change, 0)
    tl.store(decays + at, decay, mask=here)
    if steps is not None:
        tl.store(steps + at, step, mask=here)
    if sources is not None:
        source = decay - tl.log2(tl.where(step > 0, step, 1.0))
        tl.store(sources + at, tl.where(step > 0, source, float("inf")), mask=here)
    whole = tl.sum(tl.where((inside == CHUNK - 1)[:, None], decay, 0.0), 0)
    tl.store(writes + at, tl.exp2(whole[None, :] - decay) * step, mask=here)


@triton.jit
def _run(
    state, total, left, left_token, right, right_token, query, query_token, y, y_token, decays, sources, writes,
    heads, kept, kept_chunk, chunk, count, first, start, stop, tile, at_p, at_n,
    CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """``count`` chunks of one sequence from ``chunk`` on: the state behind them, and ``total`` plus their log2 decay.

    A tile (p, n) of state' = decay · state + (weight · left)^T right, forward (x, B) or from the end (dy, C). What it
    was before each chunk goes to ``kept``, the output of the recurrence to ``y``, each unless None.

    The products' left operands that are worked out here (scores, weighted inputs) stay in registers, and all loaded
    ones are multiplied as they lie in shared memory: only the state, in 2 bytes, is written there.
    """
    inside = tl.arange(0, CHUNK)
    columns = inside[None, :]
    upcoming = tl.load(decays + chunk.to(tl.int64) * heads * CHUNK + CHUNK - 1)
    for k in range(count):
        now = chunk - k if REVERSE else chunk + k
        token = start + (now - first) * CHUNK  # scalar and wide; offsets inside a chunk are narrow
        valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
        # Behind the sequence's end the last token stands in, with weights of 0: loads without masks are cheaper.
        row = tl.minimum(inside, tl.minimum(stop - token, CHUNK).to(tl.int32) - 1)[:, None]
        here = now.to(tl.int64) * heads * CHUNK
        whole = upcoming
        # One chunk ahead: nothing waits for it.
        then = tl.minimum(k + 1, count - 1)
        then = chunk - then if REVERSE else chunk + then
        upcoming = tl.load(decays + then.to(tl.int64) * heads * CHUNK + CHUNK - 1)
        if kept is not None:
            tl.store(kept + now.to(tl.int64) * kept_chunk + tile, state)
        a = tl.load(left + token * left_token + (row * left_token + at_p[None, :]))  # (q, p)
        b = tl.load(right + token * right_token + (row * right_token + at_n[None, :])).to(DOT)  # (q, n)
        if y is not None:
            q = tl.load(query + token * query_token + (row * query_token + at_n[None, :])).to(DOT)
            decay = tl.load(decays + here + inside)
            source = tl.load(sources + here + inside)
            scores = tl.dot(q, tl.trans(b), input_precision=PRECISION)  # (i, j)
            scores *= tl.exp2(tl.where(inside[:, None] >= columns, decay[:, None] - source[None, :], float("-inf")))
            reach = scores.to(DOT)
            out = tl.dot(q, tl.trans(state.to(DOT)), input_precision=PRECISION) * tl.exp2(decay)[:, None]
            out = tl.dot(reach, a.to(DOT), out, input_precision=PRECISION)
            tl.store(y + token * y_token + (inside[:, None] * y_token + at_p[None, :]), out, mask=valid[:, None])
        if REVERSE:
            weight = tl.where(valid, tl.exp2(tl.load(decays + here + inside)), 0.0)
        else:
            weight = tl.load(writes + here + inside)
        weighted = (tl.trans(a).to(tl.float32) * weight[None, :]).to(DOT)
        state = tl.dot(weighted, b, state * tl.exp2(whole), input_precision=PRECISION)
        total += whole
    return state, total


@triton.jit
def _sweep(
    left, left_token, right, right_token, query, query_token, y, y_token, decays, sources, writes,
    edge, far_edge, local, decay, kept, table, length, chunks, per_segment, segments, head, heads,
    tile, at_p, at_n,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """One segment of one head. LOCAL: what it adds and how it decays, for the segments behind it; else all of it.

    ``edge`` (rows, h, p, n) is the state with which sequences begin (zeros if None), ``far_edge`` takes those behind.
    """
    segment = tl.program_id(1)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, chunks)
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if LOCAL:
        # The only sequence that matters is the one that goes on behind the segment, if one does.
        if REVERSE:
            row, first, last, start, stop = _locate(table, begin, length, CHUNK)
            goes_on = first < begin
            chunk = tl.minimum(end - 1, last)
            count = chunk - begin + 1
            fresh = chunk == last
        else:
            row, first, last, start, stop = _locate(table, end - 1, length, CHUNK)
            goes_on = last >= end
            chunk = tl.maximum(begin, first)
            count = end - chunk
            fresh = chunk == first
        if goes_on:
            if edge is not None:
                if fresh:
                    state = tl.load(edge + (row * heads + head).to(tl.int64) * SIZE + tile)
            total = tl.full([], 0.0, tl.float32)
            state, total = _run(
                state, total, left, left_token, right, right_token, None, 0, None, 0, decays, sources, writes,
                heads, None, 0, chunk, count, first, start, stop, tile, at_p, at_n, CHUNK, DOT, PRECISION, REVERSE,
            )  # fmt: skip
            tl.store(local + (segment * heads + head).to(tl.int64) * SIZE + tile, state)
            tl.store(decay + segment * heads + head, tl.where(fresh, 0.0, tl.exp2(total)))
    else:
        chunk = end - 1 if REVERSE else begin
        row, first, last, start, stop = _locate(table, chunk, length, CHUNK)
        # The state entering the segment: what those before it left, for as far as the sequence reaches back.
        factor = tl.where(chunk == last if REVERSE else chunk == first, 0.0, 1.0)
        other = segment + 1 if REVERSE else segment - 1
        while (factor > 0) & (other >= 0) & (other < segments):
            state += factor * tl.load(local + (other * heads + head).to(tl.int64) * SIZE + tile)
            factor *= tl.load(decay + other * heads + head)
            other = other + 1 if REVERSE else other - 1
        remaining = end - begin
        while remaining > 0:
            row, first, last, start, stop = _locate(table, chunk, length, CHUNK)
            here = (row * heads + head).to(tl.int64) * SIZE + tile
            if REVERSE:
                count = chunk - tl.maximum(first, begin) + 1
                fresh = chunk == last
                done = chunk - count + 1 == first
            else:
                count = tl.minimum(last, end - 1) - chunk + 1
                fresh = chunk == first
                done = chunk + count - 1 == last
            if fresh:
                if edge is not None:
                    state = tl.load(edge + here)
                else:
                    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
            filled = tl.where(stop > start, count, 0)  # an empty sequence's chunk has nothing to be read
            state, _ = _run(
                state, factor, left, left_token, right, right_token, query, query_token, y, y_token, decays, sources,
                writes, heads, kept, heads * SIZE, chunk, filled, first, start, stop, tile, at_p, at_n,
                CHUNK, DOT, PRECISION, REVERSE,
            )  # fmt: skip
            if far_edge is not None:
                if done:
                    tl.store(far_edge + here, state)
            chunk = chunk - count if REVERSE else chunk + count
            remaining -= count


@triton.jit(do_not_specialize=["length", "chunks", "per_segment", "segments"])
def _scan_kernel(
    x, x_token, x_head, B, B_token, B_head, C, C_token, C_head, decays, sources, writes, dy, dy_token, dy_head,
    y, initial, final, d_final, d_initial, local, decay, kept, table, length, chunks, per_segment, segments,
    heads, ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Programs (head × tile of the state, segment, direction): states forward, and their gradients from the end."""
    tiles: tl.constexpr = (P // BLOCK_P) * (N // BLOCK_N)
    head = tl.program_id(0) // tiles
    at_p = (tl.program_id(0) % tiles) // (N // BLOCK_N) * BLOCK_P + tl.arange(0, BLOCK_P)
    at_n = (tl.program_id(0) % tiles) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = at_p[:, None] * N + at_n[None, :]
    group = head // ratio
    if kept is not None:
        kept += head * P * N
    x += group * x_head
    B += group * B_head
    C += head * C_head
    decays += head * CHUNK
    if sources is not None:
        sources += head * CHUNK
    writes += head * CHUNK
    if tl.program_id(2) == 0:
        _sweep(
            x, x_token, B, B_token, C, C_token, None if y is None else y + head * P, heads * P, decays, sources, writes,
            initial, final, local, decay, kept,
            table, length, chunks, per_segment, segments, head, heads, tile, at_p, at_n, P * N,
            CHUNK, BLOCK_P, BLOCK_N, DOT, PRECISION, False, LOCAL,
        )  # fmt: skip
    elif dy is not None:
        _sweep(
            dy + head * dy_head, dy_token, C, C_token, None, 0, None, 0, decays, None, writes,
            d_final, d_initial, local + segments.to(tl.int64) * heads * P * N, decay + segments * heads,
            None if kept is None else kept + chunks.to(tl.int64) * heads * P * N,
            table, length, chunks, per_segment, segments, head, heads, tile, at_p, at_n, P * N,
            CHUNK, BLOCK_P, BLOCK_N, DOT, PRECISION, True, LOCAL,
        )  # fmt: skip


@triton.jit
def _rows_of(tensor, token, stride, inside, at, valid):
    """The (q, width) inputs of a chunk's tokens, zeros behind its end."""
    return tl.load(tensor + token * stride + (inside[:, None] * stride + at[None, :]), mask=valid[:, None], other=0.0)


@triton.jit(do_not_specialize=["length", "chunks"])
def _reads_kernel(
    x, x_token, x_head, B, B_token, B_head, C, C_token, C_head, steps, decays, A, dy, dy_token, dy_head,
    kept, ddt, dA, dC, table, length, chunks, heads, ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × head): dC and the gradients of the steps, with each step's part of dA."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    group = head // ratio
    _row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    if stop == start:
        tl.store(dA + chunk.to(tl.int64) * heads + head, 0.0)
        return
    inside = tl.arange(0, CHUNK)
    rows, columns = inside[:, None], inside[None, :]
    token = start + (chunk - first) * CHUNK
    valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
    at_p = tl.arange(0, P)
    here = chunk.to(tl.int64) * heads + head
    step = tl.load(steps + here * CHUNK + inside)
    decay = tl.load(decays + here * CHUNK + inside)
    whole = tl.load(decays + here * CHUNK + CHUNK - 1)
    dys = _rows_of(dy + head * dy_head, token, dy_token, inside, at_p, valid).to(DOT)
    xs = _rows_of(x + group * x_head, token, x_token, inside, at_p, valid).to(DOT)
    kept += here * P * N
    B += group * B_head
    C += head * C_head
    dC += head * N

    # What a read i takes from the write j <= i, and what a step's writes give to the state that leaves the chunk.
    reach = tl.dot(dys, tl.trans(xs), input_precision=PRECISION)  # dy_i . x_j
    reach *= tl.exp2(tl.where(rows >= columns, decay[:, None] - decay[None, :], float("-inf")))
    weighted = (reach * step[None, :]).to(DOT)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)  # C_i . B_j
    d_read = tl.zeros([CHUNK], tl.float32)
    d_write = tl.zeros([CHUNK], tl.float32)
    through = tl.zeros([P], tl.float32)
    for part in range(0, N, BLOCK_N):
        at_n = part + tl.arange(0, BLOCK_N)
        at = at_p[:, None] * N + at_n[None, :]
        Cs = _rows_of(C, token, C_token, inside, at_n, valid).to(DOT)
        Bs = _rows_of(B, token, B_token, inside, at_n, valid).to(DOT)
        state = tl.load(kept + at).to(DOT)
        leaving = tl.load(kept + chunks.to(tl.int64) * heads * P * N + at).to(DOT)
        scores = tl.dot(Cs, tl.trans(Bs), scores, input_precision=PRECISION)
        dCs = tl.dot(dys, state, input_precision=PRECISION) * tl.exp2(decay)[:, None]
        d_read += tl.sum(dCs * Cs.to(tl.float32), 1)
        dCs = tl.dot(weighted, Bs, dCs, input_precision=PRECISION)
        tl.store(dC + token * heads * N + (rows * (heads * N) + at_n[None, :]), dCs, mask=valid[:, None])
        written = tl.dot(xs, leaving, input_precision=PRECISION)
        d_write += tl.sum(written * Bs.to(tl.float32), 1)
        through += tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1)
    d_write *= tl.exp2(whole - decay)
    share = reach * scores
    d_step = tl.sum(share + tl.where(rows == columns, d_write[:, None], 0.0), 0)

    # A step's log decay touches the pairs around it, the reads behind it, the writes before it, and what passes through
    # the whole chunk. Column k of ``before`` sums each read's share over the writes before k: a product with ones, its
    # operand in two parts where one would lose digits.
    share *= step[None, :]
    ones = tl.where(rows < columns, 1.0, 0.0).to(DOT)
    high = share.to(DOT)
    if DOT == tl.float32:
        before = tl.dot(high, ones, input_precision="tf32x3")
    else:
        before = tl.dot((share - high.to(tl.float32)).to(DOT), ones)
        before = tl.dot(high, ones, before)
    crossing = tl.where(rows >= columns, before + d_read[:, None], (d_write * step)[:, None])
    d_decay = tl.sum(crossing, 0) + tl.exp2(whole) * tl.sum(through, 0)
    tl.store(ddt + token * heads + head + inside * heads, d_step + tl.load(A + head) * d_decay, mask=valid)
    tl.store(dA + here, tl.sum(d_decay * step, 0))


@triton.jit
def _writes(
    left, left_token, query, query_token, query_head, value, value_token, value_head, steps, decays, leaving, size,
    out, out_token, ratio, token, valid, inside, at, at_out, tile,
    CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """dx (left B, value dy) or dB (left x, value C) of a chunk, (q, at_out): the sum over the heads of a group."""
    rows, columns = inside[:, None], inside[None, :]
    ls = _rows_of(left, token, left_token, inside, at, valid).to(DOT)
    total = tl.zeros([CHUNK, at_out.shape[0]], tl.float32)
    for k in range(ratio):
        step = tl.load(steps + k * CHUNK + inside)
        decay = tl.load(decays + k * CHUNK + inside)
        whole = tl.load(decays + k * CHUNK + CHUNK - 1)
        qs = _rows_of(query + k * query_head, token, query_token, inside, at, valid).to(DOT)
        vs = _rows_of(value + k * value_head, token, value_token, inside, at_out, valid).to(DOT)
        gradient = tl.load(leaving + k * size + tile).to(DOT)
        if TRANSPOSED:
            gradient = tl.trans(gradient)
        scores = tl.dot(ls, tl.trans(qs), input_precision=PRECISION)  # (j, i)
        scores *= tl.exp2(tl.where(rows <= columns, decay[None, :] - decay[:, None], float("-inf")))
        here = tl.dot(ls, gradient, input_precision=PRECISION) * tl.exp2(whole - decay)[:, None]
        here = tl.dot(scores.to(DOT), vs, here, input_precision=PRECISION)
        total += here * step[:, None]
    tl.store(out + token * out_token + (rows * out_token + at_out[None, :]), total, mask=valid[:, None])


@triton.jit(do_not_specialize=["length", "chunks"])
def _writes_kernel(
    x, x_token, x_head, B, B_token, B_head, C, C_token, C_head, steps, decays, dy, dy_token, dy_head,
    kept, dx, dB, table, length, chunks, heads, groups, ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × group × which): dx or dB of a chunk's tokens, a group's heads one after another."""
    group, chunk = tl.program_id(0) // 2 % groups, tl.program_id(0) // 2 // groups
    _row, first, _last, start, stop = _locate(table, chunk, length, CHUNK)
    if stop == start:
        return
    inside = tl.arange(0, CHUNK)
    token = start + (chunk - first) * CHUNK
    valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
    at_p, at_n = tl.arange(0, P), tl.arange(0, N)
    tile = at_p[:, None] * N + at_n[None, :]
    here = chunk.to(tl.int64) * heads + group * ratio
    leaving = kept + (chunks.to(tl.int64) * heads + here) * P * N
    steps += here * CHUNK
    decays += here * CHUNK
    x += group * x_head
    B += group * B_head
    C += group * ratio * C_head
    dy += group * ratio * dy_head
    if tl.program_id(0) % 2 == 0:
        _writes(
            B, B_token, C, C_token, C_head, dy, dy_token, dy_head, steps, decays, leaving, P * N,
            dx + group * P, groups * P, ratio, token, valid, inside, at_n, at_p, tile, CHUNK, DOT, PRECISION, True,
        )  # fmt: skip
    else:
        _writes(
            x, x_token, dy, dy_token, dy_head, C, C_token, C_head, steps, decays, leaving, P * N,
            dB + group * N, groups * N, ratio, token, valid, inside, at_p, at_n, tile, CHUNK, DOT, PRECISION, False,
        )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """``t`` (b, l, …) such that its tokens are evenly spaced over batch and length and its last dimension is dense."""
    even = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    return t if even and t.stride(-1) == 1 else t.contiguous()


def _dot(x: Tensor, B: Tensor, C: Tensor) -> tuple[tl.dtype, str, torch.dtype]:
    """The products' operand type and precision for these inputs, and the type in which chunk states are stored."""
    dtypes = {x.dtype, B.dtype, C.dtype}
    if dtypes == {torch.bfloat16}:
        # Triton's interpreter cannot multiply bfloat16; float32 holds the operands exactly.
        return tl.float32 if interpreted() else tl.bfloat16, "ieee", torch.bfloat16
    return tl.float32, "tf32x3" if torch.float32 in dtypes else "tf32", torch.float32


def _parts(size: int, part: int) -> int:
    return -(-size // part)


class _Shape:
    """The sizes that the launches of one call share."""

    def __init__(self, x: Tensor, C: Tensor, table: Tensor | None, chunk: int, segments: int) -> None:
        self.b, self.length, self.g, self.p = x.shape
        self.h, self.n = C.shape[2:]
        self.chunks = self.b * max(_parts(self.length, chunk), 1) if table is None else table.shape[0]
        self.per_segment = max(_parts(self.chunks, segments), 1)
        self.segments = _parts(self.chunks, self.per_segment)

    def tiles(self, tiles: Tiles) -> tuple[int, int]:
        return min(tiles.p, self.p), min(tiles.n, self.n)


def _tuning(x: Tensor, B: Tensor, C: Tensor) -> Tuning:
    return TUNED[max(x.shape[3], C.shape[3]), _dot(x, B, C)[2].itemsize]


def _decays(
    shape: _Shape, dt: Tensor, A: Tensor, table: Tensor | None, chunk: int, *, backward: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What all launches read of each chunk's steps, (c, h, q) float32: decays, steps, sources and writes."""
    decays, other, writes = dt.new_empty(3, shape.chunks, shape.h, chunk).unbind()
    steps, sources = (other, None) if backward else (None, other)
    block = min(1 << (shape.h - 1).bit_length(), 16)
    with on_device(dt):
        _decays_kernel[(shape.chunks, _parts(shape.h, block))](
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
    dot, precision, _ = _dot(x, B, C)
    grid = (shape.h * (shape.p // block_p) * (shape.n // block_n), shape.segments, 1 if dy is None else 2)
    with on_device(x):
        _scan_kernel[grid](
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
    x, dt, B, C, A = _rows(x), _rows(dt), _rows(B), _rows(C), A.contiguous()
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
def _ssd_fake(x, dt, A, B, C, initial_state, table, final_rows, chunk, segments):
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
    x, dt, B, C, dy, A = _rows(x), _rows(dt), _rows(B), _rows(C), _rows(dy), A.contiguous()
    shape, tuning = _Shape(x, C, table, chunk, segments), _tuning(x, B, C)
    dot, precision, stored = _dot(x, B, C)
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
        _reads_kernel[(shape.chunks * shape.h,)](
            *sources, A, *seed, kept, ddt, dA, dC, table, shape.length, shape.chunks, shape.h, ratio,
            BLOCK_N=shape.tiles(tuning.reads)[1],
            num_warps=tuning.reads.warps, num_stages=tuning.reads.stages, **options,
        )  # fmt: skip
        _writes_kernel[(shape.chunks * shape.g * 2,)](
            *sources, *seed, kept, dx, dB, table, shape.length, shape.chunks, shape.h, shape.g, ratio,
            num_warps=tuning.writes.warps, num_stages=tuning.writes.stages, **options,
        )  # fmt: skip
    return dx, ddt, dA.sum(0), dB, dC, d_initial


@_ssd_backward.register_fake
def _ssd_backward_fake(x, dt, A, B, C, initial_state, table, dy, d_final, chunk, segments):
    inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)]
    if initial_state is None:
        return *inputs, x.new_empty(0, dtype=torch.float32)
    return *inputs, torch.empty_like(initial_state, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    x, dt, A, B, C, initial_state, table, ctx.final_rows, ctx.chunk, ctx.segments = inputs
    ctx.save_for_backward(x, dt, A, B, C, initial_state, table)


def _differentiate(ctx, dy, d_final):
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
    """The recurrence over whole sequences; arguments, shapes and results as in :func:`mmmamba.ops.ssd.ssd`.

    Args:
        chunk: tokens a chunk, a power of two from 16; segments: parts of the row that are walked through at the same
            time. Both as tuned when absent.

    Raises:
        ValueError: for shapes that do not fit together, or that :func:`~mmmamba.ops.triton.why_not` names.
    """
    layout = None if cu_seqlens is None else layout_for(x, cu_seqlens)
    rows = x.shape[0] if layout is None else layout.sequences
    _check(x, dt, A, B, C, initial_state, rows)
    reason = why_not(x, dt, A, B, C, initial_state, head_dim=x.shape[3], state_dim=C.shape[3])
    if reason is not None:
        raise ValueError(f"ssd: {reason}")
    tuning = _tuning(x, B, C)
    chunk = chunk or tuning.chunk
    segments = segments or max(tuning.programs // (C.shape[2] * _parts(x.shape[3], tuning.output.p)), 1)
    table = None if layout is None else layout.cuts(chunk)
    state = None if initial_state is None else initial_state.float()
    y, final = _ssd(
        x, dt.float(), A.float(), B, C, state, table, rows if return_final_state else 0, chunk, segments
    )  # fmt: skip
    return y, final if return_final_state else None
