"""Seeding: a student whose Mamba-2 mixers inherit the attention that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmmamba.model.attention import Attention
from mmmamba.model.config import ATTENTION, MAMBA2, MixerConfig, ModelConfig
from mmmamba.model.layer import Layer
from mmmamba.model.mamba2 import Mamba2
from mmmamba.model.model import Model


def seed(
    teacher: Model,
    layer_map: Sequence[str] | None = None,
    mixer: MixerConfig | None = None,
    *,
    seed: int = 0,
    aligned: Model | None = None,
) -> Model:
    """Make a student of ``teacher``: W_q, W_k, W_v copied into each new mixer, everything else shared.

    What the student does not change (embeddings, norms, MLPs, W_o, softmax layers, head) *are* the teacher's modules,
    one copy in memory. New parameters start as the mixer's config says (the published seeding by default).

    Args:
        teacher: a model; its layers that become Mamba-2 must be attention.
        layer_map: ``attention`` or ``mamba2`` per global layer; all Mamba-2 when absent.
        mixer: the mixer's options; the published mixer when absent.
        seed: of the new random parameters; each layer draws from its own stream.
        aligned: a student of the same teacher whose mixers are taken over instead of fresh ones.

    Raises:
        ValueError: when the layer map asks for attention where the teacher has none, or has the wrong length; when the
            teacher has no attention to inherit from.
    """
    layer_map = tuple(layer_map) if layer_map is not None else (MAMBA2,) * teacher.config.num_layers
    mixer = mixer or MixerConfig()
    config = replace(teacher.config, layer_map=layer_map, mixer=mixer)
    with torch.device("meta"):
        student = Model(config)
    for name in ("vision", "text_embeddings", "special_embeddings", "norm", "head"):
        setattr(student, name, getattr(teacher, name))
    for i, kind in enumerate(layer_map):
        source, target = teacher.layers[i], student.layers[i]
        assert isinstance(source, Layer) and isinstance(target, Layer)
        for name in ("input_norm", "mlp_norm", "mlp"):
            setattr(target, name, getattr(source, name))
        if kind == ATTENTION:
            if teacher.config.layer_map[i] != ATTENTION:
                raise ValueError(f"layer {i}: the layer map keeps softmax, the teacher has none there")
            target.mixer = source.mixer
        elif aligned is not None:
            target.mixer = aligned.mixer(i)
        else:
            if not isinstance(source.mixer, Attention):
                raise ValueError(f"layer {i}: the teacher has no attention there to inherit from")
            generator = torch.Generator().manual_seed(seed * 100_003 + i)
            target.mixer = _inherit(source.mixer, config, i, generator)
    return student


@torch.no_grad()
def _inherit(attention: Attention, config: ModelConfig, index: int, generator: torch.Generator) -> Mamba2:
    """A mixer with copies of the attention's q, k, v and its very W_o."""
    new = Mamba2(config.hidden_size, config.stack_of(index), config.mixer)
    new.reset_new_parameters(generator)
    new.to(attention.o_proj.weight.device, attention.o_proj.weight.dtype)
    for name in ("q_proj", "k_proj", "v_proj"):
        source, target = getattr(attention, name), getattr(new, name)
        target.weight.copy_(source.weight)
        if target.bias is not None:
            target.bias.copy_(source.bias)
    new.o_proj = attention.o_proj
    return new
