"""One step of a mixer's heads in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.causal_conv import causal_conv_step
from mmmamba.ops.gated_delta import gated_delta_step
from mmmamba.ops.gated_norm import gated_norm
from mmmamba.ops.mixer_step.shapes import check_shapes, heads_dtype
from mmmamba.ops.rotary import rotate
from mmmamba.ops.ssd import ssd_step


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x in bfloat16, rounded up with the probability of its distance from the value below: unbiased in the mean."""
    bits = x.float().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


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
    check_shapes(
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
