"""The depthwise causal convolution as one Triton kernel each way; the twin is ``mmmamba.ops.conv.causal_conv``.

Rows are taken flat: token t of b rows of length l belongs to sequence t // l, and in a packed row to the sequence that
a search in ``cu_seqlens`` finds, so nothing about the sequences is ever read back from the device. A program takes a
tile of tokens × channels; the last programs of a launch serve the states instead, a tile of sequences × channels.

With a rotation a program takes *pairs* of channels, the first half of a head and the second: see :func:`_channels`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.triton import on_device

TOKENS, CHANNELS, WARPS = 32, 64, 4  # forward tile
BACKWARD_TOKENS, BACKWARD_CHANNELS = 16, 64
TILES = 16  # tiles of one backward program, at most, which share a row of the weights' partial sums
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
def _borders(sequence, cu_seqlens, length, rows):
    """Where each sequence starts and ends."""
    if cu_seqlens is None:
        start = sequence * length
        end = start + length
    else:
        inside = sequence < rows
        start = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int64)
    return start, end


@triton.jit
def _sequences(token, cu_seqlens, length, steps, rows):
    """Of each token: its sequence, and where that starts and ends."""
    if cu_seqlens is None:
        sequence = token // length
    else:
        sequence = tl.zeros_like(token)  # the last border at or below the token lies in [sequence, high)
        high = sequence + rows
        for _ in range(steps):
            middle = (sequence + high) // 2
            below = tl.load(cu_seqlens + middle).to(tl.int64) <= token
            sequence = tl.where(below, middle, sequence)
            high = tl.where(below, high, middle)
    start, end = _borders(sequence, cu_seqlens, length, rows)
    return sequence, start, end


@triton.jit
def _input(x, state, token, sequence, start, channel, mask, C, stride, K: tl.constexpr, WIDE: tl.constexpr):
    """The inputs at ``token``; in front of a sequence's start they lie in its state, or are zero."""
    inside = token >= start
    at = token[:, None] * stride + channel[None, :]
    value = tl.load(x + at, mask=mask & inside[:, None], other=0.0).to(WIDE)
    if state is not None:
        slot = sequence * (K - 1) + (K - 1) + token - start
        held = mask & ((token < start) & (token >= start - (K - 1)))[:, None]
        value += tl.load(state + slot[:, None] * C + channel[None, :], mask=held, other=0.0).to(WIDE)
    return value


