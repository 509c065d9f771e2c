"""Models to folders: the HoVLE layout, the published students' layout, and our student folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba.checkpoints import hovle, release, student
from mmmamba.checkpoints.io import CONFIG, WEIGHTS, cast, write_atomically, write_json, write_safetensors
from mmmamba.checkpoints.read import ASSETS, builtin_names, fingerprint, read_state, resolve, stored_state
from mmmamba.errors import UserError
from mmmamba.model.model import Model

# What a model folder may hold; a folder with anything else in it is not replaced.
_OURS = ("*config.json", "*.safetensors", "*.safetensors.index.json", "*token*", "vocab*", "merges.txt", "*.md")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Saves(Protocol):
    """Anything that writes its files into a folder, such as a Processor."""

    def save(self, folder: Path, /) -> object: ...


def save_hovle(
    model: Model, processor: Saves | None, out_dir: str | Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write an all-attention model in the HoVLE layout, with the processor's files."""
    config = hovle.config_to_hovle(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = hovle.to_hovle(_stored(model, dtype), model.config)
    return _write(out_dir, config, tensors, processor)


def save_release(
    model: Model,
    processor: Saves | None,
    out_dir: str | Path,
    *,
    fused: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a student in the layout of the published ones, with the processor's files."""
    config = release.config_to_release(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = release.to_release(_stored(model, dtype), model.config, fused=fused)
    return _write(out_dir, config, tensors, processor)


def save_student(
    model: Model,
    out_dir: str | Path,
    *,
    teacher: str | Path,
    delta: bool,
    processor: Saves | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a student folder of ours.

    Args:
        model: the student.
        out_dir: the folder; a model that is there is replaced.
        teacher: the built-in name or folder it was made from; its fingerprint is written down.
        delta: store only what differs from the teacher, which is then needed to read the student.
        processor: writes the tokenizer's files; without one they are copied from the teacher.
        dtype: of the stored tensors (default: the model's own); A_log and dt_bias are stored in float32.
    """
    out_dir, folder = Path(out_dir), resolve(teacher)
    if out_dir.resolve() == folder.resolve():
        raise UserError(f"{out_dir}: is the teacher's folder; write the student to another")
    dtype = dtype or model.dtype
    if delta:
        state = stored_state(model.state_dict(), model.config)
        tensors = student.pick_delta(state, read_state(folder)[1], dtype)
    else:
        tensors = _stored(model, dtype)
    builtin = folder.resolve().parent == ASSETS.resolve() and folder.name in builtin_names()
    reference = student.TeacherReference(
        name=folder.name if builtin else student.reference_path(folder, out_dir), fingerprint=fingerprint(folder)
    )
    config = student.StudentFolder(model=model.config, teacher=reference, delta=delta, tensors=len(tensors))
    return _write(out_dir, student.folder_to_json(config), tensors, processor or _Copied(folder))


class _Copied:
    """The tokenizer's files of another folder."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def save(self, folder: Path, /) -> None:
        for name in _TOKENIZER:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)


def _stored(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors on the CPU, as they are stored."""
    state = stored_state(model.state_dict(), model.config)
    return {name: cast(name, tensor.detach().cpu(), dtype) for name, tensor in state.items()}


def _write(
    out_dir: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], processor: Saves | None
) -> Path:
    out_dir = Path(out_dir)
    _refuse_foreign(out_dir)

    def fill(folder: Path) -> None:
        if processor is not None:
            processor.save(folder)
        write_json(folder / CONFIG, config)
        write_safetensors(folder / WEIGHTS, tensors)

    return write_atomically(out_dir, fill, folder=True)


def _refuse_foreign(out_dir: Path) -> None:
    """Writing replaces the folder, so it must hold a model and nothing else."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; give a folder to write the model to")
    entries = sorted(out_dir.iterdir()) if out_dir.is_dir() else []
    for entry in entries:
        if not entry.is_file() or not any(entry.match(pattern) for pattern in _OURS):
            raise UserError(f"{out_dir}: holds '{entry.name}', which is no part of a model; give a new or empty folder")
