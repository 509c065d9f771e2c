"""One token through the Mamba-2 mixer's heads as one Triton kernel; the twin is ``mmmamba.ops.step.mixer_step``.

Nearly all bytes are the SSM state's, read and written once. A program owns a part of v's channels in one key/value
group of one row, for all heads of the group; a batch that fills the GPU has one part a group. It walks over the state
in blocks of channels, each block (heads of the group, channels, directions) with whole rows of directions, and asks
for the next block before it works on this one. The last of a group's parts to arrive norms its heads and moves its
conv state on: then all parts have read it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmmamba.ops.step import check_step
from mmmamba.ops.triton import on_device

ROUNDS = tl.constexpr(7)  # of Philox, whose authors found 7 to pass every test
FULL = 264  # programs that fill a GPU: two for each of an H100's multiprocessors

_COUNTERS = WeakTensorKeyDictionary()


@triton.jit
def _convolved(x, state, weight, bias, channel, mask, C, K: tl.constexpr, SILU: tl.constexpr, WIDE: tl.constexpr):
    """The convolution and its activation at some channels of a row."""
    value = tl.load(x + channel, mask=mask, other=0.0).to(WIDE)
    value *= tl.load(weight + channel * K + (K - 1), mask=mask, other=0.0).to(WIDE)
    for tap in tl.static_range(K - 1):
        old = tl.load(state + tap * C + channel, mask=mask, other=0.0).to(WIDE)
        value += old * tl.load(weight + channel * K + tap, mask=mask, other=0.0).to(WIDE)
    if bias is not None:
        value += tl.load(bias + channel, mask=mask, other=0.0).to(WIDE)
    if SILU:
        value *= tl.sigmoid(value)
    return value


@triton.jit
def _direction(
    x, state, weight, bias, head, real, n, cos, sin, C, P: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
    NORMALISE: tl.constexpr, ROTATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """k or q of the heads that begin at channels ``head``: (heads, n), convolved, normalised and rotated."""
    mask = real[:, None] & (n < P)[None, :]
    value = _convolved(x, state, weight, bias, head[:, None] + n[None, :], mask, C, K, SILU, WIDE)
    if NORMALISE:
        shrink = 1 / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
        value *= shrink[:, None]
    if ROTATE:  # the other half of the head, worked out once more rather than moved between threads
        other = head[:, None] + ((n + P // 2) % P)[None, :]
        partner = _convolved(x, state, weight, bias, other, mask, C, K, SILU, WIDE)
        if NORMALISE:
            partner *= shrink[:, None]
        value = value * cos[None, :] + partner * tl.where(n < P // 2, -sin, sin)[None, :]
    return value


@triton.jit
def _shift(x, state, channel, mask, C, K: tl.constexpr):
    """The conv state without its oldest input, with this token's behind."""
    for tap in tl.static_range(K - 2):
        tl.store(state + tap * C + channel, tl.load(state + (tap + 1) * C + channel, mask=mask), mask=mask)
    tl.store(state + (K - 2) * C + channel, tl.load(x + channel, mask=mask), mask=mask)