@triton.jit
def _before(
    x, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K: tl.constexpr, WIDE: tl.constexpr
):
    """The convolution at ``token``, before its activation."""
    z = tl.zeros((token.shape[0], channel.shape[0]), dtype=WIDE)
    for tap in tl.static_range(K):
        w = tl.load(weight + channel * K + tap, mask=real, other=0.0).to(WIDE)
        z += _input(x, state, token - (K - 1 - tap), sequence, start, channel, mask, C, stride, K, WIDE) * w[None, :]
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
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = (token < total)[:, None] & real[None, :]
    # Slots behind the end repeat the last token: no table is read out of bounds.
    sequence, start, _ = _sequences(tl.minimum(token, total - 1), cu_seqlens, length, steps, rows)
    at = token[:, None] * C + channel[None, :]
    first = _before(x, weight, bias, state, token, sequence, start, channel, real, mask, C, stride, K, WIDE)
    if SILU:
        first = first * tl.sigmoid(first)
    if HALF:
        other = channel + HALF
        second = _before(x, weight, bias, state, token, sequence, start, other, real, mask, C, stride, K, WIDE)
        if SILU:
            second = second * tl.sigmoid(second)
        c, s = _angles(cos, sin, token, channel, mask, rotate_from, HALF, WIDE)
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
    start, end = _borders(sequence, cu_seqlens, length, rows)
    for slot in tl.static_range(K - 1):
        token = end - (K - 1) + slot
        at = (sequence * (K - 1) + slot)[:, None] * C + channel[None, :]
        kept = _input(x, state, token, sequence, start, channel, mask, C, stride, K, WIDE)
        tl.store(final + at, kept, mask=mask)
        if HALF:
            kept = _input(x, state, token, sequence, start, channel + HALF, mask, C, stride, K, WIDE)
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
def _gradient_before(
    dy, x, weight, bias, state, cos, sin, token, sequence, start, end, channel, real, mask, C, stride, rotate_from,
    SECOND: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient to the convolution before its activation at ``token``; zero behind a sequence's end.

    ``channel`` is the first of each pair; with SECOND the gradient is that of the second.
    """
    mask = mask & (token < end)[:, None]
    at = token[:, None] * C + channel[None, :]
    d = tl.load(dy + at + (HALF if SECOND else 0), mask=mask, other=0.0).to(WIDE)
    own = channel
    if HALF:
        partner = tl.load(dy + at + (0 if SECOND else HALF), mask=mask, other=0.0).to(WIDE)
        c, s = _angles(cos, sin, token, channel, mask, rotate_from, HALF, WIDE)
        if SECOND:
            d = d * c - partner * s
            own = channel + HALF
        else:
            d = d * c + partner * s
    if SILU:
        z = _before(x, weight, bias, state, token, sequence, start, own, real, mask, C, stride, K, WIDE)
        sigmoid = tl.sigmoid(z)
        d = d * sigmoid * (1 + z * (1 - sigmoid))
    return d


@triton.jit
def _backward_tiles(
    program, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, channel, real, total, length, rows,
    steps, C, stride, rotate_from, tiles, SECOND: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients to the inputs of some tiles, and their share of those to weight and bias, of one of each pair."""
    own = channel + (HALF if SECOND else 0)
    dbias = tl.zeros((channel.shape[0],), dtype=WIDE)
    dw0 = tl.zeros_like(dbias)  # of the taps by how far back they reach
    dw1 = tl.zeros_like(dbias)
    dw2 = tl.zeros_like(dbias)
    dw3 = tl.zeros_like(dbias)
    for tile in range(tiles):
        token = (program.to(tl.int64) * tiles + tile) * TOKENS + tl.arange(0, TOKENS)
        mask = (token < total)[:, None] & real[None, :]
        sequence, start, end = _sequences(tl.minimum(token, total - 1), cu_seqlens, length, steps, rows)
        d = tl.zeros((TOKENS, channel.shape[0]), dtype=WIDE)
        for ahead in tl.static_range(K):
            dz = _gradient_before(
                dy, x, weight, bias, state, cos, sin, token + ahead, sequence, start, end, channel, real, mask, C,
                stride, rotate_from, SECOND, SILU, HALF, K, WIDE,
            )  # fmt: skip
            w = tl.load(weight + own * K + (K - 1 - ahead), mask=real, other=0.0).to(WIDE)
            d += dz * w[None, :]
            if ahead == 0:
                dbias += tl.sum(dz, axis=0)
                for back in tl.static_range(K):
                    seen = _input(x, state, token - back, sequence, start, own, mask, C, stride, K, WIDE)
                    share = tl.sum(dz * seen, axis=0)
                    if back == 0:
                        dw0 += share
                    elif back == 1:
                        dw1 += share
                    elif back == 2:
                        dw2 += share
                    else:
                        dw3 += share
        if dfinal is not None:
            slot = token - end + (K - 1)
            at = (sequence * (K - 1) + slot)[:, None] * C + own[None, :]
            d += tl.load(dfinal + at, mask=mask & (slot >= 0)[:, None], other=0.0).to(WIDE)
        tl.store(dx + token[:, None] * C + own[None, :], d, mask=mask)
    row = partial + program * (K + 1) * C + own
    tl.store(row + (K - 1) * C, dw0, mask=real)
    tl.store(row + (K - 2) * C, dw1, mask=real)
    if K > 2:
        tl.store(row + (K - 3) * C, dw2, mask=real)
    if K > 3:
        tl.store(row, dw3, mask=real)
    tl.store(row + K * C, dbias, mask=real)


@triton.jit
def _backward_states(
    program, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dstate, channel, real, length, rows, C, stride,
    rotate_from, SECOND: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr,
    SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients to the initial states of some sequences, of one of each pair of channels."""
    own = channel + (HALF if SECOND else 0)
    sequence = program.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    mask = (sequence < rows)[:, None] & real[None, :]
    start, end = _borders(sequence, cu_seqlens, length, rows)
    for slot in tl.static_range(K - 1):
        d = tl.zeros((SEQUENCES, channel.shape[0]), dtype=WIDE)
        for after in tl.static_range(slot + 1):  # the tokens behind the start that see this slot
            dz = _gradient_before(
                dy, x, weight, bias, state, cos, sin, start + after, sequence, start, end, channel, real, mask, C,
                stride, rotate_from, SECOND, SILU, HALF, K, WIDE,
            )  # fmt: skip
            d += dz * tl.load(weight + own * K + (slot - after), mask=real, other=0.0).to(WIDE)[None, :]
        if dfinal is not None:  # what a sequence shorter than the state hands through
            kept = slot - (end - start)
            at = (sequence * (K - 1) + kept)[:, None] * C + own[None, :]
            d += tl.load(dfinal + at, mask=mask & (kept >= 0)[:, None], other=0.0).to(WIDE)
        tl.store(dstate + (sequence * (K - 1) + slot)[:, None] * C + own[None, :], d, mask=mask)


@triton.jit
def _backward_kernel(
    dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, dstate, total, length, rows, steps, C,
    stride, rotate_from, blocks, tiles, SILU: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, SEQUENCES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel, real = _channels(tl.program_id(1), C, HALF, CHANNELS)
    for second in tl.static_range(2 if HALF else 1):
        if program < blocks:
            _backward_tiles(
                program, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dx, partial, channel, real, total,
                length, rows, steps, C, stride, rotate_from, tiles, second, SILU, HALF, K, TOKENS, WIDE,
            )  # fmt: skip
        else:
            _backward_states(
                program - blocks, dy, dfinal, x, weight, bias, state, cu_seqlens, cos, sin, dstate, channel, real,
                length, rows, C, stride, rotate_from, second, SILU, HALF, K, SEQUENCES, WIDE,
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


@torch.library.custom_op("mmmamba::causal_conv", mutates_args=())
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


@torch.library.custom_op("mmmamba::causal_conv_backward", mutates_args=())
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
    dtype = weight.dtype
    dy, dfinal, weight, bias, state = _dense(dy, dfinal, weight, bias, initial_state)
    cu_seqlens, cos, sin = _dense(cu_seqlens, cos, sin)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = 0 if state is None else sizes["rows"]
    dstate = x.new_empty(rows, k - 1, c, dtype=x.dtype if state is None else state.dtype)
    tiles = min(TILES, triton.cdiv(sizes["total"], BACKWARD_TOKENS))
    blocks = triton.cdiv(sizes["total"], BACKWARD_TOKENS * max(tiles, 1))
    programs = blocks + triton.cdiv(rows, SEQUENCES)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(blocks, k + 1, c, dtype=wide)
    if programs:
        columns = triton.cdiv(c // (2 if sizes["HALF"] else 1), BACKWARD_CHANNELS)
        with on_device(x):
            _backward_kernel[(programs, columns)](
                dy, dfinal, flat, weight, bias, state, cu_seqlens, cos, sin, dx, partial, dstate,
                stride=flat.stride(0), blocks=blocks, tiles=tiles, rotate_from=rotate_from, TOKENS=BACKWARD_TOKENS,
                CHANNELS=BACKWARD_CHANNELS, **sizes,
            )  # fmt: skip
    whole = partial.sum(0)
    dbias = whole[k].to(dtype if bias is None else bias.dtype, copy=True)
    return dx, whole[:k].T.to(dtype, copy=True).contiguous(), dbias, dstate


@_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, cos, sin, rotate_from, silu):
    c, k = weight.shape
    rows = 0 if initial_state is None else _rows(x, cu_seqlens)
    dstate = x.new_empty(rows, k - 1, c, dtype=x.dtype if initial_state is None else initial_state.dtype)
    dbias = weight.new_empty(c, dtype=weight.dtype if bias is None else bias.dtype)
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
