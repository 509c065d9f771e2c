"""The depthwise causal convolution as one Triton kernel each way; the twin is ``mmmamba.ops.conv.causal_conv``.

Rows are taken flat: token t of b rows of length l belongs to sequence t // l, and in a packed row to the sequence that
a search in ``cu_seqlens`` finds, so nothing about the sequences is ever read back from the device. A program takes a
tile of tokens × channels; the last programs of a launch serve the states instead, a tile of sequences × channels.

With a rotation a forward program takes *pairs* of channels, the first half of a head and the second: see
:func:`_channels`. Backward a channel needs no more of its partner than the gradient that arrives there, and reads it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.triton import on_device, operator
from mmmamba.ops.triton.norm import sum_partial

TOKENS, CHANNELS, WARPS = 32, 64, 4  # forward tile
RUNS, RUN, BACKWARD_CHANNELS = 8, 16, 128  # backward tile: runs of tokens, and the tokens of a run
SEQUENCES = 16  # sequences of a tile of states


@triton.jit
def _channels(block, C, HALF: tl.constexpr, CHANNELS: tl.constexpr):
    """First channel of each pair of a tile, and whether it exists; without a rotation (HALF 0) simply the channels."""
    index = block * CHANNELS + tl.arange(0, CHANNELS)
    if HALF:
        first = index // HALF * (2 * HALF) + index % HALF
        real = index < C // 2
    else:
        first = index
        real = index < C
    return first, real


@triton.jit
def _sequence(token, cu_seqlens, length, steps, rows):
    """The sequence of a token."""
    if cu_seqlens is None:
        sequence = token // length
    else:
        sequence = token * 0  # the last border at or below the token lies in [sequence, high)
        high = sequence + rows
        for _ in range(steps):
            middle = (sequence + high) // 2
            below = tl.load(cu_seqlens + middle) <= token
            sequence = tl.where(below, middle, sequence)
            high = tl.where(below, high, middle)
    return sequence


@triton.jit
def _border(sequence, cu_seqlens, length):
    """Where a sequence starts; the one before it ends there."""
    if cu_seqlens is None:
        border = sequence * length
    else:
        border = tl.load(cu_seqlens + sequence).to(tl.int32)
    return border


@triton.jit
def _sequences(token, first, last, cu_seqlens, length, steps, rows):
    """Of each token of a tile: its sequence, and where that starts.

    Only the ``first`` and the ``last`` are searched for: the borders between are walked through.
    """
    before = _sequence(first, cu_seqlens, length, steps, rows)
    sequence = token * 0 + before
    start = token * 0 + _border(before, cu_seqlens, length)
    for later in range(before + 1, _sequence(last, cu_seqlens, length, steps, rows) + 1):
        border = _border(later, cu_seqlens, length)
        sequence = tl.where(token < border, sequence, later)
        start = tl.where(token < border, start, border)
    return sequence, start


@triton.jit
def _input(x, origin, state, token, sequence, start, channel, mask, C, stride, K: tl.constexpr, WIDE: tl.constexpr):
    """The inputs at ``token``, with x given from ``origin`` on; in front of a sequence's start its state's, or zero."""
    inside = token >= start
    at = (token - origin)[:, None] * stride + channel[None, :]
    value = tl.load(x + at, mask=mask & inside[:, None], other=0.0).to(WIDE)
    if state is not None:
        slot = sequence.to(tl.int64) * (K - 1) + (K - 1) + token - start
        held = mask & ((token < start) & (token >= start - (K - 1)))[:, None]
        value += tl.load(state + slot[:, None] * C + channel[None, :], mask=held, other=0.0).to(WIDE)
    return value


@triton.jit
def _before(
    x, origin, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The convolution at ``token``, before its activation."""
    z = tl.zeros((token.shape[0], channel.shape[0]), dtype=WIDE)
    for tap in tl.static_range(K):
        w = tl.load(weight + channel * K + tap, mask=real, other=0.0).to(WIDE)
        back = K - 1 - tap
        z += _input(x, origin, state, token - back, sequence, start, channel, mask, C, stride, K, WIDE) * w[None, :]
    if bias is not None:
        z += tl.load(bias + channel, mask=real, other=0.0).to(WIDE)[None, :]
    return z


