"""Whom to measure: teacher, linear and hybrid of one geometry, with random weights or from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmmamba.checkpoints import load, read_config
from mmmamba.checkpoints.io import cast
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig, VisionConfig, student_layer_map
from mmmamba.model.geometries import geometry
from mmmamba.model.mixers import Mamba2Options
from mmmamba.model.model import Model
from mmmamba.model.stack import StackConfig

Kind = Literal["teacher", "linear", "hybrid"]
Style = Literal["engine", "published", "published, mask", "int8"]

KINDS: tuple[Kind, ...] = ("teacher", "linear", "hybrid")
MIXER = Mamba2Options(rope=True, conv_activation="none")  # of students with random weights
SOFTMAX_EVERY = 4  # a hybrid keeps layers 0, 4, 8, …: the paper's 8 of 32
#: Fields of a config that decide what a network costs, beside the sizes of its stacks and of its pictures.
SIZES = ("hidden_size", "vocab_size")
STACK_SIZES = ("num_layers", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network to measure. ``source``: its checkpoint; None for random weights."""

    label: str
    kind: Kind
    config: ModelConfig
    source: str | None = None

    def open(self, device: torch.device, dtype: torch.dtype, seed: int) -> Model:
        """The network, on ``device``, nothing of it to be trained."""
        if self.source is None:
            return random_model(self.config, device, dtype, seed)
        return load(self.source, dtype=dtype, device=device).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of the plots: a subject, run in one style.

    ``engine``: as this package serves it. ``published``: the teacher with a cache that is concatenated again for every
    token, no graph; ``published, mask``: the same, called with an attention mask. ``int8``: the engine again, whose
    decoding steps read int8 copies of the matrices.
    """

    label: str
    subject: str
    kind: Kind
    style: Style = "engine"

    @property
    def published(self) -> bool:
        return self.style.startswith("published")


def random_subjects(name: str) -> list[Subject]:
    """Teacher, linear and hybrid of the geometry called ``name``.

    Raises:
        UserError: when there is no such geometry.
    """
    return [_random(kind, geometry(name), kind) for kind in KINDS]


def given_subjects(models: Sequence[str]) -> list[Subject]:
    """The models in some folders, and before them a teacher of random weights where none of them is one.

    Raises:
        UserError: when a model cannot be read, is named twice, or is of another size than the first.
    """
    subjects: list[Subject] = []
    for model in models:
        config, label = read_config(model), Path(model).name or model
        if label in (subject.label for subject in subjects):
            raise UserError(f"two models are called '{label}': the report would not tell them apart")
        subjects.append(Subject(label=label, kind=kind_of(config), config=config, source=model))
    for other in subjects[1:]:
        difference = _difference(subjects[0].config, other.config)
        if difference:
            raise UserError(
                f"{subjects[0].source} and {other.source} are of different geometries ({difference}): "
                "measure them in two reports"
            )
    if all(subject.kind != "teacher" for subject in subjects):
        subjects.insert(0, _random("teacher", subjects[0].config, "teacher (random weights)"))
    return subjects


def series_of(subjects: Sequence[Subject]) -> list[Series]:
    """Each subject as the engine serves it. After it comes a teacher in the two published styles, then each in int8.

    int8 comes last: its copies of the matrices stay in memory until their model goes, beside no other style's points.
    """
    names: dict[Style, str] = {
        "engine": "",
        "published": ", published style",
        "published, mask": ", published style, mask",
        "int8": ", int8 weights",
    }
    return [
        Series(label=subject.label + name, subject=subject.label, kind=subject.kind, style=style)
        for subject in subjects
        for style, name in names.items()
        if subject.kind == "teacher" or style in ("engine", "int8")
    ]


def kind_of(config: ModelConfig) -> Kind:
    if not config.new_layers:
        return "teacher"
    return "hybrid" if config.attention_layers else "linear"


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Model:
    """A network of random weights, each layer of which keeps the scale of what passes through it."""
    with torch.device("meta"):
        model = Model(config)
    model = model.to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
        parameter.normal_(std=scale, generator=generator)
    for index in config.new_layers:
        mixer = model.mixer(index)
        for name, parameter in mixer.named_parameters():
            parameter.data = cast(name, parameter.data, dtype)
        mixer.reset_new_parameters(torch.Generator().manual_seed(seed))
    layers: Any = model.layers
    for norm in (*(n for layer in layers for n in (layer.input_norm, layer.mlp_norm)), model.norm):
        norm.weight.fill_(1.0)
    if config.tie_word_embeddings:  # to_empty made two parameters of one
        model.head.weight = model.text_embeddings.weight
    return model


def _random(kind: Kind, config: ModelConfig, label: str) -> Subject:
    kept = {"teacher": range(config.num_layers), "linear": (), "hybrid": range(0, config.num_layers, SOFTMAX_EVERY)}
    layer_map = student_layer_map(config.num_layers, kept[kind], MIXER)
    image = config.img_context_token_id if config.img_context_token_id >= 0 else config.vocab_size - 1
    config = replace(config, layer_map=layer_map, mixer=MIXER, img_context_token_id=image)
    return Subject(label=label, kind=kind, config=config)


def _difference(one: ModelConfig, other: ModelConfig) -> str:
    """The first size in which two networks differ, with both values; '' when there is none."""
    for name in SIZES:
        if getattr(one, name) != getattr(other, name):
            return f"{name} {getattr(one, name)} and {getattr(other, name)}"
    for stack in ("embedding", "decoder"):
        a: StackConfig = getattr(one, stack)
        b: StackConfig = getattr(other, stack)
        for name in STACK_SIZES:
            if (a.num_layers or b.num_layers) and getattr(a, name) != getattr(b, name):
                return f"{stack}.{name} {getattr(a, name)} and {getattr(b, name)}"
    if one.vision is None or other.vision is None:
        return "" if one.vision is other.vision else "one of them reads text only"
    for field in fields(VisionConfig):
        if getattr(one.vision, field.name) != getattr(other.vision, field.name):
            return f"vision.{field.name} {getattr(one.vision, field.name)} and {getattr(other.vision, field.name)}"
    return ""