@triton.jit
def _noise(seed, slot, row, R: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """16 random bits for each element of the rows (R, D) of a state, (R, D, N): one draw serves 8 neighbours."""
    low = (row[:, :, None] * (N // 8) + tl.arange(0, N // 8)[None, None, :]).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, zero + slot.to(tl.uint32), zero, zero, ROUNDS)
    pairs = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), (R, D, N))


@triton.jit
def _finish(
    y, gates, scale, x, conv, out, row, group, head, real, channel, n, EPS: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gated norm of a group's heads, y (heads, blocks, d) at v's channels (blocks, d); and its conv state's shift."""
    at = head[:, None, None] * P + channel[None, :, :]
    mask = real[:, None, None] & (channel < P)[None, :, :]
    gates = gates.to(WIDE)
    inverse = 1 / tl.sqrt(tl.sum(tl.sum(y * y, axis=2), axis=1) / P + EPS)
    result = y * inverse[:, None, None] * scale.to(WIDE)[None, :, :] * gates * tl.sigmoid(gates)
    tl.store(out + row * (H * P) + at, result, mask=mask)
    v_at = group * P + n
    _shift(x, conv, v_at, n < P, C, K)
    _shift(x, conv, G * P + v_at, n < P, C, K)
    _shift(x, conv, 2 * G * P + head[:, None] * P + n[None, :], real[:, None] & (n < P)[None, :], C, K)


@triton.jit
def _step_kernel(
    vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, cos, sin,
    positions, frequencies, seed, out, partial, arrived, vkq_stride, gate_stride, dt_stride, EPS: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, NORMALISE: tl.constexpr,
    PAD_R: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    H: tl.constexpr = G * R
    C: tl.constexpr = (H + 2 * G) * P
    BLOCKS: tl.constexpr = PAD // PARTS // D
    ROTATE: tl.constexpr = cos is not None or positions is not None
    # Parts that hold all of their state at once say that their share of y is there before they write the state.
    LATE: tl.constexpr = PARTS > 1 and BLOCKS == 1
    n = tl.arange(0, PAD)
    local = tl.program_id(1) * (PAD // PARTS) + tl.arange(0, D)  # v's channels of this part's first block
    member = tl.arange(0, PAD_R)  # of the group's heads
    real = member < R
    head = group * R + member
    channel = tl.arange(0, BLOCKS)[:, None] * D + local[None, :]  # (blocks, d), all of this part
    result_at = head[:, None, None] * P + channel[None, :, :]
    result_mask = real[:, None, None] & (channel < P)[None, :, :]

    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        nothing = tl.zeros((PAD_R, BLOCKS, D), dtype=WIDE)
        tl.store(out + row * (H * P) + result_at, nothing, mask=result_mask)
        return

    whole = ssm_state + slot * (H * P * P)
    at = (head[:, None, None] * P + local[None, :, None]) * P + n[None, None, :]
    mask = real[:, None, None] & (n < P)[None, None, :]
    following = tl.load(whole + at, mask=mask & (local < P)[None, :, None], other=0.0)

    x = vkq + row * vkq_stride
    conv = conv_state + slot * ((K - 1) * C)
    cosine = n
    sine = n
    if positions is not None:
        angle = tl.load(frequencies + n % (P // 2), mask=n < P, other=0.0)
        angle *= tl.load(positions + row).to(angle.dtype)
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    elif cos is not None:
        cosine = tl.load(cos + row * (P // 2) + n % (P // 2), mask=n < P, other=0.0).to(WIDE)
        sine = tl.load(sin + row * (P // 2) + n % (P // 2), mask=n < P, other=0.0).to(WIDE)
    one = tl.arange(0, 1)
    k_at = G * P + group * P + one
    q_at = 2 * G * P + head * P
    k = _direction(
        x, conv, conv_weight, conv_bias, k_at, one == 0, n, cosine, sine, C, P, K, SILU, NORMALISE, ROTATE, WIDE
    )
    q = _direction(x, conv, conv_weight, conv_bias, q_at, real, n, cosine, sine, C, P, K, SILU, NORMALISE, ROTATE, WIDE)
    raw = tl.load(dt_raw + row * dt_stride + head, mask=real, other=0.0).to(WIDE)
    raw += tl.load(dt_bias + head, mask=real, other=0.0).to(WIDE)
    # softplus(r) = max(r, 0) + log1p(e): log(1 + e) alone would lose a small e.
    e = tl.exp(-tl.abs(raw))
    u = 1 + e
    dt = tl.maximum(raw, 0.0) + tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    decay = tl.exp(-dt * tl.exp(tl.load(A_log + head, mask=real, other=0.0).to(WIDE)))

    y = tl.zeros((PAD_R, BLOCKS, D), dtype=WIDE)
    for block in tl.static_range(BLOCKS):
        state = following.to(WIDE)
        place = at + block * (D * P)
        inside = mask & (local + block * D < P)[None, :, None]
        if block + 1 < BLOCKS:
            ahead = mask & (local + (block + 1) * D < P)[None, :, None]
            following = tl.load(whole + at + (block + 1) * (D * P), mask=ahead, other=0.0)
        row_of_v = block * D + local
        v = _convolved(x, conv, conv_weight, conv_bias, group * P + row_of_v, row_of_v < P, C, K, SILU, WIDE)
        added = (dt[:, None] * v[None, :])[:, :, None] * k[:, None, :]
        state = state * decay[:, None, None] + added
        piece = tl.sum(state * q[:, None, :], axis=2)
        y += tl.where((tl.arange(0, BLOCKS) == block)[None, :, None], piece[:, None, :], 0.0)
        if seed is not None:  # bfloat16 drops the lower 16 bits, so noise below them carries with its probability
            row_of_state = head[:, None] * P + row_of_v[None, :]
            bits = state.to(tl.uint32, bitcast=True) + _noise(tl.load(seed), slot, row_of_state, PAD_R, D, PAD)
            state = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        if not LATE:
            tl.store(whole + place, state, mask=inside)

    if PARTS == 1:
        tl.debug_barrier()  # several threads may hold the same channel: none writes before all have read
        gates = tl.load(gate + row * gate_stride + result_at, mask=result_mask, other=0.0)
        scale = tl.load(norm_weight + channel, mask=channel < P, other=0.0)
        _finish(y, gates, scale, x, conv, out, row, group, head, real, channel, n, EPS, H, G, P, C, K, WIDE)
    else:
        # What the last part needs is asked for before it is known which one that is: nothing waits for it then.
        full = tl.arange(0, 1)[:, None] * PAD + n[None, :]
        at_y = head[:, None, None] * P + full[None, :, :]
        mask_y = real[:, None, None] & (full < P)[None, :, :]
        gates = tl.load(gate + row * gate_stride + at_y, mask=mask_y, other=0.0)
        scale = tl.load(norm_weight + full, mask=full < P, other=0.0)
        partial += row * (H * P)
        tl.store(partial + result_at, y, mask=result_mask)
        tl.debug_barrier()  # the whole program has read and written before it says so
        before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
        if LATE:
            tl.store(whole + at, state, mask=mask & (local < P)[None, :, None])
        if before == PARTS - 1:
            tl.store(arrived + tl.program_id(0), 0)  # for the next step
            # From the L2, which all programs share.
            whole_y = tl.load(partial + at_y, mask=mask_y, other=0.0, cache_modifier=".cg")
            _finish(whole_y, gates, scale, x, conv, out, row, group, head, real, full, n, EPS, H, G, P, C, K, WIDE)


def _tile(programs: int, heads: int, p: int) -> dict[str, int]:
    """Parts of a group, channels of a block and warps of a program.

    A batch that fills the GPU hides latency with many small programs, a small one by many parts, each of which asks for
    all that it needs at once.
    """
    pad, pad_heads = triton.next_power_of_2(p), triton.next_power_of_2(heads)
    parts = 1
    while parts < pad // 16 and 2 * parts * programs <= FULL:
        parts *= 2
    block = min(pad // parts, 32)
    elements = pad_heads * block * pad
    # At least 16 elements a thread: an element of the state that two threads shared would be read after it is written.
    return {
        "PAD_R": pad_heads,
        "PAD": pad,
        "PARTS": parts,
        "D": block,
        "num_warps": max(1, min(8 if parts == 1 else 4, elements // (16 * 32))),
    }


def _counters(ssm_state: Tensor, programs: int) -> Tensor:
    """Zeros, one for each row and group, with which the parts of a group find out which of them is the last.

    Every pool of states has its own, remembered while it lives: no two steps may change one pool at the same time.
    """
    counters = _COUNTERS.get(ssm_state)
    if counters is None or counters.shape[0] < programs:
        counters = torch.zeros(programs, dtype=torch.int32, device=ssm_state.device)
        if not (ssm_state.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory is its own
            _COUNTERS[ssm_state] = counters
    return counters


@torch.library.custom_op("mmmamba::mixer_step", mutates_args=("conv_state", "ssm_state", "arrived"))
def _step(
    vkq: Tensor,
    gate: Tensor,
    dt_raw: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    seed: Tensor | None,
    arrived: Tensor,
    eps: float,
    silu: bool,
    qk_norm: bool,
) -> Tensor:
    b, h, p = vkq.shape[0], A_log.shape[0], norm_weight.shape[0]
    g = (vkq.shape[1] // p - h) // 2
    vkq, gate, dt_raw = (t if t.stride(1) == 1 else t.contiguous() for t in (vkq, gate, dt_raw))
    parameters: list[Any] = [conv_weight, conv_bias, dt_bias, A_log, norm_weight]
    parameters = [None if t is None else t.contiguous() for t in parameters]
    rest = [None if t is None else t.contiguous() for t in (slots, cos, sin, positions, frequencies)]
    out = torch.empty(b, h * p, dtype=vkq.dtype, device=vkq.device)
    if b:
        tile = _tile(b * g, h // g, p)
        wide = vkq.dtype == torch.float64
        partial = out.new_empty(b, h * p, dtype=torch.float64 if wide else torch.float32) if tile["PARTS"] > 1 else None
        with on_device(vkq):
            _step_kernel[(b * g, tile["PARTS"])](
                vkq, gate, dt_raw, *parameters, conv_state, ssm_state, *rest,
                seed if ssm_state.dtype == torch.bfloat16 else None, out, partial, arrived, vkq.stride(0),
                gate.stride(0), dt_raw.stride(0), EPS=eps, G=g, R=h // g, P=p, K=conv_weight.shape[1], SILU=silu,
                NORMALISE=qk_norm, WIDE=tl.float64 if wide else tl.float32, **tile,
            )  # fmt: skip
    return out


@_step.register_fake
def _(vkq, gate, *_):
    return vkq.new_empty(gate.shape)


def mixer_step(
    vkq: Tensor,
    gate: Tensor,
    dt_raw: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    qk_norm: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    frequencies: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """One token of each row of a running batch: see :func:`mmmamba.ops.step.mixer_step`, whose contract this keeps.

    The states must be contiguous. The noise of the stochastic rounding differs from the twin's; it depends on the seed
    and on the state's place in the pool alone.

    Raises:
        ValueError: for shapes that do not fit together, or states that are not contiguous.
    """
    check_step(
        vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, rotation,
        positions, frequencies, activation,
    )  # fmt: skip
    for name, state in (("conv_state", conv_state), ("ssm_state", ssm_state)):
        if not state.is_contiguous():
            raise ValueError(f"mixer_step: {name} must be contiguous, it has strides {state.stride()}")
    cos, sin = rotation if rotation is not None else (None, None)
    return _step(
        vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, cos, sin,
        positions, frequencies, seed, _counters(ssm_state, vkq.shape[0] * ssm_state.shape[1]), eps,
        activation == "silu", qk_norm,
    )  # fmt: skip
