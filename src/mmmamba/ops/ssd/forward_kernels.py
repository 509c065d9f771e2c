"""Kernels that walk through the chunks of sequences, with the state or its gradient in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from mmmamba.ops.chunk_kernels import LOG2_E, locate


@triton.jit(do_not_specialize=["length"])
def decays_kernel(
    dt, dt_token, dt_head, A, decays, steps, sources, writes, table, length, heads,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Programs (chunk, tile of heads), all (c, h, q): inclusive log2 decays a_i, and what is wanted of the others.

    Those are the steps dt_j, ``sources`` a_j - log2 dt_j, ``writes`` exp2(a_q - a_j) dt_j. There is no step after
    a sequence's end.
    """
    chunk = tl.program_id(0)
    _row, first, _last, start, stop = locate(table, chunk, length, CHUNK)
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
    """``count`` chunks of one sequence from ``chunk`` on: the state after them, and ``total`` plus their log2 decay.

    A tile (p, n) of state' = decay · state + (weight · left)^T right, forward (x, B) or from the end (dy, C). What it
    was before each chunk goes to ``kept``, the output of the recurrence to ``y``, each unless None.

    The products' left operands that are computed here (scores, weighted inputs) stay in registers, and all loaded
    ones are multiplied as they lie in shared memory: only the state, in 2 bytes, is written there.
    """
    inside = tl.arange(0, CHUNK)
    columns = inside[None, :]
    upcoming = tl.load(decays + chunk.to(tl.int64) * heads * CHUNK + CHUNK - 1)
    for k in range(count):
        now = chunk - k if REVERSE else chunk + k
        token = start + (now - first) * CHUNK  # scalar and wide; offsets inside a chunk are narrow
        valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
        # After the sequence's end the last token is read again, with weights of 0: loads without masks are cheaper.
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
    """One segment of one head. LOCAL: what it adds and how it decays, for the segments after it; else all of it.

    ``edge`` (rows, h, p, n) is the state with which sequences begin (zeros if None), ``far_edge`` takes those after.
    """
    segment = tl.program_id(1)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, chunks)
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if LOCAL:
        # The only sequence that matters is the one that goes on after the segment, if one does.
        if REVERSE:
            row, first, last, start, stop = locate(table, begin, length, CHUNK)
            goes_on = first < begin
            chunk = tl.minimum(end - 1, last)
            count = chunk - begin + 1
            fresh = chunk == last
        else:
            row, first, last, start, stop = locate(table, end - 1, length, CHUNK)
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
        row, first, last, start, stop = locate(table, chunk, length, CHUNK)
        # The state entering the segment: what those before it left, for as far as the sequence reaches back.
        factor = tl.where(chunk == last if REVERSE else chunk == first, 0.0, 1.0)
        other = segment + 1 if REVERSE else segment - 1
        while (factor > 0) & (other >= 0) & (other < segments):
            state += factor * tl.load(local + (other * heads + head).to(tl.int64) * SIZE + tile)
            factor *= tl.load(decay + other * heads + head)
            other = other + 1 if REVERSE else other - 1
        remaining = end - begin
        while remaining > 0:
            row, first, last, start, stop = locate(table, chunk, length, CHUNK)
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
def scan_kernel(
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
