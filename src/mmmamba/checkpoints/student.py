"""Our own layout: any model of ours, whole or (a student) only what differs from its teacher.

``config.json``::

    {"model_type": "mmmamba", "architectures": ["MMMambaForConditionalGeneration"], "dtype": "bfloat16",
     "model": {… ModelConfig …}, "delta": true, "tensors": 45,
     "teacher": {"name": "nano-teacher" or a path, "fingerprint": "sha256 …"}}

The tensors have our own names. A delta is what training changed: a tensor is stored if the teacher lacks it or has
other bits. transformers reads and writes the same file, so keys that it adds beside ours are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.config import from_dict, to_dict
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig

MODEL_TYPE = "mmmamba"
ARCHITECTURE = "MMMambaForConditionalGeneration"


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
        dtype: of the stored matrices.
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
