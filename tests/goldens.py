"""The golden values of the published code, as tests read them: whole, though each value is stored once or made.

``golden/NAME.safetensors`` has only what no other file has. ``golden/made.json`` says for each file where its other
tensors come from, by name; ``golden/README.md`` explains the ways, and ``golden/reduce.py`` is what chose them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@functools.cache
def made() -> dict[str, Any]:
    return json.loads((FOLDER / "made.json").read_text(encoding="utf-8"))


@functools.cache
def _stored(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@functools.cache
def _tensor(name: str, key: str) -> Tensor:
    recipe = made()["tensors"].get(name, {}).get(key)
    if recipe is None:
        return _stored(name)[key]
    if "same" in recipe:  # as another file has it, or the rows of several
        found = torch.cat([_tensor(*place) for place in recipe["same"]])
    else:
        found = torch.from_numpy(_normal(name, key, recipe))
    assert digest(found.numpy()) == recipe["digest"], f"{name}: {key} is not what the published code had"
    return found


def tensors(name: str) -> dict[str, Tensor]:
    """Every tensor of a golden file; the caller's own."""
    return {key: _tensor(name, key).clone() for key in sorted({*_stored(name), *made()["tensors"].get(name, {})})}


def about(name: str) -> dict[str, Any]:
    """What stands beside a golden file."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- from a seed


@functools.cache
def _words(seed: int) -> np.ndarray:
    """The 24 random bits that torch's generator takes for each of its uniform numbers, as fractions."""
    words = np.random.RandomState(seed).randint(0, 2**32, 1 << 19, dtype=np.uint32)
    return ((words & 0xFFFFFF) / np.float32(1 << 24)).astype(np.float32)


def normal(seed: int, start: int, shape: list[int], scale: float, shift: float) -> np.ndarray:
    """Normal numbers as torch makes them on a CPU, but for the last bits of its logarithm, sine and cosine."""
    count = int(np.prod(shape))
    u = _words(seed)[start : start + count].reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log((np.float32(1) - u[:, 0]).astype(np.float64)))
    angle = (np.float32(2 * np.pi) * u[:, 1]).astype(np.float64)
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
    z *= np.float32(scale)
    return (z + np.float32(shift) if shift else z).reshape(shape)


@functools.cache
def _ulps(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.ulps.npz") as file:
        return dict(file)


def _normal(name: str, key: str, recipe: dict[str, Any]) -> np.ndarray:
    values = normal(*recipe["normal"])
    return (values.view(np.int32) + _ulps(name)[key].astype(np.int32)).view(np.float32)


# ---------------------------------------------------------------------------------------------- pictures

_WAVES = ((3, 0), (1.5, 1), (0.6, 1.6))  # periods across and down, of red, green and blue


def waves(width: int, height: int, flips: list[list[int]], columns: list[int]) -> np.ndarray:
    """Waves of colour (height, width, 3), rounded down.

    Where a wave meets a whole number, sine's last bit decides: ``flips`` (y, x, channel) and whole ``columns`` of red
    are where it was missed from below.
    """
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    values = np.stack([127 + 100 * np.sin(2 * np.pi * (a * x + b * y)) for a, b in _WAVES], -1)
    found = np.floor(values + 1e-9).astype(np.int64)
    found[:, columns, 0] -= 1
    for row, column, channel in flips:
        found[row, column, channel] -= 1
    return found


@functools.cache
def _pictures() -> dict[str, Image.Image]:
    """The pictures in the order in which one generator made them; what it drew for pictures we lack is skipped."""
    found, rng = {}, np.random.default_rng(0)
    for name, picture in made()["pictures"].items():
        width, height = picture["size"]
        rng.integers(-8, 9, picture["skip"])
        if picture["kind"] == "noise":
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        else:
            pixels = waves(width, height, picture["flips"], picture["columns"])
            if picture["kind"] != "smooth":
                pixels = pixels + rng.integers(-8, 9, pixels.shape)
            pixels = pixels.astype(np.uint8)
            if picture["kind"] == "alpha":
                pixels = np.dstack([pixels, rng.integers(0, 256, (height, width), dtype=np.uint8)])
        assert digest(pixels) == picture["digest"], f"{name} is not the picture that the published code was given"
        found[name] = Image.fromarray(pixels)
    return found


@functools.cache
def _room() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="goldens-")


@functools.cache
def picture(name: str) -> Path:
    """A PNG of a golden picture (``images/01_640x480_grad.png``), written once a process."""
    path = Path(_room().name) / Path(name).name
    _pictures()[path.stem].save(path, compress_level=1)
    return path


def tiles(number: str) -> np.ndarray:
    """The published pixels (t, 3, 56, 56) of a picture's tiles, normalised; they are stored before that, as bytes."""
    with np.load(FOLDER / "preprocess.npz") as file:
        pixels = file[f"out.pixel_values_size56_max12.{number}"]
    mean, deviation = (np.array(v, np.float32).reshape(3, 1, 1) for v in made()["normalisation"])
    found = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
    assert digest(found) == made()["tiles"][number]
    return found
