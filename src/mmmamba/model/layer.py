"""One layer: norm, mixer, norm, SwiGLU, with residuals around both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import LayerState, Mixer
from mmmamba.model.plain import plain
from mmmamba.model.recompute import Recompute, recomputed
from mmmamba.model.rope import Rotation
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
        return rms_norm(x, self.weight, self.eps, compute_dtype(x))


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)). :func:`finish_layer` reads the weights and does the same."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate(x), self.up(x)))
        return out


class Layer(nn.Module):
    """Global layer ``index`` of the model; the layer map says which mixer it has."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        stack = config.stack_of(index)
        self.index = index
        self.input_norm = RMSNorm(config.hidden_size, stack.rms_norm_eps)
        self.mixer = config.build_mixer(index)
        self.mlp_norm = RMSNorm(config.hidden_size, stack.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, stack.intermediate_size)
        self.finish = finish_layer
        self.recompute: Recompute = "none"  # in backward passes

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
        options: dict[str, Any] = {"rotation": rotation, "cu_seqlens": cu_seqlens, "keep_state": keep_state}
        if self.recompute == "layer":
            return recomputed(self._pass, x, state, observe, **options)
        return self._pass(x, state, observe, **options)

    def _pass(
        self, x: Tensor, state: LayerState | None, observe: Observer | None, *, rotation: Rotation, **options: Any
    ) -> tuple[Tensor, LayerState | None]:
        u = self.input_norm(x)
        options["rotation"] = rotation
        seen = None if observe is None else partial(_observed, observe, self.index, u, rotation)
        if not plain(Mixer, self.mixer):
            mixed, new = self.mixer(u, state, observe=seen, **options)
            x = x + mixed
            return x + self.mlp(self.mlp_norm(x)), new
        heads, new = self.mixer.heads(u, state, **options)
        if seen is not None:
            seen(heads)
        return self.rest(x, heads), new

    def rest(self, x: Tensor, heads: Tensor) -> Tensor:
        """All that follows the heads: x (b, l, d), heads (b, l, h, p) → (b, l, d)."""
        return recomputed(self._rest, x, heads) if self.recompute == "mlp" else self._rest(x, heads)

    def _rest(self, x: Tensor, heads: Tensor) -> Tensor:
        out, norm, mlp = self.mixer.o_proj, self.mlp_norm, self.mlp
        if plain(SwiGLU, mlp) and plain(RMSNorm, norm) and plain(nn.Linear, out, mlp.gate, mlp.up, mlp.down):
            weights = (out.weight, out.bias, norm.weight, mlp.gate.weight, mlp.up.weight, mlp.down.weight)
            return self.finish(x, heads, *weights, norm.eps)
        x = x + out(heads.flatten(-2))
        after: Tensor = mlp(norm(x))
        return x + after


def _observed(observe: Observer, index: int, u: Tensor, rotation: Rotation, heads: Tensor) -> None:
    observe(index, u, heads, rotation)


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
    u = rms_norm(x, norm, eps, compute_dtype(x))
    return linear_add(x, swiglu(F.linear(u, gate), F.linear(u, up)), down, fresh=True)
