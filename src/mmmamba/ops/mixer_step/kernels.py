"""One token through the Mamba-2 mixer's heads as one Triton kernel; the twin is ``mmmamba.ops.mixer_step``.

Nearly all bytes are the SSM state's, read and written once. In a large batch a program owns all heads of one key/value
group of one row, and walks over their state in blocks of channels, with whole rows of directions, asking for the next
block before it works on this one. In a small batch a program owns a single head, or some channels of one where the
norm's statistics are left to the reader. It asks for all of its state at once: in a chain of launches before the kernel
in front has ended. Programs of a group share conv states: the last of them to have read moves them on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.ops.dispatch import chain, on_device, operator
from mmmamba.ops.mixer_step.shapes import check_shapes, heads_dtype
from mmmamba.ops.rotary.angle_kernels import cos_sin

ROUNDS = tl.constexpr(7)  # of Philox, whose authors found 7 to pass every test
FULL = 264  # programs that fill a GPU: two for each of an H100's multiprocessors

_COUNTERS = WeakTensorKeyDictionary()


@triton.jit
def _past(state, weight, bias, channel, mask, C, K: tl.constexpr, WIDE: tl.constexpr):
    """What a convolution has of the tokens before, at some channels of a row; and its weight for this token."""
    value = tl.load(weight + channel * K + (K - 1), mask=mask, other=0.0).to(WIDE)
    last = value
    value *= 0
    for tap in tl.static_range(K - 1):
        old = tl.load(state + tap * C + channel, mask=mask, other=0.0).to(WIDE)
        value += old * tl.load(weight + channel * K + tap, mask=mask, other=0.0).to(WIDE)
    if bias is not None:
        value += tl.load(bias + channel, mask=mask, other=0.0).to(WIDE)
    return value, last


@triton.jit
def _present(past, last, x, channel, mask, SILU: tl.constexpr, WIDE: tl.constexpr):
    """The convolution with this token, and its activation."""
    value = past + last * tl.load(x + channel, mask=mask, other=0.0).to(WIDE)
    if SILU:
        value *= tl.sigmoid(value)
    return value


@triton.jit
def _direction(value, partner, n, cos, sin, P: tl.constexpr, NORMALISE: tl.constexpr, ROTATE: tl.constexpr):
    """k or q of some heads (heads, n), normalised and rotated; ``partner`` is the other half of the head."""
    if NORMALISE:
        shrink = 1 / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
        value *= shrink[:, None]
        if ROTATE:
            partner *= shrink[:, None]
    if ROTATE:
        value = value * cos[None, :] + partner * tl.where(n < P // 2, -sin, sin)[None, :]
    return value


@triton.jit
def _shift(x, state, channel, mask, C, K: tl.constexpr):
    """Move the conv state on: its oldest input goes, this token's comes last."""
    for tap in tl.static_range(K - 2):
        tl.store(state + tap * C + channel, tl.load(state + (tap + 1) * C + channel, mask=mask), mask=mask)
    tl.store(state + (K - 2) * C + channel, tl.load(x + channel, mask=mask), mask=mask)


