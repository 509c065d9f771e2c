"""Seeding: a student whose new mixers inherit the attention that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmmamba.checkpoints.io import cast
from mmmamba.model.config import ModelConfig
from mmmamba.model.layer import Layer
from mmmamba.model.mixers import Init, Mixer, Options, default_options, kind_named, kind_of
from mmmamba.model.model import Model


def seed(
    teacher: Model,
    layer_map: Sequence[str] | None = None,
    mixer: Options | None = None,
    *,
    seed: int = 0,
    init: Init = "mimic",
    aligned: Model | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Make a student of ``teacher``: W_q, W_k, W_v copied into each new mixer, everything else shared.

    What the student does not change (embeddings, norms, MLPs, W_o, softmax layers, head) *are* the teacher's modules,
    one copy in memory. New parameters start as the mixer's options say (the published seeding by default).

    ``init`` is what the paper compares in its ablation of the initialisation ("from scratch", "inherit", "inherit +
    mimic"; 1214, 1223 and 1303.5 on MME): ``mimic`` inherits, and starts the new parameters so that the mixer is near
    the attention that it replaces; ``inherit`` starts what attention does not have as the mixer's authors do
    (:meth:`mmmamba.model.mixers.Mixer.start_from_scratch`); ``scratch`` starts the whole mixer so, W_o too. The paper
    does not say how it drew what is random; the authors' own start is our reading.

    Args:
        teacher: a model; its layers that become new must be attention.
        layer_map: the kind of each global layer; all new when absent.
        mixer: the options of the new layers, which also say their kind; the published Mamba-2 when absent.
        seed: of the new random parameters; each layer draws from its own stream.
        init: how much of the mixer is inherited, and how the rest starts.
        aligned: a student of the same teacher whose mixers are taken over instead of fresh ones.
        dtype: of the new mixers (default: the teacher's; some parameters never below float32). Training a student of
            a bfloat16 teacher takes float32: each parameter is then its own master copy, and autocast casts it.

    Raises:
        ValueError: when the layer map asks for attention where the teacher has none, or has the wrong length; when the
            teacher has no attention to inherit from.
    """
    mixer = mixer or default_options()
    layer_map = tuple(layer_map) if layer_map is not None else (kind_of(mixer).name,) * teacher.config.num_layers
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
        if not kind_named(kind).seeded:
            if teacher.config.layer_map[i] != kind:
                raise ValueError(f"layer {i}: the layer map keeps softmax, the teacher has none there")
            target.mixer = source.mixer
        elif aligned is not None:
            target.mixer = aligned.mixer(i)
        else:
            if source.mixer.seeded:
                raise ValueError(f"layer {i}: the teacher has no attention there to inherit from")
            generator = torch.Generator().manual_seed(seed * 100_003 + i)
            target.mixer = _new_mixer(source.mixer, config, i, generator, init, dtype)
    return student


@torch.no_grad()
def _new_mixer(
    attention: Mixer,
    config: ModelConfig,
    index: int,
    generator: torch.Generator,
    init: Init,
    dtype: torch.dtype | None,
) -> Mixer:
    """A mixer with copies of the attention's q, k, v and its very W_o, unless it starts from scratch."""
    new = config.build_mixer(index)
    new.reset_new_parameters(generator)
    if init != "mimic":
        new.start_from_scratch(generator)
    weight = attention.o_proj.weight
    for name, parameter in new.named_parameters():
        parameter.data = cast(name, parameter.data, dtype or weight.dtype).to(weight.device)
    if init != "scratch":
        new.inherit(attention)
    return new
