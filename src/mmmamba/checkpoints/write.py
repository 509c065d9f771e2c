"""Models to folders: the HoVLE layout, the published students' layout, and our own; and one layout into another."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mmmamba.checkpoints import hovle, release, student
from mmmamba.checkpoints.gguf import find_gguf, gguf_tokenizer
from mmmamba.checkpoints.io import CONFIG, WEIGHTS, ShardWriter, cast, not_finite, write_atomically, write_json
from mmmamba.checkpoints.layouts import (
    HOVLE,
    RELEASE,
    SEPARATE,
    STUDENT,
    Layout,
    Part,
    Tensors,
    by_part,
    parts,
    skeleton,
    write_part,
)
from mmmamba.checkpoints.model_source import ASSETS, Source, builtin_names, fingerprint, open_source, resolve
from mmmamba.checkpoints.rounded_tensors import Rounding
from mmmamba.errors import UserError
from mmmamba.foreign_links import refuse_foreign_link
from mmmamba.jsonfile import MAX_TOKENIZER_BYTES, parse_json, read_bytes
from mmmamba.model.config import ModelConfig
from mmmamba.model.model import Model
from mmmamba.outputs import LEDGER, Ledger, record, same

SHARD_BYTES = 2 << 30  # a shard is what writing holds in memory

_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
WRITER = "model"  # by which a folder's ledger knows what was written here


class Saves(Protocol):
    """Anything that writes its files into a folder, such as a Processor."""

    def save(self, folder: Path, /) -> object: ...


def save_hovle(
    model: Model,
    processor: Saves | None,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    overwrite: bool = False,
) -> Path:
    """Write an all-attention model in the HoVLE layout, with the processor's files (``overwrite``: `write_model`)."""
    config = hovle.config_to_hovle(model.config) | {"torch_dtype": _name(dtype)}
    return write_model(out_dir, HOVLE, config, model.config, _parts_of(model, dtype), processor, overwrite=overwrite)


