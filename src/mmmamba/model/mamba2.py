"""The Mamba-2 mixer that takes an attention's place: the student's mixer, as published and with our named options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.config import MixerConfig, StackConfig
from mmmamba.model.plain import plain, weight_of
from mmmamba.model.rope import Rotation
from mmmamba.model.state import MambaState
from mmmamba.ops import causal_conv, gated_delta, gated_norm, joined_linear, linear_wide, ssd, unit_norm

GATE_GAIN = 2**-2.5  # the published gain of the gate's Xavier-uniform start
OPEN_GATE = 1.2784645  # SiLU(1.2784645) = 1


class Mamba2(nn.Module):
    """q, k, v as in attention; depthwise conv + activation on v | k | q; a recurrence over v, k and q with an
    input-dependent step size, SSD (x = v, B = k, C = q) or the gated delta rule; per-head RMSNorm times a SiLU gate;
    W_o.

    Follows the published modelling code (q/k/v projections, conv kernel 2, no D skip, norm before gate); see
    :class:`MixerConfig` for what our recipes may switch on.
    """

    def __init__(self, hidden_size: int, stack: StackConfig, config: MixerConfig) -> None:
        super().__init__()
        h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
        self.heads_count, self.groups, self.head_dim, self.config = h, g, p, config
        bias = config.qkv_bias and stack.qkv_bias
        self.q_proj = nn.Linear(hidden_size, h * p, bias=bias)
        self.k_proj = nn.Linear(hidden_size, g * p, bias=bias)
        self.v_proj = nn.Linear(hidden_size, g * p, bias=bias)
        self.conv = Conv((h + 2 * g) * p, config.conv_kernel, config.conv_activation)
        self.dt_proj = nn.Linear(hidden_size, h, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        if config.rule == "gated_delta":
            self.beta_proj = nn.Linear(hidden_size, h, bias=False)
        self.norm = GatedNorm(p, config.norm_eps)
        self.gate_proj = nn.Linear(hidden_size, h * p, bias=config.gate_bias)
        self.o_proj = nn.Linear(h * p, hidden_size, bias=stack.o_bias)
        self.reset_new_parameters()

    @torch.no_grad()
    def reset_new_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start everything that attention does not have (facts of the published seeding; options of the config)."""
        config, h = self.config, self.heads_count
        self.conv.weight.zero_()
        self.conv.weight[:, -1] = 1.0  # the current token passes through
        self.conv.bias.zero_()
        self.dt_proj.weight.zero_()
        if config.rule == "gated_delta":
            self.beta_proj.weight.zero_()  # beta is 1/2
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        if config.decay == "published":
            self.A_log.fill_(1.0)
            spread = torch.rand(h, generator=generator)
        else:
            self.A_log.zero_()
            spread = torch.arange(h) / max(h - 1, 1)
        dt = torch.exp(low + spread * (high - low))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus
        self.norm.weight.fill_(1.0)
        bound = GATE_GAIN * math.sqrt(6.0 / (self.gate_proj.in_features + self.gate_proj.out_features))
        noise = torch.rand(self.gate_proj.weight.shape, generator=generator)
        self.gate_proj.weight.copy_((2 * noise - 1) * bound)
        if self.gate_proj.bias is not None:
            self.gate_proj.bias.fill_(OPEN_GATE)

    def heads(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, MambaState | None]:
        """The gated heads before W_o: x (b, l, d) → (b, l, h, p), and the state if ``keep_state``."""
        h, g, p = self.heads_count, self.groups, self.head_dim
        projections = (self.v_proj, self.k_proj, self.q_proj)
        if plain(nn.Linear, *projections):
            vkq = joined_linear(x, [one.weight for one in projections], [one.bias for one in projections])
        else:
            vkq = torch.cat([one(x) for one in projections], dim=-1)
        vkq, conv_state = self.conv(
            vkq,
            initial_state=None if state is None else state.conv,
            cu_seqlens=cu_seqlens,
            return_final_state=keep_state,
            rotation=(rotation.cos, rotation.sin) if self.config.rope else None,  # it has k and q in hand
            rotate_from=g * p,
        )
        if self.config.qk_norm:  # behind the rotation, which leaves lengths alone
            v, kq = vkq.split([g * p, (g + h) * p], dim=-1)
            k, q = unit_norm(kq.unflatten(-1, (g + h, p))).split([g, h], dim=-2)
        else:
            v, k, q = vkq.split([g * p, g * p, h * p], dim=-1)
            k, q = k.unflatten(-1, (g, p)), q.unflatten(-1, (h, p))
        v = v.unflatten(-1, (g, p))
        dt = self.step_size(x)
        A = -torch.exp(self.A_log.to(dt.dtype))
        options: dict[str, Any] = {
            "initial_state": None if state is None else state.ssm,
            "cu_seqlens": cu_seqlens,
            "return_final_state": keep_state,
        }
        if self.config.rule == "gated_delta":
            y, ssm = gated_delta(v, dt, A, k, q, self.strength(x), **options)
        else:
            y, ssm = ssd(v, dt, A, k, q, **options)
        gate = self.gate_proj(x).unflatten(-1, (h, p))
        y = self.norm(y, gate)
        if not keep_state:
            return y, None
        assert conv_state is not None and ssm is not None
        return y, MambaState(conv_state, ssm)

    def step_size(self, x: Tensor) -> Tensor:
        """dt = softplus(W_dt x + dt_bias), (b, l, h), never below float32."""
        with torch.autocast(x.device.type, enabled=False):
            raw = _wide(self.dt_proj, x)
            return F.softplus(raw + self.dt_bias.to(raw.dtype))

    def strength(self, x: Tensor) -> Tensor:
        """beta = sigmoid(W_beta x) of the gated delta rule, (b, l, h), never below float32."""
        with torch.autocast(x.device.type, enabled=False):
            return _wide(self.beta_proj, x).sigmoid()

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
        observe: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, MambaState | None]:
        """x (b, l, d) → (b, l, d) and the new state; packed rows with ``cu_seqlens`` (s+1,) have b = 1.

        ``observe`` is called with the heads.
        """
        y, new = self.heads(x, state, rotation=rotation, cu_seqlens=cu_seqlens, keep_state=keep_state)
        if observe is not None:
            observe(y)
        return self.o_proj(y.flatten(-2)), new


def _wide(projection: nn.Linear, x: Tensor) -> Tensor:
    """W·x in float32 at least. A module that has to be called works in its weight's dtype; its result is widened."""
    if plain(nn.Linear, projection):
        return linear_wide(x, projection.weight)
    weight = weight_of(projection)
    if weight is not None and weight.is_floating_point():
        x = x.to(weight.dtype)
    y: Tensor = projection(x)
    return y.to(torch.promote_types(y.dtype, torch.float32))


class Conv(nn.Module):
    """The depthwise convolution: weight (c, k) and bias (c,)."""

    def __init__(self, channels: int, kernel: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))
        self.activation = activation

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """x (b, l, c) and the options of :func:`mmmamba.ops.causal_conv` → what that gives."""
        return causal_conv(x, self.weight, self.bias, activation=self.activation, **options)


class GatedNorm(nn.Module):
    """The per-head RMSNorm, weight (p,), times the SiLU of a gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate (b, l, h, p) → (b, l, h, p)."""
        return gated_norm(x, gate, self.weight, self.eps)
