"""The table of layouts: how a folder is recognised, and which functions read and write its parts.

A *part* of a model is what is converted at a time, so that no checkpoint need be in memory whole: ``None`` is all that
lies outside the layers, ``i`` is global layer i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmmamba.checkpoints import hovle, llama, release, solo, student
from mmmamba.errors import UserError
from mmmamba.jsonfile import shown
from mmmamba.model.config import ModelConfig
from mmmamba.model.model import Model

T = TypeVar("T")
Part = int | None
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout: one way to store a model in a folder.

    Attributes:
        name: the name that a user gives it.
        fits: whether a parsed ``config.json`` has this layout.
        config: makes our config from one, given the path to name in messages.
        read: (their tensors, config, part) → our tensors of the part.
        write: (our tensors of the part, config, part) → theirs. What the layout cannot hold stays in the first
            argument.
        unused: whether nothing reads a stored tensor of this name.
        reason: why a tensor may be missing or unexpected ('' when there is nothing to add).
    """

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    config: Callable[[Mapping[str, Any], str | Path], ModelConfig]
    read: Callable[[Mapping[str, Tensor], ModelConfig, Part], Tensors]
    write: Callable[[Tensors, ModelConfig, Part], Tensors]
    unused: Callable[[str, ModelConfig], bool] = lambda name, config: False
    reason: Callable[[str], str] = lambda name: ""


STUDENT = Layout(
    name="mmmamba",
    fits=lambda data: data.get("model_type") == student.MODEL_TYPE,
    config=lambda data, where: student.folder_from_json(data, where).model,
    read=student.read_student,
    write=student.write_student,
)
RELEASE = Layout(
    name="mmmamba-release",
    fits=lambda data: data.get("model_type") == release.MODEL_TYPE,
    config=release.config_from_release,
    read=release.read_release,
    write=release.write_release,
    unused=lambda name, config: name == hovle.UNUSED,
    reason=release.reason,
)
HOVLE = Layout(
    name="hovle",
    fits=lambda data: "embedding_config" in data and "llm_config" in data,
    config=hovle.config_from_hovle,
    read=hovle.read_hovle,
    write=hovle.write_hovle,
    unused=lambda name, config: name == hovle.UNUSED,
    reason=release.reason,
)
SOLO = Layout(
    name="solo",
    fits=solo.is_solo,
    config=solo.config_from_solo,
    read=solo.read_solo,
    write=solo.write_solo,
    unused=llama.unused,
)
LLAMA = Layout(
    name="llama",
    fits=lambda data: data.get("model_type") in llama.FAMILIES,
    config=llama.config_from_llama,
    read=llama.read_llama,
    write=llama.write_llama,
    unused=llama.unused,
)
SEPARATE = replace(RELEASE, write=partial(release.write_release, fused=False))  # like the published trainer
LAYOUTS = (STUDENT, RELEASE, HOVLE, SOLO, LLAMA)  # SOLO's model_type is Mistral's, so SOLO comes first


def recognise(data: Mapping[str, Any], where: Path) -> Layout:
    """Find the layout of a parsed ``config.json``."""
    if not isinstance(data.get("model_type", ""), (str, type(None))):
        raise UserError(f"{where}: 'model_type' must be a text, got {shown(data['model_type'])}")
    for layout in LAYOUTS:
        if layout.fits(data):
            return layout
    raise UserError(
        f"{where}: model_type {data.get('model_type')!r} is not known: this is neither a HoVLE folder "
        f"('embedding_config' and 'llm_config'), a published student ('{release.MODEL_TYPE}'), one of ours "
        f"('{student.MODEL_TYPE}') nor a text decoder ({', '.join(llama.FAMILIES)})"
    )


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """All parts of a model, in the order in which they are written."""
    return (None, *range(config.num_layers))


def part_of(name: str) -> Part:
    """The part that our parameter ``name`` belongs to."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def by_part(state: Mapping[str, T], config: ModelConfig) -> dict[Part, dict[str, T]]:
    """A state dict of ours (or any values under its names), part by part. A tied head is not a separate parameter."""
    found: dict[Part, dict[str, T]] = {part: {} for part in parts(config)}
    for name, tensor in state.items():
        if not (name == "head.weight" and config.tie_word_embeddings):
            found[part_of(name)][name] = tensor
    return found


def skeleton(config: ModelConfig, where: str | Path) -> dict[Part, Tensors]:
    """Meta tensors of every parameter that ``config`` needs, part by part."""
    try:
        with torch.device("meta"):
            state = Model(config).state_dict()
    except UserError:
        raise
    except ValueError as refusal:
        raise UserError(f"{where}: {refusal}") from refusal
    return by_part(state, config)


def write_part(layout: Layout, ours: Tensors, config: ModelConfig, part: Part) -> Tensors:
    """All of our tensors of a part, in ``layout``.

    Raises:
        UserError: naming what the layout cannot hold.
    """
    left = dict(ours)
    theirs = layout.write(left, config, part)
    if left:
        raise UserError(
            f"the {layout.name} layout has no place for {len(left)} parameters ({', '.join(sorted(left)[:3])})"
        )
    return theirs


def stored_shapes(layout: Layout, config: ModelConfig, where: str | Path) -> dict[str, torch.Size]:
    """Name → shape of every tensor that a folder of ``layout`` must have."""
    expected: dict[str, torch.Size] = {}
    for part, ours in skeleton(config, where).items():
        theirs = write_part(layout, ours, config, part)
        expected |= {name: tensor.shape for name, tensor in theirs.items() if not layout.unused(name, config)}
    return expected
