"""Folders to models: which layout a folder has, whether it is complete, and the network it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints import hovle, release, student
from mmmamba.checkpoints.io import (
    CONFIG,
    Weights,
    cast,
    check_tensors,
    clear_leftovers,
    read_json,
    read_weights,
    weight_files,
)
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.model import Model

ASSETS = Path(__file__).parent.parent / "assets"
ALIASES = {"nano": "nano-teacher", "pico": "pico-teacher"}


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """The model in a folder, in eval mode.

    Args:
        path: a folder (HoVLE layout, a published student, or our student folder) or a built-in name.
        dtype: of the parameters; A_log and dt_bias stay in float32.
        device: where the model goes.

    Raises:
        UserError: naming the folder, the file and the tensor or field that is wrong.
    """
    folder = resolve(path)
    config, state = read_state(folder)
    with torch.device("meta"):  # no memory, no random numbers: every parameter is assigned below
        model = Model(config)
    own = {name: _own_copy(tensor, cast(name, tensor, dtype).to(device)) for name, tensor in state.items()}
    if config.tie_word_embeddings:
        own["head.weight"] = own["text_embeddings.weight"]
    model.load_state_dict(own, assign=True)
    if config.tie_word_embeddings:  # assign=True made two parameters of one tensor
        model.head.weight = model.text_embeddings.weight
    return model.eval()


def _own_copy(read: Tensor, converted: Tensor) -> Tensor:
    """``converted``, sharing no memory with the tensor that was read (which may be a view of the file)."""
    return converted.clone() if converted.data_ptr() == read.data_ptr() else converted


def resolve(path: str | Path) -> Path:
    """The folder of a model: a path, or the asset folder of a built-in name.

    A built-in name wins over a folder of that name: say ``./nano`` for the folder.
    """
    name = str(path)
    builtin = ASSETS / ALIASES.get(name, name)
    if name in ALIASES or name in builtin_names():
        if not builtin.is_dir():
            raise UserError(f"the built-in model '{builtin.name}' is not part of this installation {_known()}")
        return builtin
    folder = Path(path).expanduser()
    if not folder.exists() and folder.name:
        clear_leftovers(folder.parent, folder.name)  # a writer may have been killed after moving the old one aside
    if not folder.exists():
        raise UserError(f"'{path}' is neither a folder nor a built-in model {_known()}")
    if not folder.is_dir():
        raise UserError(f"{path}: is a file; give the folder that holds {CONFIG} and the weights")
    return folder


def builtin_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(entry.name for entry in ASSETS.iterdir() if (entry / CONFIG).is_file()) if ASSETS.is_dir() else []


def _known() -> str:
    names = builtin_names()
    return f"(built-in: {', '.join(names)})" if names else "(no built-in models are installed)"


def fingerprint(path: str | Path) -> str:
    """sha256 over the names and bytes of ``config.json`` and all weight files of a model's folder."""
    folder = resolve(path)
    files = [folder / CONFIG, *weight_files(folder)]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_config(path: str | Path) -> ModelConfig:
    """The config of the model in a folder, whatever its layout."""
    return _read_folder(resolve(path))[1]


def read_state(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors of a folder, under our names, on the CPU in the dtype they are stored in."""
    folder = resolve(path)
    layout, config, data = _read_folder(folder)
    if layout == "student":
        return config, _student_state(folder, student.folder_from_json(data, folder / CONFIG))
    weights = read_weights(folder)
    shapes = expected_state(config, folder / CONFIG)
    if layout == "hovle":
        theirs = hovle.to_hovle(shapes, config)
    else:
        theirs = release.to_release(shapes, config, fused=release.is_fused(weights.tensors))
    expected = {name: tensor.shape for name, tensor in theirs.items() if name != hovle.UNUSED}
    check_tensors(weights, expected, ignore=[hovle.UNUSED], reason=release.reason)
    convert = hovle.from_hovle if layout == "hovle" else release.from_release
    return config, convert(weights.tensors, config)


def expected_state(config: ModelConfig, where: Path) -> dict[str, Tensor]:
    """Name → meta tensor of every parameter that ``config`` asks for (a tied head is no parameter of its own)."""
    try:
        with torch.device("meta"):
            state = Model(config).state_dict()
    except ValueError as refusal:
        raise UserError(f"{where}: {refusal}") from refusal
    return stored_state(state, config)


def stored_state(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict without the second name of a tied head."""
    second = {"head.weight"} if config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in state.items() if name not in second}


def _read_folder(folder: Path) -> tuple[str, ModelConfig, dict[str, Any]]:
    """(layout, config, the parsed config.json)."""
    where = folder / CONFIG
    data = read_json(where)
    model_type = data.get("model_type")
    if model_type == student.MODEL_TYPE:
        return "student", student.folder_from_json(data, where).model, data
    if model_type == release.MODEL_TYPE:
        return "release", release.config_from_release(data, where), data
    if "embedding_config" in data and "llm_config" in data:
        return "hovle", hovle.config_from_hovle(data, where), data
    raise UserError(
        f"{where}: model_type {model_type!r} is not known: this is neither a HoVLE folder ('embedding_config' and "
        f"'llm_config'), a published student ('{release.MODEL_TYPE}') nor one of ours ('{student.MODEL_TYPE}')"
    )


def _student_state(folder: Path, config: student.StudentFolder) -> dict[str, Tensor]:
    """The tensors of a student folder; a delta is completed from its teacher."""
    weights = read_weights(folder)
    tensors, files = weights.tensors, weights.files
    expected = expected_state(config.model, folder / CONFIG)
    if config.delta:
        teacher = _teacher_state(folder, config.teacher)
        rest = {name: tensor for name, tensor in teacher.items() if name in expected and name not in tensors}
        tensors, files = {**rest, **tensors}, {**dict.fromkeys(rest, folder), **files}
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    check_tensors(Weights(tensors=tensors, path=weights.path, files=files), shapes, reason=lambda name: "")
    if len(weights.tensors) != config.tensors:  # in a delta, a lost tensor would become the teacher's
        raise UserError(f"{weights.path}: holds {len(weights.tensors)} tensors, {CONFIG} says {config.tensors}")
    return tensors


def _teacher_state(folder: Path, reference: student.TeacherReference) -> dict[str, Tensor]:
    where = folder / CONFIG
    path = Path(reference.name)
    if reference.name not in builtin_names():
        path = path if path.is_absolute() else folder / path
        if not path.is_dir():
            raise UserError(
                f"{where}: this student stores only what differs from its teacher '{reference.name}', which is not "
                f"there {_known()}"
            )
    found = fingerprint(path)
    if found != reference.fingerprint:
        raise UserError(
            f"{where}: the teacher '{reference.name}' has changed or is another one: its fingerprint is {found[:12]}…, "
            f"the student was made from {reference.fingerprint[:12]}…"
        )
    return read_state(path)[1]