def save_release(
    model: Model,
    processor: Saves | None,
    out_dir: str | Path,
    *,
    fused: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Write a student in the published ones' layout, with the processor's files (``overwrite``: `write_model`)."""
    config = release.config_to_release(model.config) | {"torch_dtype": _name(dtype)}
    layout = RELEASE if fused else SEPARATE
    return write_model(out_dir, layout, config, model.config, _parts_of(model, dtype), processor, overwrite=overwrite)


def save_student(
    model: Model,
    out_dir: str | Path,
    *,
    teacher: str | Path,
    delta: bool | Rounding,
    processor: Saves | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a student in our own layout.

    Args:
        model: the student.
        out_dir: the folder.
        teacher: the built-in name or folder it was made from; its fingerprint is written down.
        delta: store only what differs from the teacher, which is then needed to read the student: as it is, or the
            differences of large matrices rounded to ``int8`` (half of bfloat16), ``int4`` (a quarter), or ``mixed``
            (``int8`` in the mixers, else ``int4``).
        processor: writes the files beside config and weights; without one they are copied from the teacher.
        dtype: of the stored tensors (default: the model's own); A_log and dt_bias are stored in float32.
        overwrite: replace a model that is there (see :func:`write_model`).
    """
    out_dir, folder = Path(out_dir), resolve(teacher)
    if same(out_dir, folder):
        raise UserError(f"{out_dir}: is the teacher's folder; write the student to another")
    dtype = dtype or model.dtype
    read = _parts_of(model, dtype)
    count = sum(map(len, skeleton(model.config, out_dir).values()))
    if delta:
        read, count = delta_of(read, open_source(folder), model.config, None if delta is True else delta)
    config = student.StudentFolder(
        model=model.config, teacher=refer(folder, out_dir), delta=bool(delta), tensors=count, dtype=_name(dtype)
    )
    data = student.folder_to_json(config)
    beside = processor or CopiedFiles(folder)
    return write_model(out_dir, STUDENT, data, model.config, read, beside, overwrite=overwrite)


def refer(teacher: Path, student_folder: Path) -> student.TeacherReference:
    """How a student that is written to ``student_folder`` names the folder of its teacher."""
    builtin = teacher.resolve().parent == ASSETS.resolve() and teacher.name in builtin_names()
    name = teacher.name if builtin else student.reference_path(teacher, student_folder)
    return student.TeacherReference(name=name, fingerprint=fingerprint(teacher))


def delta_of(
    read: Callable[[Part], Tensors], teacher: Source, config: ModelConfig, rounding: Rounding | None
) -> tuple[Callable[[Part], Tensors], int]:
    """Of each part only what the teacher lacks or has with other bits, and how many tensors that is in all.

    Args:
        read: our tensors of a part, as they are.
        teacher: what they are compared with.
        config: what the student is.
        rounding: how large matrices are rounded; None stores them as they are.
    """

    def stored(part: Part) -> Tensors:
        theirs = teacher.read(part)
        delta = student.pick_delta(read(part), theirs)
        return delta if rounding is None else student.round_delta(delta, theirs, rounding)

    count = 0
    for part in parts(config):
        count += len(student.delta_names(student.pick_delta(read(part), teacher.read(part)), rounding))
    return stored, count


def write_model(
    out_dir: str | Path,
    layout: Layout,
    data: Mapping[str, Any],
    config: ModelConfig,
    read: Callable[[Part], Tensors],
    processor: Saves | None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a model part by part; the folder appears when it is whole.

    Args:
        out_dir: the folder; a model that was written here is replaced.
        layout: how to write it down.
        data: the content of ``config.json``.
        config: what the model is.
        read: our tensors of a part, as they are to be stored.
        processor: writes the files beside the weights.
        overwrite: replace another model too; a folder with any file that is no part of one is refused in any case.
    """
    out_dir = Path(out_dir)
    check_target(out_dir, overwrite=overwrite)

    def fill(folder: Path) -> None:
        if processor is not None:
            processor.save(folder)
        write_json(folder / CONFIG, data)
        with ShardWriter(folder, WEIGHTS, SHARD_BYTES) as shards:
            for part in parts(config):
                for name, tensor in write_part(layout, read(part), config, part).items():
                    if wrong := not_finite(tensor):
                        raise UserError(
                            f"{out_dir}: not written: tensor '{name}' has {wrong} values that are not finite "
                            "(NaN or infinity)"
                        )
                    shards.add(name, tensor)
        record(folder, WRITER)

    return write_atomically(out_dir, fill, folder=True)


class CopiedFiles:
    """The files that lie next to config and weights in another folder; of a GGUF file what it holds of them itself.

    A folder may be a stranger's: what is copied is an ordinary file of the folder's own.
    """

    def __init__(self, source: Path) -> None:
        self.source = source

    def save(self, folder: Path, /) -> None:
        gguf = find_gguf(self.source)
        if gguf is not None:
            definition, config = gguf_tokenizer(gguf)
            (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
            write_json(folder / "tokenizer_config.json", config)
            return
        for name in _BESIDE:
            file = self.source / name
            if file.is_symlink() or file.exists():
                content = read_bytes(refuse_foreign_link(file), limit=MAX_TOKENIZER_BYTES)
                (folder / name).write_bytes(content)
                if file.suffix == ".json":
                    data = parse_json(content, file)
                    if isinstance(data, dict) and data.pop("auto_map", None) is not None:  # asks for the folder's code
                        write_json(folder / name, data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts_of(model: Model, dtype: torch.dtype) -> Callable[[Part], Tensors]:
    """The model's tensors of a part on the CPU, as they are stored."""
    found = by_part(model.state_dict(), model.config)
    return lambda part: {name: cast(name, tensor.detach().cpu(), dtype) for name, tensor in found[part].items()}


def check_target(out_dir: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that can't be replaced by a model: one that holds more than a model that was written here.

    Args:
        out_dir: there or not.
        overwrite: also replace a model that somebody else wrote, or changed since.

    Raises:
        UserError: naming the first file that is in the way.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; give a folder to write the model to")
    entries = sorted(out_dir.iterdir()) if out_dir.is_dir() else []
    ledger = Ledger(out_dir, WRITER)
    for entry in entries:
        if entry.name == LEDGER or (entry.is_file() and ledger.wrote(entry.name)):
            continue
        if entry.is_symlink() or not entry.is_file() or not _part_of_a_model(entry.name):
            raise UserError(f"{out_dir}: holds '{entry.name}', which is no part of a model; give a new or empty folder")
        if not overwrite:
            raise UserError(
                f"{out_dir}: holds '{entry.name}', which was not written here or was changed since; "
                "give a new or empty folder, or pass --overwrite to replace that model"
            )


def _part_of_a_model(name: str) -> bool:
    return name in (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", *_BESIDE) or _SHARD.fullmatch(name) is not None
