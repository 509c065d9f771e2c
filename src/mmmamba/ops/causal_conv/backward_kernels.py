"""The backward kernel of the convolution: runs of tokens × channels a program, the last programs for the states."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from mmmamba.ops.causal_conv.forward_kernels import border_of, preactivation, sequence_of, tile_angles, tile_channels


@triton.jit
def _partners(channel, HALF: tl.constexpr):
    """Of each channel: the other of its pair, and the sign of the sine with which that one is turned back into it."""
    second = channel // HALF % 2
    return channel + HALF * (1 - 2 * second), (1 - 2 * second)[None, :]


@triton.jit
def _slope(z):
    """SiLU's derivative."""
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def _starts(first, last, token, cu_seqlens, length, steps, rows):
    """A word for each of ``token``, whose bit i says that a sequence starts i tokens on.

    Only a tile's ``first`` and ``last`` token are searched for: the borders between are walked through. Nothing in
    front of ``first`` is taken in, so that a border just there needs no bit.
    """
    bits = token * 0
    before = sequence_of(first, cu_seqlens, length, steps, rows)
    for sequence in range(before + 1, sequence_of(last, cu_seqlens, length, steps, rows) + 1):
        place = (border_of(sequence, cu_seqlens, length) - token).to(tl.int32)
        bits |= tl.where((place >= 0) & (place < 31), 1 << (place & 31), 0)
    return bits


@no_type_check  # a tuple that grows
@triton.jit
def _read(dy, x, cos, sin, at, there, channel, real, C, stride, rotate_from, HALF: tl.constexpr):
    """What one token of each run brings, as it lies in memory: x, dy, and with a rotation its partner and angle."""
    mask = there[:, None] & real[None, :]
    own = channel[None, :]
    values = (tl.load(x + at[:, None] * stride + own, mask=mask, other=0.0),)
    values += (tl.load(dy + at[:, None] * C + own, mask=mask, other=0.0),)
    if HALF:
        partner, _ = _partners(channel, HALF)
        turned = mask & (channel >= rotate_from)[None, :]
        angle = at[:, None] * HALF + (channel % HALF)[None, :]
        values += (tl.load(dy + at[:, None] * C + partner[None, :], mask=turned, other=0.0),)
        values += (tl.load(cos + angle, mask=turned, other=1.0), tl.load(sin + angle, mask=turned, other=0.0))
    return values


