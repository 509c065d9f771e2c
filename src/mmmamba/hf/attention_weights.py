"""The attention weights of a teacher's layers, for callers who want to see them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.errors import UserError
from mmmamba.model.model import Model
from mmmamba.model.rope import Rotation
from mmmamba.model.state import State


class AttentionWeights:
    """Observes a pass and computes each layer's weights. (The kernels never store them.)

    Args:
        mask: (b, l), non-zero for real tokens; None if all are real.
        state: the state from which the pass continues.

    Attributes:
        layers: for each layer (b, h, l, past + l), zero in rows of padding.

    Raises:
        UserError: a layer has no attention; or padded rows continue from a cache, so that columns no longer match the
            caller's.
    """

    def __init__(self, network: Model, mask: Tensor | None, state: State | None) -> None:
        for i in range(network.config.num_layers):
            if not network.mixer(i).attends:
                raise UserError(
                    f"output_attentions: layer {i} is a state space layer, which attends to a state and not to "
                    "tokens: it has no attention weights"
                )
        self.network, self.state = network, state
        self.mask = None if mask is None or bool((mask != 0).all()) else mask != 0
        if state is not None:
            gapless = [flag for layer in state.layers if (flag := layer.gapless()) is not None]
            if self.mask is not None or not all(map(bool, gapless)):
                raise UserError("output_attentions: padded rows that continue from a cache have no columns to show")
        self.layers: list[Tensor] = []

    def __call__(self, index: int, u: Tensor, heads: Tensor, rotation: Rotation) -> None:
        """Add layer ``index``, from the mixer's input u: (b, l, d), or (1, n, d) if padding is left out."""
        mixer = self.network.mixer(index)
        q, k = mixer.queries_and_keys(u, rotation, None if self.state is None else self.state.layers[index])
        if self.mask is not None:
            q, k = self._repad(q), self._repad(k)
        k = k.repeat_interleave(mixer.heads_count // mixer.groups, 2)
        scores = torch.einsum("blhp,bmhp->bhlm", q, k) * mixer.head_dim**-0.5
        new, seen = scores.shape[-2:]
        hidden = torch.ones(new, seen, dtype=torch.bool, device=u.device).triu(seen - new + 1)
        if self.mask is not None:
            hidden = hidden | ~self.mask[:, None, None, :]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        self.layers.append(weights if self.mask is None else weights.nan_to_num() * self.mask[:, None, :, None])

    def _repad(self, x: Tensor) -> Tensor:
        """(1, n, h, p) → (b, l, h, p), zeros at the padding."""
        assert self.mask is not None
        out = x.new_zeros(*self.mask.shape, *x.shape[2:])
        out[self.mask] = x[0]
        return out