@triton.jit
def _angles(cos, sin, token, channel, mask, rotate_from, HALF: tl.constexpr, WIDE: tl.constexpr):
    """Cosines and sines of a tile of pairs; channels in front of ``rotate_from`` are turned by nothing."""
    at = token[:, None] * HALF + (channel % HALF)[None, :]
    turned = mask & (channel >= rotate_from)[None, :]
    return tl.load(cos + at, mask=turned, other=1.0).to(WIDE), tl.load(sin + at, mask=turned, other=0.0).to(WIDE)


@triton.jit
def _forward_tile(
    program, x, weight, bias, state, cu_seqlens, cos, sin, y, channel, real, total, length, rows, steps, C, stride,
    rotate_from, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    origin = program * TOKENS
    place = tl.arange(0, TOKENS)
    token = origin + place
    mask = (token < total)[:, None] & real[None, :]
    # Slots behind the end repeat the last token: no table is read out of bounds.
    last = tl.minimum(origin + TOKENS, total) - 1
    sequence, start = _sequences(tl.minimum(token, last), origin, last, cu_seqlens, length, steps, rows)
    # One wide offset for the tile: within it offsets are narrow.
    x += origin.to(tl.int64) * stride
    y += origin.to(tl.int64) * C
    at = place[:, None] * C + channel[None, :]
    first = _before(x, origin, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K, WIDE)
    if SILU:
        first = first * tl.sigmoid(first)
    if HALF:
        other = channel + HALF
        second = _before(x, origin, weight, bias, state, token, sequence, start, other, real, mask, C, stride, K, WIDE)
        if SILU:
            second = second * tl.sigmoid(second)
        cos += origin.to(tl.int64) * HALF
        sin += origin.to(tl.int64) * HALF
        c, s = _angles(cos, sin, place, channel, mask, rotate_from, HALF, WIDE)
        tl.store(y + at, first * c - second * s, mask=mask)
        tl.store(y + at + HALF, second * c + first * s, mask=mask)
    else:
        tl.store(y + at, first, mask=mask)


@triton.jit
def _final_states(
    program, x, state, cu_seqlens, final, channel, real, length, rows, C, stride, HALF: tl.constexpr, K: tl.constexpr,
    SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    sequence = program.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    mask = (sequence < rows)[:, None] & real[None, :]
    sequence = tl.minimum(sequence, rows - 1)
    start = _border(sequence, cu_seqlens, length)
    end = _border(sequence + 1, cu_seqlens, length)
    for slot in tl.static_range(K - 1):
        token = end.to(tl.int64) - (K - 1) + slot
        at = (sequence * (K - 1) + slot)[:, None] * C + channel[None, :]
        kept = _input(x, 0, state, token, sequence, start, channel, mask, C, stride, K, WIDE)
        tl.store(final + at, kept, mask=mask)
        if HALF:
            kept = _input(x, 0, state, token, sequence, start, channel + HALF, mask, C, stride, K, WIDE)
            tl.store(final + at + HALF, kept, mask=mask)


@triton.jit
def _forward_kernel(
    x, weight, bias, state, cu_seqlens, cos, sin, y, final, total, length, rows, steps, C, stride, rotate_from, blocks,
    SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel, real = _channels(tl.program_id(1), C, HALF, CHANNELS)
    if program < blocks:
        _forward_tile(
            program, x, weight, bias, state, cu_seqlens, cos, sin, y, channel, real, total, length, rows, steps, C,
            stride, rotate_from, SILU, HALF, K, TOKENS, WIDE,
        )  # fmt: skip
    else:
        _final_states(
            program - blocks, x, state, cu_seqlens, final, channel, real, length, rows, C, stride, HALF, K, SEQUENCES,
            WIDE,
        )  # fmt: skip


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
    before = _sequence(first, cu_seqlens, length, steps, rows)
    for sequence in range(before + 1, _sequence(last, cu_seqlens, length, steps, rows) + 1):
        place = (_border(sequence, cu_seqlens, length) - token).to(tl.int32)
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

    Each row of the tile walks along a run of tokens with the inputs just behind it and their unfinished gradients in
    hand, so that an input is read, and the gradient before the activation worked out, once. The K - 1 tokens after a
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
                sequence = _sequence(tl.minimum(token, total - 1), cu_seqlens, length, steps, rows).to(tl.int64)
                slot = token - back - _border(sequence, cu_seqlens, length) + (K - 1)
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
            sequence = _sequence(inside, cu_seqlens, length, steps, rows).to(tl.int64)
            slot = token - _border(sequence + 1, cu_seqlens, length) + (K - 1)
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
    """The gradient to the convolution before its activation at ``token``; zero behind a sequence's end."""
    mask = mask & (token < end)[:, None]
    at = token[:, None] * C
    d = tl.load(dy + at + channel[None, :], mask=mask, other=0.0).to(WIDE)
    if HALF:
        partner, sign = _partners(channel, HALF)
        c, s = _angles(cos, sin, token, channel, mask, rotate_from, HALF, WIDE)
        d = d * c + tl.load(dy + at + partner[None, :], mask=mask, other=0.0).to(WIDE) * (s * sign)
    if SILU:
        d *= _slope(_before(x, 0, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K, WIDE))
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
    start = _border(sequence, cu_seqlens, length)
    end = _border(sequence + 1, cu_seqlens, length)
    for slot in tl.static_range(K - 1):
        d = tl.zeros((SEQUENCES, channel.shape[0]), dtype=WIDE)
        for after in tl.static_range(slot + 1):  # the tokens behind the start that see this slot
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
def _backward_kernel(
    dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, dstate, total, length, rows, steps, C,
    stride, rotate_from, blocks, columns, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, CHANNELS: tl.constexpr, SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # The columns of a tile of tokens run side by side: together they read whole rows.
    program = tl.program_id(0) // columns
    channel, real = _channels(tl.program_id(0) % columns, C, 0, CHANNELS)
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


def _flat(x: Tensor) -> Tensor:
    """(b, l, c) → (b·l, c), channels side by side; a slice of a wider projection stays where it is."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _sizes(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, cos: Tensor | None, silu: bool) -> dict[str, Any]:
    """What both kernels' launches share."""
    b, length, c = x.shape
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return {
        "total": b * length,
        "length": length,
        "rows": rows,
        "steps": rows.bit_length(),
        "C": c,
        "SILU": silu,
        "HALF": 0 if cos is None else cos.shape[-1],
        "K": weight.shape[1],
        "SEQUENCES": SEQUENCES,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
    }


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


@operator("causal_conv")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_from: int,
    silu: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    sizes = _sizes(x, weight, cu_seqlens, cos, silu)
    flat = _flat(x)
    weight, bias, state, cu_seqlens, cos, sin = _dense(weight, bias, initial_state, cu_seqlens, cos, sin)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = sizes["rows"] if return_final_state else 0
    final = x.new_empty(rows, sizes["K"] - 1, x.shape[2])
    blocks = triton.cdiv(sizes["total"], TOKENS)
    programs = blocks + triton.cdiv(rows, SEQUENCES)
    if programs:
        columns = triton.cdiv(x.shape[2] // (2 if sizes["HALF"] else 1), CHANNELS)
        with on_device(x):
            _forward_kernel[(programs, columns)](
                flat, weight, bias, state, cu_seqlens, cos, sin, y, final, stride=flat.stride(0), blocks=blocks,
                rotate_from=rotate_from, TOKENS=TOKENS, CHANNELS=CHANNELS, **sizes,
            )  # fmt: skip
    return y, final


@_forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, cos, sin, rotate_from, silu, return_final_state):
    rows = _rows(x, cu_seqlens) if return_final_state else 0
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


@operator("causal_conv_backward")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_from: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(x, weight, cu_seqlens, cos, silu)
    flat, k, c = _flat(x), weight.shape[1], x.shape[2]
    dy, dfinal, weight, bias, state = _dense(dy, dfinal, weight, bias, initial_state)
    cu_seqlens, cos, sin = _dense(cu_seqlens, cos, sin)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = 0 if state is None else sizes["rows"]
    dstate = x.new_empty(rows, k - 1, c, dtype=x.dtype if state is None else state.dtype)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    blocks = triton.cdiv(sizes["total"], RUNS * RUN)
    programs = blocks + triton.cdiv(rows, SEQUENCES)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(blocks, k if bias is None else k + 1, c, dtype=wide)
    columns = triton.cdiv(c, BACKWARD_CHANNELS)
    if programs:
        with on_device(x):
            _backward_kernel[(programs * columns,)](
                dy, dfinal, flat, weight, bias, state, cu_seqlens, cos, sin, dx, partial, dstate,
                stride=flat.stride(0), blocks=blocks, columns=columns, rotate_from=rotate_from, RUNS=RUNS, RUN=RUN,
                CHANNELS=BACKWARD_CHANNELS, **sizes,
            )  # fmt: skip
    sum_partial(partial, dweight, dbias)
    return dx, dweight, x.new_empty(0) if dbias is None else dbias, dstate


@_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, cos, sin, rotate_from, silu):
    c, k = weight.shape
    rows = 0 if initial_state is None else _rows(x, cu_seqlens)
    dstate = x.new_empty(rows, k - 1, c, dtype=x.dtype if initial_state is None else initial_state.dtype)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(c)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.rotate_from, ctx.silu, ctx.final = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(dy, dfinal if ctx.final else None, *tensors, ctx.rotate_from, ctx.silu)
    _, _, bias, state, *_ = tensors
    rest = [None] * 6
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, *rest


_forward.register_autograd(_autograd, setup_context=_setup_context)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "silu",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    rotate_from: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """y_t = rotate(activation(bias + sum_j weight[:, j] · x_{t-(k-1)+j})), every product in float32.

    Args:
        x: (b, l, c).  weight: (c, k) with k from 2 to 4.  bias: (c,) or None.
        activation: ``silu`` or ``none``.
        initial_state: (b, k-1, c), or (s, k-1, c) with ``cu_seqlens``: the inputs that precede; zeros when absent.
        cu_seqlens: (s+1,) borders of the sequences in a packed row (then b = 1), from 0 to l and never falling. They
            stay on the device: nothing checks them.
        return_final_state: also return the last k-1 inputs of each sequence.
        rotation: cosines and sines of each token, (b, l, p/2) or (b, l, 1, p/2), for heads of p channels whose first
            half is paired with the second. They get no gradient.
        rotate_from: the first channel that is rotated (v stands in front of k and q), a multiple of p.

    Returns:
        y (b, l, c) and the final state in x's dtype, or None. Gradients go to x, weight, bias and the initial state;
        two runs give the same bits.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    if activation not in ("silu", "none"):
        raise ValueError(f"conv activation must be 'silu' or 'none', got {activation!r}")
    b, length, c = x.shape
    k = weight.shape[1]
    rows = _rows(x, cu_seqlens)
    if not 2 <= k <= 4 or weight.shape[0] != c:
        raise ValueError(f"conv: weight has shape {tuple(weight.shape)}, expected ({c}, 2 to 4)")
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f"conv: bias has shape {tuple(bias.shape)}, expected {(c,)}")
    if cu_seqlens is not None and b != 1:
        raise ValueError(f"conv: with cu_seqlens x has one row, got {b}")
    if initial_state is not None and tuple(initial_state.shape) != (rows, k - 1, c):
        raise ValueError(f"conv: initial_state has shape {tuple(initial_state.shape)}, expected {(rows, k - 1, c)}")
    cos = sin = None
    if rotation is not None:
        half = rotation[0].shape[-1]
        if c % (2 * half) or rotate_from % (2 * half):
            raise ValueError(f"conv: {c} channels, rotated from {rotate_from}, are not whole heads of {2 * half}")
        if any(t.numel() != b * length * half for t in rotation):
            raise ValueError(f"conv: rotation has shape {tuple(rotation[0].shape)}, expected {(b, length, half)}")
        cos, sin = (t.reshape(b, length, half) for t in rotation)
    y, final = _forward(
        x, weight, bias, initial_state, cu_seqlens, cos, sin, rotate_from, activation == "silu", return_final_state
    )
    return y, final if return_final_state else None
