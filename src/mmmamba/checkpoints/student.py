"""Our own layout: any model of ours, whole or (a student) only what differs from its teacher.

``config.json``::

    {"model_type": "mmmamba", "architectures": ["MMMambaForConditionalGeneration"], "dtype": "bfloat16",
     "model": {… ModelConfig …}, "delta": true, "tensors": 45,
     "teacher": {"name": "nano-teacher" or a path, "fingerprint": "sha256 …"}}

The tensors have our own names. A delta is what training changed: a tensor is stored if the teacher lacks it or has
other bits, as it is or (a matrix) as its rounded difference: :mod:`mmmamba.checkpoints.rounded_tensors`. transformers
reads and writes the same file, so keys that it adds beside ours are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints.io import Weights, cast
from mmmamba.checkpoints.rounded_tensors import (
    SCALES,
    Rounding,
    form_for,
    form_of,
    read_rounded,
    round_tensor,
    stored_rounded,
    worth_rounding,
)
from mmmamba.config_files import from_dict, to_dict
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig

MODEL_TYPE = "mmmamba"
ARCHITECTURE = "MMMambaForConditionalGeneration"
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class TeacherReference:
    """Which teacher a student was made from: a built-in name or a path, and the fingerprint of its folder."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class StudentFolder:
    """What we read and write in the ``config.json`` of a folder of ours.

    Attributes:
        model: the network.
        teacher: where a student comes from; a delta can't be read without it.
        delta: only what differs from the teacher is stored.
        tensors: how many tensors are stored (null: not said).
        dtype: of the matrices, also of those that are stored as rounded differences.
    """

    model: ModelConfig
    teacher: TeacherReference | None = None
    delta: bool = False
    tensors: int | None = None
    dtype: str | None = None
    architectures: tuple[str, ...] = (ARCHITECTURE,)
    model_type: str = MODEL_TYPE


def folder_from_json(data: Mapping[str, Any], where: str | Path) -> StudentFolder:
    ours = {field.name for field in fields(StudentFolder)}
    folder = from_dict(StudentFolder, {key: value for key, value in data.items() if key in ours}, where)
    if folder.delta and folder.teacher is None:
        raise UserError(f"{where}: 'teacher' is missing: a delta is completed from it")
    if folder.dtype is not None and folder.dtype not in DTYPES:
        raise UserError(f"{where}: 'dtype' is {folder.dtype!r}; known: {', '.join(DTYPES)}")
    return folder


def folder_to_json(folder: StudentFolder) -> dict[str, Any]:
    return {"model_type": folder.model_type, **to_dict(folder)}


def read_student(state: Mapping[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """Our tensors of a part, which are stored under their own names."""
    prefix = "layers." if part is None else f"layers.{part}."
    return {name: state[name] for name in state if name.startswith(prefix) == (part is not None)}


def write_student(ours: dict[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """The inverse of :func:`read_student`."""
    out = dict(ours)
    ours.clear()
    return out


def pick_delta(stored: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, as they are to be stored, that the teacher lacks or has with other bits."""
    return {
        name: tensor
        for name, tensor in stored.items()
        if name not in teacher or not same_bits(tensor, teacher[name].to(tensor.dtype))
    }


def round_delta(delta: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rounding: Rounding) -> dict[str, Tensor]:
    """A part's delta as it is stored, large matrices rounded."""
    stored: dict[str, Tensor] = {}
    for name, tensor in delta.items():
        if worth_rounding(tensor):
            stored |= round_tensor(name, tensor, _base(teacher, name, tensor.shape), form_for(name, rounding))
        else:
            stored[name] = tensor
    return stored


def delta_names(delta: Mapping[str, Tensor], rounding: Rounding | None) -> list[str]:
    """The names under which a part's delta is stored."""
    return [
        name
        for key, tensor in delta.items()
        for name in (
            stored_rounded(key, tensor.shape, form_for(key, rounding)) if rounding and worth_rounding(tensor) else [key]
        )
    ]


def delta_shapes(expected: Mapping[str, torch.Size], stored: Container[str]) -> dict[str, torch.Size]:
    """``expected``, with the codes and scales of each tensor that is stored rounded in its place."""
    found: dict[str, torch.Size] = {}
    for name, shape in expected.items():
        form = form_of(name, stored)
        found |= {name: shape} if form is None else stored_rounded(name, shape, form)
    return found


def complete_delta(
    stored: Weights, teacher: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A part of a student from what its delta stores and the teacher's part.

    Args:
        stored: the delta's tensors; names and shapes have been checked.
        teacher: the teacher's tensors of the part.
        shapes: name → shape of every tensor of the part.
        dtype: of what is put together from rounded differences.

    Raises:
        UserError: when a scale is so large that a value overflows.
    """
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name in stored:
            found[name] = stored[name]
        elif form_of(name, stored) is None:
            found[name] = teacher[name]
        else:
            found[name] = cast(name, read_rounded(stored, name, shape, _base(teacher, name, shape)), dtype)
            if not found[name].isfinite().all():
                raise UserError(f"{stored.files[f'{name}.{SCALES}']}: the scales of '{name}' give values that overflow")
    return found


def _base(teacher: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor | None:
    """What a rounded difference is added to."""
    return teacher[name] if name in teacher and teacher[name].shape == shape else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes (0.0 and -0.0 differ; a NaN equals itself)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def reference_path(teacher: Path, student: Path) -> str:
    """How a student at ``student`` writes down the folder ``teacher``: relative when both lie under one parent."""
    teacher, student = teacher.absolute(), student.absolute()
    shared = student.parent in teacher.parents
    return Path(os.path.relpath(teacher, student)).as_posix() if shared else str(teacher)
