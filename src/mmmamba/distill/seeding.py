"""Seeding: a student whose Mamba-2 mixers inherit the attention that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mmmamba.checkpoints.io import cast
from mmmamba.model.config import ModelConfig
from mmmamba.model.layer import Layer
from mmmamba.model.mixers import ATTENTION, MAMBA2, Mamba2Options
from mmmamba.model.mixers.attention import Attention
from mmmamba.model.mixers.mamba2 import Mamba2
from mmmamba.model.model import Model

Init = Literal["mimic", "inherit", "scratch"]
A_RANGE = (1.0, 16.0)  # of Mamba-2's usual start


def seed(
    teacher: Model,
    layer_map: Sequence[str] | None = None,
    mixer: Mamba2Options | None = None,
    *,
    seed: int = 0,
    init: Init = "mimic",
    aligned: Model | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Make a student of ``teacher``: W_q, W_k, W_v copied into each new mixer, everything else shared.

    What the student does not change (embeddings, norms, MLPs, W_o, softmax layers, head) *are* the teacher's modules,
    one copy in memory. New parameters start as the mixer's config says (the published seeding by default).

    ``init`` is what the paper compares in its ablation of the initialisation ("from scratch", "inherit", "inherit +
    mimic"; 1214, 1223 and 1303.5 on MME): ``mimic`` inherits, and starts the new parameters so that the mixer is near
    the attention that it replaces, with a convolution that lets the current token through; ``inherit`` starts what
    attention does not have as Mamba-2 usually does (:func:`_as_mamba2`); ``scratch`` starts the whole mixer so, W_o
    too. The paper does not say how it drew what is random; Mamba-2's own start is our reading.

    Args:
        teacher: a model; its layers that become Mamba-2 must be attention.
        layer_map: ``attention`` or ``mamba2`` per global layer; all Mamba-2 when absent.
        mixer: the mixer's options; the published mixer when absent.
        seed: of the new random parameters; each layer draws from its own stream.
        init: how much of the mixer is inherited, and how the rest starts.
        aligned: a student of the same teacher whose mixers are taken over instead of fresh ones.
        dtype: of the new mixers (default: the teacher's, A_log and dt_bias never below float32). Training a student of
            a bfloat16 teacher takes float32: each parameter is then its own master copy, and autocast casts it.

    Raises:
        ValueError: when the layer map asks for attention where the teacher has none, or has the wrong length; when the
            teacher has no attention to inherit from.
    """
    layer_map = tuple(layer_map) if layer_map is not None else (MAMBA2,) * teacher.config.num_layers
    mixer = mixer or Mamba2Options()
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
            target.mixer = _new_mixer(source.mixer, config, i, generator, init, dtype)
    return student


@torch.no_grad()
def _new_mixer(
    attention: Attention,
    config: ModelConfig,
    index: int,
    generator: torch.Generator,
    init: Init,
    dtype: torch.dtype | None,
) -> Mamba2:
    """A mixer with copies of the attention's q, k, v and its very W_o, unless it starts from scratch."""
    new = Mamba2(config.hidden_size, config.stack_of(index), config.options(MAMBA2))
    new.reset_new_parameters(generator)
    if init != "mimic":
        _as_mamba2(new, generator)
    weight = attention.o_proj.weight
    for name, parameter in new.named_parameters():
        parameter.data = cast(name, parameter.data, dtype or weight.dtype).to(weight.device)
    if init == "scratch":
        return new
    for name in ("q_proj", "k_proj", "v_proj"):
        source, target = getattr(attention, name), getattr(new, name)
        target.weight.copy_(source.weight)
        if target.bias is not None:
            target.bias.copy_(source.bias)
    new.o_proj = attention.o_proj
    return new


def _as_mamba2(mixer: Mamba2, generator: torch.Generator) -> None:
    """Start all of a mixer as Mamba-2's authors start theirs (mamba_ssm/modules/mamba2.py of state-spaces/mamba).

    Projections and convolution as PyTorch's layers begin, uniform in ±1/√fan-in, their biases too; A uniform in
    [1, 16]. The norm's ones, and dt log-uniform in the config's range, are those of ``reset_new_parameters``.
    """

    def draw(parameter: Tensor, low: float, high: float) -> None:
        parameter.copy_(low + (high - low) * torch.rand(parameter.shape, generator=generator))

    for layer in mixer.children():
        if isinstance(layer, nn.Linear):
            for parameter in layer.parameters():
                draw(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5)
    for parameter in mixer.conv.parameters():
        draw(parameter, -(mixer.options.conv_kernel**-0.5), mixer.options.conv_kernel**-0.5)
    draw(mixer.A_log, *A_RANGE)
    mixer.A_log.log_()
