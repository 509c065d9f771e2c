"""Our own layout: a student folder, either whole or only what differs from its teacher.

``config.json``::

    {"model_type": "mmmamba", "model": {… ModelConfig …}, "delta": true, "tensors": 45,
     "teacher": {"name": "nano-teacher" or a path, "fingerprint": "sha256 …"}}

A delta is what training changed: a tensor is stored if the teacher lacks it or has other bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints.io import cast
from mmmamba.config import from_dict, to_dict
from mmmamba.model.config import ModelConfig

MODEL_TYPE = "mmmamba"


@dataclass(frozen=True, kw_only=True)
class TeacherReference:
    """Which teacher a student was made from: a built-in name or a path, and the fingerprint of its folder."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class StudentFolder:
    """The ``config.json`` of a student folder.

    Attributes:
        model: the network.
        teacher: where the student comes from; a delta can't be read without it.
        delta: only what differs from the teacher is stored.
        tensors: how many tensors the weight file holds.
    """

    model: ModelConfig
    teacher: TeacherReference
    delta: bool
    tensors: int
    model_type: str = field(default=MODEL_TYPE)


def folder_from_json(data: Mapping[str, Any], where: str | Path) -> StudentFolder:
    return from_dict(StudentFolder, data, where)


def folder_to_json(folder: StudentFolder) -> dict[str, Any]:
    return {"model_type": folder.model_type, **to_dict(folder)}


def pick_delta(state: Mapping[str, Tensor], teacher: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of ``state``, in their storage dtype, that the teacher lacks or has with other bits."""
    stored = {name: cast(name, tensor.detach().cpu(), dtype) for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in stored.items()
        if name not in teacher or not same_bits(tensor, cast(name, teacher[name], dtype))
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
