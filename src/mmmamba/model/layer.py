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
from mmmamba.ops import rms_norm

Observer = Callable[[int, Tensor, Tensor, Rotation], None]
"""Called with the global layer, the mixer's normed input (b, l, d), the heads' outputs before W_o (b, l, h, p), and the
rotation of the layer's stack."""


class RMSNorm(nn.Module):
    """x / rms(x) times a weight over the last dimension; statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


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
        x = x + self.mixer.o_proj(heads.flatten(-2))
        return x + self.mlp(self.mlp_norm(x)), new
