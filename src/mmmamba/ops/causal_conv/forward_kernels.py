"""The forward kernel of the convolution: a tile of tokens × channels a program, the last programs for the states."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_channels(block, C, HALF: tl.constexpr, CHANNELS: tl.constexpr):
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
def sequence_of(token, cu_seqlens, length, steps, rows):
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
def border_of(sequence, cu_seqlens, length):
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
    before = sequence_of(first, cu_seqlens, length, steps, rows)
    sequence = token * 0 + before
    start = token * 0 + border_of(before, cu_seqlens, length)
    for later in range(before + 1, sequence_of(last, cu_seqlens, length, steps, rows) + 1):
        border = border_of(later, cu_seqlens, length)
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
def preactivation(
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
def tile_angles(cos, sin, token, channel, mask, rotate_from, HALF: tl.constexpr, WIDE: tl.constexpr):
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
    # Slots after the end repeat the last token: no table is read out of bounds.
    last = tl.minimum(origin + TOKENS, total) - 1
    sequence, start = _sequences(tl.minimum(token, last), origin, last, cu_seqlens, length, steps, rows)
    # One wide offset for the tile: within it offsets are narrow.
    x += origin.to(tl.int64) * stride
    y += origin.to(tl.int64) * C
    at = place[:, None] * C + channel[None, :]
    first = preactivation(
        x, origin, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K, WIDE
    )
    if SILU:
        first = first * tl.sigmoid(first)
    if HALF:
        other = channel + HALF
        second = preactivation(
            x, origin, weight, bias, state, token, sequence, start, other, real, mask, C, stride, K, WIDE
        )
        if SILU:
            second = second * tl.sigmoid(second)
        cos += origin.to(tl.int64) * HALF
        sin += origin.to(tl.int64) * HALF
        c, s = tile_angles(cos, sin, place, channel, mask, rotate_from, HALF, WIDE)
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
    start = border_of(sequence, cu_seqlens, length)
    end = border_of(sequence + 1, cu_seqlens, length)
    for slot in tl.static_range(K - 1):
        token = end.to(tl.int64) - (K - 1) + slot
        at = (sequence * (K - 1) + slot)[:, None] * C + channel[None, :]
        kept = _input(x, 0, state, token, sequence, start, channel, mask, C, stride, K, WIDE)
        tl.store(final + at, kept, mask=mask)
        if HALF:
            kept = _input(x, 0, state, token, sequence, start, channel + HALF, mask, C, stride, K, WIDE)
            tl.store(final + at + HALF, kept, mask=mask)


@triton.jit
def forward_kernel(
    x, weight, bias, state, cu_seqlens, cos, sin, y, final, total, length, rows, steps, C, stride, rotate_from, blocks,
    SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel, real = tile_channels(tl.program_id(1), C, HALF, CHANNELS)
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
