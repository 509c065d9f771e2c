"""Kernels of the gradients of each chunk, from the states and their gradients that :mod:`.forward_kernels` keeps."""

from __future__ import annotations

import triton
import triton.language as tl

from mmmamba.ops.chunk_kernels import load_rows, locate


@triton.jit(do_not_specialize=["length", "chunks"])
def reads_kernel(
    x, x_token, x_head, B, B_token, B_head, C, C_token, C_head, steps, decays, A, dy, dy_token, dy_head,
    kept, ddt, dA, dC, table, length, chunks, heads, ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × head): dC and the gradients of the steps, with each step's part of dA."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    group = head // ratio
    _row, first, _last, start, stop = locate(table, chunk, length, CHUNK)
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
    dys = load_rows(dy + head * dy_head, token, dy_token, inside, at_p, valid).to(DOT)
    xs = load_rows(x + group * x_head, token, x_token, inside, at_p, valid).to(DOT)
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
        Cs = load_rows(C, token, C_token, inside, at_n, valid).to(DOT)
        Bs = load_rows(B, token, B_token, inside, at_n, valid).to(DOT)
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

    # A step's log decay touches the pairs around it, the reads after it, the writes before it, and what passes through
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
    ls = load_rows(left, token, left_token, inside, at, valid).to(DOT)
    total = tl.zeros([CHUNK, at_out.shape[0]], tl.float32)
    for k in range(ratio):
        step = tl.load(steps + k * CHUNK + inside)
        decay = tl.load(decays + k * CHUNK + inside)
        whole = tl.load(decays + k * CHUNK + CHUNK - 1)
        qs = load_rows(query + k * query_head, token, query_token, inside, at, valid).to(DOT)
        vs = load_rows(value + k * value_head, token, value_token, inside, at_out, valid).to(DOT)
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
def writes_kernel(
    x, x_token, x_head, B, B_token, B_head, C, C_token, C_head, steps, decays, dy, dy_token, dy_head,
    kept, dx, dB, table, length, chunks, heads, groups, ratio,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × group × which): dx or dB of a chunk's tokens, a group's heads one after another."""
    group, chunk = tl.program_id(0) // 2 % groups, tl.program_id(0) // 2 // groups
    _row, first, _last, start, stop = locate(table, chunk, length, CHUNK)
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
