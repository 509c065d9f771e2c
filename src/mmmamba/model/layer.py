"""One layer: norm, mixer, norm, SwiGLU, with residuals around both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.attention import Attention
from mmmamba.model.config import ATTENTION, ModelConfig
from mmmamba.model.mamba2 import Mamba2
from mmmamba.model.rope import Rotation
from mmmamba.model.state import LayerState
from mmmamba.ops import compute_dtype, linear_add, rms_norm, swiglu

Observer = Callable[[int, Tensor, Tensor, Rotation], None]
"""Called with the global layer, the mixer's normed input (b, l, d), the heads' outputs before W_o (b, l, h, p), and the
rotation of the layer's stack."""


class RMSNorm(nn.Module):
    """x / rms(x) times a weight over the last dimension; statistics in float32.

    Under autocast the result is cast once, here, for all the projections that read it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps).to(compute_dtype(x))


class SwiGLU(nn.Module):
    """Weights of down(SiLU(gate(x)) · up(x)); :func:`finish_layer` applies them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)


class Layer(nn.Module):
    """Global layer ``index`` of the model; the layer map says which mixer it has."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        stack = config.stack_of(index)
        self.index = index
        self.input_norm = RMSNorm(config.hidden_size, stack.rms_norm_eps)
        self.mixer: Attention | Mamba2 = (
            Attention(config.hidden_size, stack)
            if config.layer_map[index] == ATTENTION
            else Mamba2(config.hidden_size, stack, config.mixer)
        )
        self.mlp_norm = RMSNorm(config.hidden_size, stack.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, stack.intermediate_size)
        self.finish = finish_layer

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """x (b, l, d) → (b, l, d) and the layer's new state."""
        u = self.input_norm(x)
        mix: Any = self.mixer  # whose state is of its own kind
        heads, new = mix.heads(u, state, rotation=rotation, cu_seqlens=cu_seqlens, keep_state=keep_state)
        if observe is not None:
            observe(self.index, u, heads, rotation)
        out, mlp = self.mixer.o_proj, self.mlp
        weights = (out.weight, out.bias, self.mlp_norm.weight, mlp.gate.weight, mlp.up.weight, mlp.down.weight)
        return self.finish(x, heads, *weights, self.mlp_norm.eps), new


def finish_layer(
    x: Tensor,
    heads: Tensor,
    out: Tensor,
    out_bias: Tensor | None,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    """All that follows the heads: W_o, residual, norm, SwiGLU, residual. x (b, l, d), heads (b, l, h, p) → (b, l, d).

    A pure function of tensors, so that one compilation serves every layer of a shape.
    """
    x = linear_add(x, heads.flatten(-2), out, out_bias)
    u = rms_norm(x, norm, eps).to(compute_dtype(x))
    return linear_add(x, swiglu(F.linear(u, gate), F.linear(u, up)), down, fresh=True)