@triton.jit
def _shift_group(
    x, state, group, C, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAD: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """The conv state of a group's v, k and q moved on."""
    n = tl.arange(0, PAD)
    q = tl.arange(0, GROUP)[:, None] * P + n[None, :]
    _shift(x, state, group * P + n, n < P, C, K)
    _shift(x, state, G * P + group * P + n, n < P, C, K)
    _shift(x, state, 2 * G * P + group * R * P + q, (q < R * P) & (n < P)[None, :], C, K)


@triton.jit
def _noise(seed, slot, head, first, P: tl.constexpr, R: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """16 random bits for each element of a block (R, D, N) of states: D channels from ``first`` on of some heads (R,).

    One draw serves 8 neighbours, and these again in the channel that is 8 away: each of both is rounded as randomly, at
    half the draws.
    """
    BOTH: tl.constexpr = 2 if D >= 16 else 1
    own = tl.arange(0, D // BOTH)
    if BOTH == 2:
        channel = first + own // 8 * 16 + own % 8
    else:
        channel = (first + own) - (first + own) // 8 % 2 * 8
    row = head[:, None] * P + channel[None, :]
    low = (row[:, :, None] * (N // 8) + tl.arange(0, N // 8)[None, None, :]).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, zero + slot.to(tl.uint32), zero, zero, ROUNDS)
    pairs = tl.join(tl.join(a, b), tl.join(c, d))
    noise = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), (R, D // BOTH, N))
    if BOTH == 2:
        noise = tl.reshape(noise, (R, D // 16, 1, 8, N))
        noise = tl.reshape(tl.broadcast_to(noise, (R, D // 16, 2, 8, N)), (R, D, N))
    return noise


@triton.jit
def _step_kernel(
    vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, cos, sin,
    positions, frequencies, seed, beta_raw, out, squares, arrived, vkq_stride, gate_stride, dt_stride, beta_stride,
    EPS: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, NORMALISE: tl.constexpr,
    HEADS: tl.constexpr, PARTS: tl.constexpr, PAD_R: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Programs (row × group, some of its heads, part): HEADS of the group's R heads each, all or one.

    EARLY: ask for all that does not come from the kernel in front before waiting for it, which takes registers. Each
    of PARTS programs then has its share of the heads' channels; more than one must not be asked for the norm.
    """
    if CHAINS:
        gdc_launch_dependents()
    row = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    H: tl.constexpr = G * R
    C: tl.constexpr = (H + 2 * G) * P
    BLOCKS: tl.constexpr = PAD // PARTS // D
    SHARERS: tl.constexpr = R // HEADS * PARTS  # programs of a group
    ROTATE: tl.constexpr = cos is not None or positions is not None
    n = tl.arange(0, PAD)
    part = tl.program_id(2)
    local = part * (PAD // PARTS) + tl.arange(0, D)  # v's channels of the first block
    member = tl.arange(0, PAD_R)  # of the program's heads
    real = member < HEADS
    head = group * R + tl.program_id(1) * HEADS + member
    channel = tl.arange(0, BLOCKS)[:, None] * D + local[None, :]  # (blocks, d)
    squares_at = (row * H + head) * PARTS + part
    result_at = head[:, None, None] * P + channel[None, :, :]
    result_mask = real[:, None, None] & (channel < P)[None, :, :]

    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        if CHAINS:
            gdc_wait()  # all that a chain has written is there when its last kernel ends
        nothing = tl.zeros((PAD_R, BLOCKS, D), dtype=WIDE)
        tl.store(out + row * (H * P) + result_at, nothing, mask=result_mask)
        if squares is not None:
            tl.store(squares + squares_at, tl.sum(tl.sum(nothing, axis=2), axis=1), mask=real)
        return

    whole = ssm_state + slot * (H * P * P)
    at = (head[:, None, None] * P + local[None, :, None]) * P + n[None, None, :]
    mask = real[:, None, None] & (n < P)[None, None, :]
    following = tl.load(whole + at, mask=mask & (local < P)[None, :, None], other=0.0)

    if CHAINS and not EARLY:
        gdc_wait()
    conv = conv_state + slot * ((K - 1) * C)
    one = tl.arange(0, 1)
    other = (n + P // 2) % P
    k_at = (G * P + group * P + one)[:, None]
    q_at = (2 * G * P + head * P)[:, None]
    k_mask = (one == 0)[:, None] & (n < P)[None, :]
    q_mask = real[:, None] & (n < P)[None, :]
    k, k_last = _past(conv, conv_weight, conv_bias, k_at + n[None, :], k_mask, C, K, WIDE)
    q, q_last = _past(conv, conv_weight, conv_bias, q_at + n[None, :], q_mask, C, K, WIDE)
    k_partner = k
    q_partner = q
    cosine = n
    sine = n
    if ROTATE:  # the other half of each head, computed once more rather than moved between threads
        k_partner, k_partner_last = _past(conv, conv_weight, conv_bias, k_at + other[None, :], k_mask, C, K, WIDE)
        q_partner, q_partner_last = _past(conv, conv_weight, conv_bias, q_at + other[None, :], q_mask, C, K, WIDE)
    if positions is not None:
        angle = tl.load(frequencies + n % (P // 2), mask=n < P, other=0.0)
        angle *= tl.load(positions + row).to(angle.dtype)
        cosine, sine = cos_sin(angle)
    elif cos is not None:
        cosine = tl.load(cos + row * (P // 2) + n % (P // 2), mask=n < P, other=0.0).to(WIDE)
        sine = tl.load(sin + row * (P // 2) + n % (P // 2), mask=n < P, other=0.0).to(WIDE)
    if EARLY:
        v_past, v_last = _past(conv, conv_weight, conv_bias, group * P + local, local < P, C, K, WIDE)
    shift = tl.load(dt_bias + head, mask=real, other=0.0).to(WIDE)
    slope = tl.exp(tl.load(A_log + head, mask=real, other=0.0).to(WIDE))
    if EARLY:
        scale = tl.load(norm_weight + channel, mask=channel < P, other=0.0).to(WIDE)
    last = 0
    if EARLY and SHARERS > 1:
        tl.debug_barrier()  # all threads have read
        last = tl.atomic_add(arrived + slot * G + group, 1, sem="acq_rel")
    if CHAINS and EARLY:
        gdc_wait()  # what follows reads what the kernel in front has written
    x = vkq + row * vkq_stride
    k = _present(k, k_last, x, k_at + n[None, :], k_mask, SILU, WIDE)
    q = _present(q, q_last, x, q_at + n[None, :], q_mask, SILU, WIDE)
    if ROTATE:
        k_partner = _present(k_partner, k_partner_last, x, k_at + other[None, :], k_mask, SILU, WIDE)
        q_partner = _present(q_partner, q_partner_last, x, q_at + other[None, :], q_mask, SILU, WIDE)
    k = _direction(k, k_partner, n, cosine, sine, P, NORMALISE, ROTATE)
    q = _direction(q, q_partner, n, cosine, sine, P, NORMALISE, ROTATE)
    if EARLY and last == SHARERS - 1:
        if SHARERS > 1:
            tl.store(arrived + slot * G + group, 0)  # for the next step
        tl.debug_barrier()
        _shift_group(x, conv, group, C, G, R, P, PAD, GROUP, K)
    raw = tl.load(dt_raw + row * dt_stride + head, mask=real, other=0.0).to(WIDE) + shift
    if EARLY:
        gates = tl.load(gate + row * gate_stride + result_at, mask=result_mask, other=0.0).to(WIDE)
    # softplus(r) = max(r, 0) + log1p(e): log(1 + e) alone would lose a small e.
    e = tl.exp(-tl.abs(raw))
    u = 1 + e
    dt = tl.maximum(raw, 0.0) + tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    decay = tl.exp(-dt * slope)
    if beta_raw is not None:
        beta = tl.sigmoid(tl.load(beta_raw + row * beta_stride + head, mask=real, other=0.0).to(WIDE))

    y = tl.zeros((PAD_R, BLOCKS, D), dtype=WIDE)
    for block in tl.static_range(BLOCKS):
        state = following.to(WIDE)
        place = at + block * (D * P)
        inside = mask & (local + block * D < P)[None, :, None]
        row_of_v = block * D + local
        if block + 1 < BLOCKS:
            ahead = mask & (row_of_v + D < P)[None, :, None]
            following = tl.load(whole + at + (block + 1) * (D * P), mask=ahead, other=0.0)
        if not EARLY:
            v_past, v_last = _past(conv, conv_weight, conv_bias, group * P + row_of_v, row_of_v < P, C, K, WIDE)
        v = _present(v_past, v_last, x, group * P + row_of_v, row_of_v < P, SILU, WIDE)
        if beta_raw is None:
            added = (dt[:, None] * v[None, :])[:, :, None] * k[:, None, :]
            state = state * decay[:, None, None] + added
        else:  # what the state holds under the key is replaced
            state = state * decay[:, None, None]
            held = tl.sum(state * k[:, None, :], axis=2)
            state += (beta[:, None] * (v[None, :] - held))[:, :, None] * k[:, None, :]
        piece = tl.sum(state * q[:, None, :], axis=2)
        y += tl.where((tl.arange(0, BLOCKS) == block)[None, :, None], piece[:, None, :], 0.0)
        if seed is not None:  # bfloat16 drops the lower 16 bits, so noise below them carries with its probability
            first = part * (PAD // PARTS) + block * D
            bits = state.to(tl.uint32, bitcast=True) + _noise(tl.load(seed), slot, head, first, P, PAD_R, D, PAD)
            state = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(whole + place, state, mask=inside)

    if not EARLY:
        scale = tl.load(norm_weight + channel, mask=channel < P, other=0.0).to(WIDE)
        gates = tl.load(gate + row * gate_stride + result_at, mask=result_mask, other=0.0).to(WIDE)
    square = tl.sum(tl.sum(y * y, axis=2), axis=1)
    result = y * scale[None, :, :] * gates * tl.sigmoid(gates)
    if squares is not None:
        tl.store(squares + squares_at, square, mask=real)
    else:
        result *= (1 / tl.sqrt(square / P + EPS))[:, None, None]
    tl.store(out + row * (H * P) + result_at, result, mask=result_mask)
    if not EARLY:
        tl.debug_barrier()  # several threads may hold the same channel: none moves it on before all have read
        _shift_group(x, conv, group, C, G, R, P, PAD, GROUP, K)


def _tile(programs: int, heads: int, p: int, half: bool, parts: int) -> dict[str, Any]:
    """Heads of a program, parts of a head, channels of a block and warps, for so many rows and groups of so many heads.

    A batch that fills the GPU hides latency with many programs, a small one by asking for all of a head at once. Small
    programs begin while the kernel in front still holds most of each multiprocessor: those of ``parts`` of a head. With
    half the bytes (``half``) it is instructions that bound a large batch: few warps repeat fewer of them.
    """
    pad = triton.next_power_of_2(p)
    alone = parts > 1 or programs * heads <= FULL
    own = 1 if alone else heads
    pad_heads = triton.next_power_of_2(own)
    block = pad // parts if alone else min(pad, 16 if half else 32)
    elements = pad_heads * block * pad
    # At least 16 elements a thread: an element of the state that two threads shared would be read after it is written.
    return {
        "HEADS": own,
        "PARTS": parts,
        "PAD_R": pad_heads,
        "PAD": pad,
        "D": block,
        "EARLY": alone,
        "num_warps": max(1, min(4 if parts > 1 or (not alone and half) else 8, elements // (16 * 32))),
        **({} if alone or torch.version.hip else {"maxnreg": 128}),  # two programs of a multiprocessor, or four
    }


def _counters(ssm_state: Tensor, groups: int) -> Tensor:
    """Zeros, one for each slot and group, with which the programs of a group find out which of them is the last.

    Every pool of states has its own, for as long as it lives, since graphs remember where they lie: no two steps may
    change one pool at the same time.
    """
    counters: Tensor | None = _COUNTERS.get(ssm_state)
    if counters is None:
        counters = torch.zeros(len(ssm_state), groups, dtype=torch.int32, device=ssm_state.device)
        if not (ssm_state.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory is its own
            _COUNTERS[ssm_state] = counters
    return counters


@operator("mixer_step", mutates_args=("conv_state", "ssm_state", "out", "squares", "arrived"))
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
    beta_raw: Tensor | None,
    out: Tensor,
    squares: Tensor | None,
    arrived: Tensor,
    eps: float,
    silu: bool,
    qk_norm: bool,
    chained: bool,
) -> None:
    b, h, p = vkq.shape[0], A_log.shape[0], norm_weight.shape[0]
    g = (vkq.shape[1] // p - h) // 2
    vkq, gate, dt_raw = (t if t.stride(1) == 1 else t.contiguous() for t in (vkq, gate, dt_raw))
    beta_raw = beta_raw if beta_raw is None or beta_raw.stride(1) == 1 else beta_raw.contiguous()
    parameters: list[Any] = [conv_weight, conv_bias, dt_bias, A_log, norm_weight]
    parameters = [None if t is None else t.contiguous() for t in parameters]
    rest = [None if t is None else t.contiguous() for t in (slots, cos, sin, positions, frequencies)]
    if b:
        tile = _tile(b * g, h // g, p, ssm_state.dtype == torch.bfloat16, 1 if squares is None else squares.shape[2])
        wide = vkq.dtype == torch.float64
        with on_device(vkq):
            _step_kernel[(b * g, h // g // tile["HEADS"], tile["PARTS"])](
                vkq, gate, dt_raw, *parameters, conv_state, ssm_state, *rest,
                seed if ssm_state.dtype == torch.bfloat16 else None, beta_raw, out, squares, arrived, vkq.stride(0),
                gate.stride(0), dt_raw.stride(0), 0 if beta_raw is None else beta_raw.stride(0), EPS=eps, G=g, R=h // g,
                P=p, K=conv_weight.shape[1], SILU=silu, NORMALISE=qk_norm, GROUP=triton.next_power_of_2(h // g),
                WIDE=tl.float64 if wide else tl.float32, **tile, **chain(vkq, chained),
            )  # fmt: skip


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
    squares: Tensor | None = None,
    beta_raw: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """One token of each row of a running batch: see :func:`mmmamba.ops.mixer_step`, whose contract this keeps.

    The states must be contiguous; a head has a power of two of ``squares``. The noise of the stochastic rounding
    differs from the twin's; it depends on the seed and on the state's place in the pool alone.

    Raises:
        ValueError: for shapes that do not fit together, or states or squares that are not contiguous.
    """
    check_shapes(
        vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, rotation,
        positions, frequencies, squares, activation, beta_raw,
    )  # fmt: skip
    for name, tensor in (("conv_state", conv_state), ("ssm_state", ssm_state), ("squares", squares)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"mixer_step: {name} must be contiguous, it has strides {tensor.stride()}")
    if squares is not None and squares.shape[2] & (squares.shape[2] - 1):
        raise ValueError(f"mixer_step: a head has {squares.shape[2]} squares, the kernel needs a power of two")
    cos, sin = rotation if rotation is not None else (None, None)
    groups = (vkq.shape[1] // norm_weight.shape[0] - ssm_state.shape[1]) // 2
    out = gate.new_empty(gate.shape, dtype=heads_dtype(vkq, squares))
    _step(
        vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, cos, sin,
        positions, frequencies, seed, beta_raw, out, squares, _counters(ssm_state, groups), eps,
        activation == "silu", qk_norm, chained,
    )  # fmt: skip
    return out
