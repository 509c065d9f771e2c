"""One token through the Mamba-2 mixer's heads, from the projections to the gated norm, with the states in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.conv import causal_conv_step
from mmmamba.ops.delta import gated_delta_step
from mmmamba.ops.norm import gated_norm
from mmmamba.ops.rope import rotate
from mmmamba.ops.ssd import ssd_step
from mmmamba.ops.triton import serves


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x in bfloat16, rounded up with the probability of its distance from the value below: unbiased in the mean."""
    bits = x.float().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def check_step(
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
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    squares: Tensor | None,
    activation: str,
    beta_raw: Tensor | None = None,
) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    b, h, p = vkq.shape[0], A_log.shape[0], norm_weight.shape[0]
    c, k, pool = vkq.shape[1], conv_weight.shape[-1], ssm_state.shape[0]
    g = (c // p - h) // 2
    if g < 1 or h % g or c != (h + 2 * g) * p:
        raise ValueError(f"mixer_step: vkq has {c} channels, which {h} heads of {p} and their groups do not make up")
    expected = {
        "gate": (gate, (b, h * p)),
        "dt_raw": (dt_raw, (b, h)),
        "beta_raw": (beta_raw, (b, h)),
        "conv_weight": (conv_weight, (c, k)),
        "conv_bias": (conv_bias, (c,)),
        "dt_bias": (dt_bias, (h,)),
        "conv_state": (conv_state, (pool, k - 1, c)),
        "ssm_state": (ssm_state, (pool, h, p, p)),
        "slots": (slots, (b,)),
        "positions": (positions, (b,)),
        "frequencies": (frequencies, (p // 2,)),
        "squares": (squares, (b, h, 0 if squares is None else squares.shape[-1])),
        **{f"rotation[{i}]": (t, (b, p // 2)) for i, t in enumerate(rotation or ())},
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"mixer_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not 2 <= k <= 4:
        raise ValueError(f"mixer_step: conv_weight has a kernel of {k}, expected 2 to 4")
    if slots is None and pool < b:
        raise ValueError(f"mixer_step: {b} rows and no slots, but ssm_state holds {pool}")
    if (positions is None) != (frequencies is None) or (positions is not None and rotation is not None):
        raise ValueError("mixer_step: give rotation, or positions and frequencies, or none of them")
    if squares is not None and squares.dtype != torch.promote_types(torch.float32, vkq.dtype):
        raise ValueError(f"mixer_step: squares is {str(squares.dtype)[6:]}, sums of squares need float32 at least")
    if ssm_state.dtype == torch.float16:
        raise ValueError("mixer_step: ssm_state is float16, whose range a state can leave; give float32 or bfloat16")
    if activation not in ("silu", "none"):
        raise ValueError(f"conv activation must be 'silu' or 'none', got {activation!r}")


def heads_dtype(vkq: Tensor, squares: Tensor | None) -> torch.dtype:
    """The format in which :func:`mixer_step` gives the heads."""
    return torch.float32 if squares is not None and vkq.dtype == torch.float16 else vkq.dtype


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
    """One token of each row of a running batch: conv, rotation, recurrence, norm and gate.

    Args:
        vkq: (b, (h+2g)p) projections v | k | q, in this order.  gate: (b, h·p).  dt_raw: (b, h) before its bias.
        conv_weight: (c, k) with k from 2 to 4, c = (h+2g)p.  conv_bias: (c,) or None.
        dt_bias, A_log: (h,); dt = softplus(dt_raw + dt_bias), A = -exp(A_log).  norm_weight: (p,).
        conv_state: (pool, k-1, c), changed in place.
        ssm_state: (pool, h, p, p) float32 or bfloat16, changed in place. The output is read before it is rounded.
        slots: (b,) int32 or int64, each row's place in the pool, no two the same; row i has place i when absent. A
            negative slot marks a row that only fills the batch: it gives zeros and changes nothing.
        eps: of the per-head RMSNorm.
        activation: of the convolution, ``silu`` or ``none``.
        qk_norm: bring k and q of each head to unit length before the rotation.
        rotation: cosines and sines (b, p/2) that k and q are rotated by.
        positions, frequencies: instead of the rotation, (b,) and (p/2,): the angles are their products.
        seed: (1,) int64 on the device: a bfloat16 ssm_state is rounded stochastically, with other noise for every other
            seed (change it every step, also between the replays of a graph). None rounds to the nearest.
        squares: (b, h, parts) float32 at least, written: each head's sum of squares, in parts that add up to it. Where
            given, the norm's division is left to who reads the heads (``linear_step``), so that no part of a head has
            to wait for the others.
        beta_raw: (b, h) before its sigmoid: the recurrence is the gated delta rule (:mod:`mmmamba.ops.delta`) with this
            strength, else the state space recurrence (:mod:`mmmamba.ops.ssd`).
        chained: only vkq, gate, dt_raw and beta_raw may come from the kernel launched last; see ``linear_step``.

    Returns:
        the gated heads (b, h·p) in vkq's dtype. With ``squares`` they are not divided by their root mean square, and
        float32 instead of float16, whose range they may leave.

    Raises:
        ValueError: for shapes that do not fit together, or a float16 ssm_state; the message names the tensor.
    """
    parameters: dict[str, Any] = {
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "dt_bias": dt_bias,
        "A_log": A_log,
        "norm_weight": norm_weight,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "slots": slots,
    }
    angles: dict[str, Any] = {"rotation": rotation, "positions": positions, "frequencies": frequencies}
    options: dict[str, Any] = {
        "eps": eps,
        "activation": activation,
        "qk_norm": qk_norm,
        "seed": seed,
        "squares": squares,
        "beta_raw": beta_raw,
    }
    if serves(vkq, gate, dt_raw, beta_raw, *parameters.values(), *(rotation or ()), positions, frequencies):
        from mmmamba.ops.triton.step import mixer_step as kernel

        return kernel(vkq, gate, dt_raw, **parameters, **angles, **options, chained=chained)
    return mixer_step_torch(vkq, gate, dt_raw, **parameters, **angles, **options)


def mixer_step_torch(
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
) -> Tensor:
    """The step in PyTorch's operators. Same contract as :func:`mixer_step`."""
    check_step(
        vkq, gate, dt_raw, conv_weight, conv_bias, dt_bias, A_log, norm_weight, conv_state, ssm_state, slots, rotation,
        positions, frequencies, squares, activation, beta_raw,
    )  # fmt: skip
    h, p = A_log.shape[0], norm_weight.shape[0]
    g = (vkq.shape[1] // p - h) // 2
    wide = torch.promote_types(torch.float32, vkq.dtype)
    if slots is None:
        slots = torch.arange(vkq.shape[0], device=vkq.device)
    rows = (slots >= 0).nonzero()[:, 0]
    places = slots[rows].long()
    x, conv = causal_conv_step(vkq[rows], conv_weight, conv_bias, conv_state[places], activation=activation)
    v, k, q = (part.unflatten(-1, (-1, p)) for part in x.split([g * p, g * p, h * p], dim=-1))
    if qk_norm:
        k, q = F.normalize(k, dim=-1), F.normalize(q, dim=-1)
    if positions is not None and frequencies is not None:
        angles = positions.to(frequencies.dtype)[:, None] * frequencies
        rotation = angles.cos(), angles.sin()
    if rotation is not None:
        cos, sin = (t[rows][:, None] for t in rotation)
        k, q = rotate(k, cos, sin), rotate(q, cos, sin)
    dt = F.softplus(dt_raw[rows].to(wide) + dt_bias.to(wide))
    A, before = -torch.exp(A_log.to(wide)), ssm_state[places].to(wide)
    if beta_raw is None:
        y, ssm = ssd_step(v, dt, A, k, q, before)
    else:
        y, ssm = gated_delta_step(v, dt, A, k, q, beta_raw[rows].to(wide).sigmoid(), before)
    if ssm_state.dtype == torch.bfloat16 and seed is not None:
        generator = torch.Generator(ssm.device).manual_seed(int(seed))
        ssm = round_stochastically(ssm, generator)
    conv_state.index_copy_(0, places, conv.to(conv_state.dtype))
    ssm_state.index_copy_(0, places, ssm.to(ssm_state.dtype))
    gates = gate[rows].unflatten(-1, (h, p))
    if squares is None:
        heads = gated_norm(y, gates, norm_weight, eps)
    else:
        heads = y.to(wide) * norm_weight.to(wide) * F.silu(gates.to(wide))
        squares.zero_()[rows, :, 0] = y.to(wide).square().sum(-1)
    out = vkq.new_zeros(vkq.shape[0], h * p, dtype=heads_dtype(vkq, squares))
    return out.index_copy(0, rows, heads.flatten(1).to(out.dtype))
