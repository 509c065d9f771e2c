"""Tensors that a run keeps to go on from: with what they are and a checksum in the file's own header.

A flipped bit in an optimizer's state would go on into every later weight and never be seen. A checkpoint that is not
what was written down is therefore refused; one of an earlier version, without a checksum, is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints.io import read_metadata, read_safetensors, write_safetensors
from mmmamba.checkpoints.tensor_hashes import digest
from mmmamba.errors import UserError
from mmmamba.jsonfile import parse_json, shown

TENSORS = "tensors.safetensors"
ABOUT = "about"  # key of its header: JSON that says what the tensors are, and which teacher the rest is from
_KNOWN = {"holds", "stage", "step", "teacher", "sha256"}  # what it says; an earlier version had no checksum


def write_checked(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors into a folder that is there; ``about`` is plain data that says what they are."""
    # One text: safetensors writes several in any order, and a run's files are the same to the bit.
    text = json.dumps({**about, "sha256": digest([json.dumps(about)], tensors)})
    write_safetensors(folder / TENSORS, tensors, {ABOUT: text})


def read_checked(folder: Path, expected: Mapping[str, Any], *, remedy: str) -> dict[str, Tensor]:
    """The tensors of a folder, as they were written.

    Args:
        folder: where they lie.
        expected: entries of ``about`` that must be as given, where they are there.
        remedy: what to do about a damaged file.

    Raises:
        UserError: naming the file, when it is not what was written down.
    """
    path = folder / TENSORS
    try:
        tensors, texts = read_safetensors(path), read_metadata(path)
        plain = texts in ({}, {"format": "pt"})  # of the first versions
        about = {} if plain else parse_json(texts[ABOUT], path) if set(texts) == {ABOUT} else None
        if not isinstance(about, dict) or not set(about) <= _KNOWN:
            raise UserError(f"{path}: was altered or damaged: its header does not say what it holds")
        checksum = about.pop("sha256", None)
        if (checksum or "stage" in about) and checksum != digest([json.dumps(about)], tensors):
            raise UserError(f"{path}: was altered or damaged: its checksum does not match its content")
        for key, value in expected.items():
            if about.get(key, value) != value:
                raise UserError(f"{path}: is of {key} {shown(about[key])}, not of {shown(value)}: was it moved?")
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    return tensors


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path, prefix: str = "") -> None:
    """Copy stored tensors over parameters, which are as large.

    Raises:
        UserError: naming a tensor that is missing, or of another shape.
    """
    for name, parameter in parameters.items():
        found = tensors.get(f"{prefix}{name}")
        if found is None:
            raise UserError(f"{where / TENSORS}: tensor '{prefix}{name}' is missing")
        if found.shape != parameter.shape:
            raise UserError(
                f"{where / TENSORS}: tensor '{prefix}{name}' is {tuple(found.shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.copy_(found)
