"""Makes the stored form of the golden values out of the full ones: ``python tests/golden/reduce.py FULL``.

FULL has every golden file whole, as the published code gave it. Nothing is rounded: what is left out is in another
file, is the rows of several such tensors, or is made from a seed, and every tensor and picture so made is compared
with the full one here, and with its digest whenever a test reads it (``tests/goldens.py``).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import goldens  # noqa: E402

SOURCES = ("hovle_pad_A", "hovle_tiny_A", "hovle_tiny_C_post", "mixer_A", "mixer_A_pert", "stage1_A", "stage2_A",
           "stage3_loss", "student_A_seeded", "student_A", "student_hybrid_A", "student_A_fused",
           "student_hybrid_A_fused", "endtoend_kl")  # fmt: skip
NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NOT_READ = ("grad_pad.",)  # gradients of a loss that counts padding, which no test asks for
PICTURES = {  # the picture → (kind, numbers drawn for pictures that we lack)
    "00_448x448_noise": ("noise", 0), "01_640x480_grad": ("noisy", 0), "02_1920x1080_grad0": ("smooth", 0),
    "03_100x1000_grad": ("noisy", 0), "05_1344x896_grad0": ("smooth", 0), "07_2000x500_grad0": ("smooth", 0),
    "08_513x512_grad": ("noisy", 19232), "10_300x300_rgba": ("alpha", 1920000),
}  # fmt: skip


def from_seed(values: np.ndarray, seeds: tuple[int, ...]) -> list[Any] | None:
    """[seed, start, shape, scale, shift] of normal numbers that a seeded generator made; None for others."""
    if values.size < 16 or values.size % 16 or values.dtype != np.float32:
        return None
    shift = 1.0 if abs(values.mean() - 1) < 0.1 and values.std() < 0.2 else 0.0
    first = values.reshape(-1)[:16].astype(np.float64) - shift
    turns = np.mod(np.arctan2(first[8:], first[:8]) / (2 * np.pi), 1)
    for seed in seeds:
        words = goldens._words(seed)
        for at in np.flatnonzero(np.abs(words[8:-8] - turns[0]) < 1e-5):
            if np.abs(words[at + 8 : at + 16] - turns).max() > 1e-4:
                continue
            plain = goldens.normal(seed, int(at), list(values.shape), 1.0, 0.0)
            scale = float(np.median((values.astype(np.float64) - shift) / plain))
            nice = [1.0, 0.5, 0.1, *(f / n**0.5 for n in range(4, 4097) for f in (1.0, 1.3))]
            scale = min(nice, key=lambda one: abs(one - scale))
            return [seed, int(at), list(values.shape), scale, shift]
    return None


def tensors(full: Path) -> dict[str, Any]:
    """Writes every golden file's own tensors, and returns how the others are made."""
    places: dict[str, tuple[str, str]] = {}
    found: dict[str, Any] = {}
    for name in SOURCES:
        everything = load_file(full / f"{name}.safetensors")
        own, recipes, ulps = {}, {}, {}
        for key, values in everything.items():
            if key.startswith(NOT_READ):
                continue
            digest = goldens.digest(values)
            where = f"{digest}{values.dtype}{values.shape}"
            if where in places:
                recipes[key] = {"same": [places[where]], "digest": digest}
                continue
            places[where] = (name, key)
            joined = rows_of(key, values, everything, full, name)
            if joined:
                recipes[key] = {"same": joined, "digest": digest}
                continue
            normal = from_seed(values, (11, 33, 1101)) if key.startswith(("w.", "in.")) else None
            if normal:
                bits = values.view(np.int32).astype(np.int64) - goldens.normal(*normal).view(np.int32)
                if np.abs(bits).max() < 1 << 15:
                    ulps[key] = bits.astype(np.int8 if np.abs(bits).max() < 128 else np.int16)
                    recipes[key] = {"normal": normal, "digest": digest}
                    continue
            own[key] = values
        save_file(own, HERE / f"{name}.safetensors")
        if ulps:
            np.savez_compressed(HERE / f"{name}.ulps.npz", **ulps)
        found[name] = recipes
    return found


def rows_of(key: str, values: np.ndarray, everything: dict[str, np.ndarray], full: Path, name: str) -> list[Any]:
    """Fused projections are the rows of the separate ones, which the file of the same student without fusion has."""
    if not name.endswith("_fused") or values.ndim != 2 or not key.startswith("w."):
        return []
    separate = name.removesuffix("_fused")
    head = key.rsplit(".", 2)[0]
    rows = {k: v for k, v in load_file(full / f"{separate}.safetensors").items() if k.startswith(f"{head}.")}
    found, at = [], 0
    while at < len(values):
        for k, v in rows.items():
            if v.ndim == 2 and len(v) <= len(values) - at and np.array_equal(v, values[at : at + len(v)]):
                found.append((separate, k))
                at += len(v)
                break
        else:
            return []
    return found


def pictures(full: Path) -> dict[str, Any]:
    found = {}
    rng = np.random.default_rng(0)
    for name, (kind, skip) in PICTURES.items():
        pixels = np.asarray(Image.open(full / "images" / f"{name}.png"))
        height, width = pixels.shape[:2]
        entry: dict[str, Any] = {"kind": kind, "size": [width, height], "skip": skip, "digest": goldens.digest(pixels)}
        rng.integers(-8, 9, skip)
        if kind == "noise":
            rng.integers(0, 256, pixels.shape, dtype=np.uint8)
        else:
            below = pixels[..., :3].astype(np.int64) - goldens.waves(width, height, [], [])
            if kind != "smooth":
                below -= rng.integers(-8, 9, below.shape)
            if kind == "alpha":
                rng.integers(0, 256, (height, width), dtype=np.uint8)
            assert set(np.unique(below)) <= {-1, 0}
            columns = np.flatnonzero((below[..., 0] == -1).all(0))
            below[:, columns, 0] = 0
            entry |= {"columns": columns.tolist(), "flips": np.argwhere(below).tolist()}
        found[name] = entry
    return found


def tiles(full: Path) -> dict[str, str]:
    mean, deviation = (np.array(v).reshape(3, 1, 1) for v in NORMALISATION)
    everything = load_file(full / "preprocess.safetensors")
    pixels = {key: np.rint((values.astype(np.float64) * deviation + mean) * 255) for key, values in everything.items()}
    np.savez_compressed(HERE / "preprocess.npz", **{key: p.astype(np.uint8) for key, p in pixels.items()})
    return {key.rsplit(".", 1)[1]: goldens.digest(values) for key, values in everything.items()}


def main(full: Path) -> None:
    for file in full.glob("*.json"):
        shutil.copyfile(file, HERE / file.name)
    made = {"normalisation": NORMALISATION, "tiles": tiles(full), "pictures": pictures(full), "tensors": tensors(full)}
    (HERE / "made.json").write_text(json.dumps(made, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    goldens.made.cache_clear()
    goldens._stored.cache_clear()
    for name in SOURCES:
        ours = goldens.tensors(name)
        for key, values in load_file(full / f"{name}.safetensors").items():
            assert key.startswith(NOT_READ) or goldens.digest(ours[key].numpy()) == goldens.digest(values)
    for name in PICTURES:
        assert np.array_equal(np.asarray(Image.open(goldens.picture(name + ".png"))),
                              np.asarray(Image.open(full / "images" / f"{name}.png")))  # fmt: skip
    for key, values in load_file(full / "preprocess.safetensors").items():
        assert np.array_equal(goldens.tiles(key.rsplit(".", 1)[1]), values)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
