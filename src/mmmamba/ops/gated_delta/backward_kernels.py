"""Kernels of the backward pass: the walks from the end of a sequence, and the gradients of every chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from mmmamba.ops.chunk_kernels import load_rows, locate
from mmmamba.ops.gated_delta.forward_kernels import locate_segment


@triton.jit(do_not_specialize=["length", "per"])
def leaving_kernel(
    k, k_token, k_head, q, q_token, q_head, beta, beta_token, beta_head, decays, inverses, dy, dy_token, dy_head,
    d_final, d_initial, kept, d_wants, added, table, begins, length, heads, ratio, per,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """As :func:`states_kernel`, from the end: the gradient of the state after each chunk to ``kept``, and dW.

    LOCAL: for the segments that follow others of their sequence, what the gradient becomes of nothing to ``added``.
    """
    tiles: tl.constexpr = P // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk, index, row, start, stop, whole_count = locate_segment(
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
        ks = load_rows(k, token, k_token, inside, at_n, valid).to(DOT)
        qs = load_rows(q, token, q_token, inside, at_n, valid).to(DOT)
        dys = load_rows(dy, token, dy_token, inside, at_p, valid)
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


@triton.jit(do_not_specialize=["length", "chunks"])
def gradients_kernel(
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
    _row, first, _last, start, stop = locate(table, chunk, length, CHUNK)
    if stop == start:
        for i in range(TOGETHER):
            tl.store(dA + chunk.to(tl.int64) * heads + owner * TOGETHER + i, 0.0)
        return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    rows, columns = inside[:, None], inside[None, :]
    token = start + (chunk - first) * CHUNK
    valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
    group = owner * TOGETHER // ratio
    ks = load_rows(k + group * k_head, token, k_token, inside, at_n, valid).to(DOT)
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
            dys = load_rows(dy + head * dy_head, token, dy_token, inside, at_p, valid)
            vs = load_rows(v, token, v_token, inside, at_p, valid)
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
        qs = load_rows(q + head * q_head, token, q_token, inside, at_n, valid).to(DOT)
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