@no_type_check  # a tuple that grows
@triton.jit
def _backward_runs(
    program, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, channel, real, total, length, rows,
    steps, C, stride, rotate_from, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients to the inputs of RUNS · RUN tokens, and these tokens' share of those to weight and bias.

    Each row of the tile walks along a run of tokens and keeps the inputs just before it and their unfinished gradients.
    So an input is read, and the gradient before the activation computed, only once. The K - 1 tokens after a
    run are visited to complete its gradients; for the weights they count in the run they belong to.
    """
    origin = program * (RUNS * RUN)
    run = tl.arange(0, RUNS) * RUN
    first = origin - (K - 1)
    last = tl.minimum(origin + RUNS * RUN + K - 2, total - 1)
    borders = _starts(tl.maximum(first, 0), last, first + run, cu_seqlens, length, steps, rows)[:, None]
    # One wide offset for the tile: within it offsets are narrow.
    x += origin.to(tl.int64) * stride
    dy += origin.to(tl.int64) * C
    dx += origin.to(tl.int64) * C
    if HALF:
        cos += origin.to(tl.int64) * HALF
        sin += origin.to(tl.int64) * HALF
        _, sign = _partners(channel, HALF)

    # By how far back they reach: the weights, the inputs, the unfinished gradients, the sums for the weights.
    zero = tl.zeros((RUNS, channel.shape[0]), dtype=WIDE)
    weights, past, unfinished, sums = (), (), (), ()
    for back in tl.static_range(K):
        weights += (tl.load(weight + channel * K + (K - 1 - back), mask=real, other=0.0).to(WIDE)[None, :],)
        unfinished += (zero,)
        sums += (zero,)
    for back in tl.static_range(1, K):
        known = ((origin + run >= back) & (origin + run - back < total))[:, None] & real[None, :]
        past += (tl.load(x + (run - back)[:, None] * stride + channel[None, :], mask=known, other=0.0).to(WIDE),)
    dbias = zero
    shift = zero
    if bias is not None:
        shift += tl.load(bias + channel, mask=real, other=0.0).to(WIDE)[None, :]

    there = origin + run < total
    ahead = _read(dy, x, cos, sin, run, there, channel, real, C, stride, rotate_from, HALF)
    for step in range(RUN + K - 1):
        token = origin + run + step
        mask = (token < total)[:, None] & real[None, :]
        here = ahead[0].to(WIDE)
        dz = ahead[1].to(WIDE)
        if HALF:
            dz = dz * ahead[3].to(WIDE) + ahead[2].to(WIDE) * (ahead[4].to(WIDE) * sign)
        # The next token is on its way while this one is worked on.
        there = (token + 1 < total) & (step + 1 < RUN + K - 1)
        ahead = _read(dy, x, cos, sin, run + step + 1, there, channel, real, C, stride, rotate_from, HALF)

        # Whether the token so far back is of the same sequence: no border has been crossed since.
        crossed = (borders >> step) & ((1 << K) - 1)
        seen = (here,)
        z = here * weights[0]
        for back in tl.static_range(1, K):
            value = tl.where(crossed < (1 << (K - back)), past[back - 1], 0.0)
            if state is not None:
                sequence = sequence_of(tl.minimum(token, total - 1), cu_seqlens, length, steps, rows).to(tl.int64)
                slot = token - back - border_of(sequence, cu_seqlens, length) + (K - 1)
                held = mask & ((slot >= 0) & (slot < K - 1))[:, None]
                kept = (sequence * (K - 1) + slot)[:, None] * C + channel[None, :]
                value += tl.load(state + kept, mask=held, other=0.0).to(WIDE)
            z += value * weights[back]
            seen += (value,)
        if SILU:
            dz *= _slope(z + shift)
        if step < RUN:
            grown = ()
            for back in tl.static_range(K):
                grown += (sums[back] + dz * seen[back],)
            sums = grown
            if bias is not None:
                dbias += dz

        moved = (dz * weights[0],)
        shifted = (here,)
        for back in tl.static_range(1, K):
            share = tl.where(crossed < (1 << (K - back)), dz, 0.0) * weights[back]
            moved += (unfinished[back - 1] + share,)
            if back < K - 1:
                shifted += (past[back - 1],)
        unfinished = moved
        past = shifted
        d = moved[K - 1]  # of the token K - 1 back, which is complete
        token -= K - 1
        mask = ((token < total) & (step >= K - 1))[:, None] & real[None, :]
        if dfinal is not None:
            inside = tl.maximum(tl.minimum(token, total - 1), 0)
            sequence = sequence_of(inside, cu_seqlens, length, steps, rows).to(tl.int64)
            slot = token - border_of(sequence + 1, cu_seqlens, length) + (K - 1)
            kept = (sequence * (K - 1) + slot)[:, None] * C + channel[None, :]
            d += tl.load(dfinal + kept, mask=mask & (slot >= 0)[:, None], other=0.0).to(WIDE)
        tl.store(dx + (run + step - (K - 1))[:, None] * C + channel[None, :], d, mask=mask)

    row = partial + program.to(tl.int64) * (K if bias is None else K + 1) * C + channel
    for back in tl.static_range(K):
        tl.store(row + (K - 1 - back) * C, tl.sum(sums[back], axis=0), mask=real)
    if bias is not None:
        tl.store(row + K * C, tl.sum(dbias, axis=0), mask=real)


@triton.jit
def _gradient_before(
    dy, x, weight, bias, state, cos, sin, token, sequence, start, end, channel, real, mask, C, stride, rotate_from,
    SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient to the convolution before its activation at ``token``; zero after a sequence's end."""
    mask = mask & (token < end)[:, None]
    at = token[:, None] * C
    d = tl.load(dy + at + channel[None, :], mask=mask, other=0.0).to(WIDE)
    if HALF:
        partner, sign = _partners(channel, HALF)
        c, s = tile_angles(cos, sin, token, channel, mask, rotate_from, HALF, WIDE)
        d = d * c + tl.load(dy + at + partner[None, :], mask=mask, other=0.0).to(WIDE) * (s * sign)
    if SILU:
        d *= _slope(
            preactivation(x, 0, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K, WIDE)
        )
    return d


@triton.jit
def _backward_states(
    program, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dstate, channel, real, length, rows, C, stride,
    rotate_from, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients to the initial states of some sequences."""
    sequence = program.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    mask = (sequence < rows)[:, None] & real[None, :]
    sequence = tl.minimum(sequence, rows - 1)
    start = border_of(sequence, cu_seqlens, length)
    end = border_of(sequence + 1, cu_seqlens, length)
    for slot in tl.static_range(K - 1):
        d = tl.zeros((SEQUENCES, channel.shape[0]), dtype=WIDE)
        for after in tl.static_range(slot + 1):  # the tokens after the start that see this slot
            token = (start + after).to(tl.int64)
            dz = _gradient_before(
                dy, x, weight, bias, state, cos, sin, token, sequence, start, end, channel, real, mask, C, stride,
                rotate_from, SILU, HALF, K, WIDE,
            )  # fmt: skip
            d += dz * tl.load(weight + channel * K + (slot - after), mask=real, other=0.0).to(WIDE)[None, :]
        if dfinal is not None:  # what a sequence shorter than the state hands through
            kept = slot - (end - start)
            at = (sequence * (K - 1) + kept)[:, None] * C + channel[None, :]
            d += tl.load(dfinal + at, mask=mask & (kept >= 0)[:, None], other=0.0).to(WIDE)
        tl.store(dstate + (sequence * (K - 1) + slot)[:, None] * C + channel[None, :], d, mask=mask)


@triton.jit
def backward_kernel(
    dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, dstate, total, length, rows, steps, C,
    stride, rotate_from, blocks, columns, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, CHANNELS: tl.constexpr, SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # The columns of a tile of tokens run side by side: together they read whole rows.
    program = tl.program_id(0) // columns
    channel, real = tile_channels(tl.program_id(0) % columns, C, 0, CHANNELS)
    if program < blocks:
        _backward_runs(
            program, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, channel, real, total,
            length, rows, steps, C, stride, rotate_from, SILU, HALF, K, RUNS, RUN, WIDE,
        )  # fmt: skip
    else:
        _backward_states(
            program - blocks, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dstate, channel, real, length,
            rows, C, stride, rotate_from, SILU, HALF, K, SEQUENCES, WIDE,
        )  # fmt: skip
