"""The teacher decoded as the published code decodes it: the baseline that the paper's headline is measured against.

For every token each layer's cache is concatenated again. The old cache lives until the pass is over, as it does in a
tuple that the caller passes in and gets back. Operators run as they come, one launch each. The cache is attended with
FlashAttention, through SDPA. Called with an attention mask, the published code removes padding from the cache in every
layer, whether there is any or not: it asks the host for the indices of the tokens, then copies keys and values.

It is the published way on our modules, not the published code, and so kinder to the teacher: no rotary tables in
memory, fewer launches a layer, logits in the weights' number format.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmmamba.model.layer import Layer
from mmmamba.model.mixers.attention import Attention
from mmmamba.model.model import Model
from mmmamba.model.rope import Rotation, rotation

#: Flash first, as published; what it cannot do (float32) goes to the others. cuDNN's came later.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Cache = list[tuple[Tensor, Tensor]]


class PublishedDecoder:
    """One sequence after ``context`` random tokens, decoded in the published way.

    Args:
        model: softmax attention in every layer.
        context: tokens that the cache holds at the start.
        mask: call every layer with an attention mask of ones.
    """

    def __init__(self, model: Model, context: int, *, mask: bool = False) -> None:
        if model.config.new_layers:
            raise ValueError("the published way of decoding is the teacher's: every layer must be attention")
        self.model, self.length = model, context
        weight = model.head.weight
        self.mask = torch.ones(1, context, dtype=torch.long, device=weight.device) if mask else None
        self.cache: Cache = []
        for layer in model.layers:
            assert isinstance(layer, Layer)
            shape = (1, layer.mixer.groups, context, layer.mixer.head_dim)  # (b, g, L, p)
            k, v = (weight.new_empty(shape).normal_() for _ in range(2))
            self.cache.append((k, v))

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.cache)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed a token (1,); the logits (1, v) after it."""
        model, config = self.model, self.model.config
        at = torch.full((1, 1), self.length, dtype=torch.long, device=tokens.device)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(1, 1)], dim=1)
        x = model.embed(tokens[None])
        stacks = (config.embedding, config.decoder)
        turns = [rotation(stack, at, self.length + 1, x.dtype) if stack.num_layers else None for stack in stacks]
        new: Cache = []  # beside the old one, until the pass is over
        with sdpa_kernel(BACKENDS) if x.is_cuda else nullcontext():
            for layer, (k, v) in zip(model.layers, self.cache, strict=True):
                assert isinstance(layer, Layer)
                turn = turns[layer.index >= config.embedding.num_layers]
                assert turn is not None
                x, kept = self._layer(layer, x, k, v, turn)
                new.append(kept)
        self.cache = new
        self.length += 1
        return model.head(model.norm(x))[:, -1]

    def _layer(
        self, layer: Layer, x: Tensor, k: Tensor, v: Tensor, turn: Rotation
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixer = cast(Attention, layer.mixer)  # as every layer's is
        q, new_k, new_v = mixer.qkv(layer.input_norm(x), turn)
        k = torch.cat([k, new_k.transpose(1, 2)], dim=2)
        v = torch.cat([v, new_v.transpose(1, 2)], dim=2)
        seen_k, seen_v = (k, v) if self.mask is None else (_without_padding(t, self.mask) for t in (k, v))
        grouped = mixer.heads_count != mixer.groups
        y = F.scaled_dot_product_attention(q.transpose(1, 2), seen_k, seen_v, enable_gqa=grouped)
        return layer.rest(x, y.transpose(1, 2)), (k, v)


def _without_padding(cache: Tensor, mask: Tensor) -> Tensor:
    """The tokens of a cache (1, g, L, p) that a mask (1, L) keeps, copied out; waits for the device, as published."""
    indices = mask.flatten().nonzero().flatten()
    return cache.transpose(1, 2).flatten(0, 1)[indices][None].transpose(1, 2)
