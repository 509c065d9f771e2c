"""Data, pictures, recipes and tables."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

import small_run
from fuzz import mutate
from mmmamba.ablation.plan import cells_of, load_plan
from mmmamba.config_files import dump_yaml
from mmmamba.data.image_decoding import decode_image, decode_text, load_image
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.sample import BadSample, Sample
from mmmamba.distill.recipe import RECIPES, DistillRecipe, TeachRecipe, load_recipe
from mmmamba.errors import UserError
from mmmamba.evaluation.suite import own_suite


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------- data


def jsonl_seeds(folder: Path) -> list[dict[str, Any]]:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    picture = str(folder / "a.png")
    said = small_run.conversation("<image>\nwhat?", "red", "sure?", "yes")
    return [
        {"id": "a", "image": picture, "conversations": said, "ability": "colour"},
        {"id": 2, "image": [picture, picture], "conversations": [{"from": "system", "value": "be brief"}, *said]},
        {"conversations": small_run.conversation("hi", "hello"), "choices": ["a", "b"], "answers": ["a"]},
    ]  # fmt: skip


def jsonl(rng: random.Random, seeds: list[dict[str, Any]], here: Path) -> None:
    records = [rng.choice(seeds) for _ in range(rng.choice([1, 1, 2]))]
    which = rng.randrange(len(records))
    lines = [json.dumps(record).encode() for record in records]
    lines[which] = mutate.json_text(rng, mutate.tree(rng, records[which]))
    path = write(here / "d.jsonl", b"\n".join(lines) + rng.choice([b"", b"\n", b"\r\n", b"\n\n"]))
    dataset, refused = JsonlDataset(path), None
    raw = path.read_bytes().split(b"\n")
    for row in range(len(dataset)):
        try:
            sample = dataset[row]
        except BadSample as error:
            refused = error
        else:
            _same(sample, json.loads(raw[int(dataset.where(row).rpartition(":")[2]) - 1].decode("utf-8-sig")))
    if rng.random() < 0.2:
        own_suite(path, metric=rng.choice(["exact", "choice", "vqa", "yes_no"]))
    if refused is not None:
        raise refused


def _same(sample: Sample, record: dict[str, Any]) -> None:
    """What was taken is what Python's own reader finds."""
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    assert [(turn.role, turn.text) for turn in sample.turns] == turns
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    assert [Path(path).name for path in sample.images] == [Path(path).name for path in images]
    assert record.get("id") is None or sample.id == str(record["id"])


# ---------------------------------------------------------------------------------------------- pictures


def picture_seeds(folder: Path) -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    colours, grey = Image.fromarray(noise), noise[..., 0]
    pictures = {"RGB": colours, "RGBA": colours.convert("RGBA"), "P": colours.quantize(8), "L": Image.fromarray(grey)}
    pictures["I;16"] = Image.fromarray(grey.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "text"
    found = {}
    for kind, modes in {
        "PNG": ["RGB", "L", "P", "I;16", "RGBA"], "JPEG": ["RGB", "L"], "WEBP": ["RGB", "RGBA"], "GIF": ["P"],
        "BMP": ["RGB", "P"], "TIFF": ["RGB", "I;16"], "PPM": ["RGB"],
    }.items():  # fmt: skip
        for mode in modes:
            buffer = io.BytesIO()
            options = {"exif": exif.tobytes()} if kind in ("PNG", "JPEG", "WEBP") else {}
            pictures[mode].save(buffer, kind, **options)
            found[f"{kind} {mode}"] = buffer.getvalue()
    return found


def pictures(rng: random.Random, seeds: dict[str, bytes], here: Path) -> None:
    name = rng.choice(sorted(seeds))
    raw = seeds[name]
    parts = {"PNG": mutate.png, "WEBP": mutate.riff, "JPEG": mutate.jpeg}.get(name.split()[0])
    if parts is not None and rng.random() < 0.6:
        raw = parts(rng, raw)
    else:
        raw = mutate.bytes_(rng, raw, rng.choice(list(seeds.values())))
    path = write(here / rng.choice(["a.png", "a.jpg", "a"]), raw)
    ways = [
        lambda: load_image(path, "x:1"),
        lambda: decode_image(raw, "x:1"),
        lambda: decode_text("data:image/png;base64," + base64.b64encode(raw).decode(), "x:1"),
    ]
    found = [_read(way) for way in ways]
    pixels = [image.tobytes() if isinstance(image, Image.Image) else None for image in found]
    assert pixels[0] == pixels[1] == pixels[2], f"what is read depends on the way it comes: {found}"
    if isinstance(found[0], UserError):
        raise found[0]
    assert found[0].mode == "RGB" and found[0].width * found[0].height <= 64_000_000


def _read(way: Any) -> Image.Image | UserError:
    try:
        return way()
    except UserError as error:
        return error


# ---------------------------------------------------------------------------------------------- recipes and tables


def recipe_seeds(folder: Path) -> list[tuple[type, str]]:
    small = yaml.safe_dump(small_run.recipe(layers="hybrid:3", mixer={"rope": True}, stage1__lr_scale={"conv": 2.0}))
    teach = yaml.safe_dump(small_run.teach_recipe(folder / "d.jsonl"))
    shipped = [(RECIPES / f"{name}.yaml").read_text() for name in ("pico-linear", "nano-hybrid")]
    return [(DistillRecipe, small), (TeachRecipe, teach), *((DistillRecipe, text) for text in shipped)]


def recipes(rng: random.Random, seeds: list[tuple[type, str]], here: Path) -> None:
    cls, text = rng.choice(seeds)
    overrides = []
    if rng.random() < 0.5:
        text = mutate.yaml_text(rng, text)
    else:
        changed = mutate.tree(rng, yaml.safe_load(text))
        text = json.dumps(changed) if rng.random() < 0.3 else _dumped(changed)
    if rng.random() < 0.2:
        key = rng.choice(["stage1.steps", "seed", "name", "data.sources.0.path", "mixer", "x.y", "", "a..b", "stage1"])
        overrides = [f"{key}={rng.choice([*mutate.SCALARS, *map(str, mutate.NUMBERS)])}"]
    path = write(here / "r.yaml", text.encode("utf-8", "surrogatepass"))
    plan = load_recipe(cls, path, overrides)
    write(here / "again.yaml", dump_yaml(plan).encode())
    assert load_recipe(cls, here / "again.yaml") == plan, "what is written down is not what was read"
    for stage in (plan.stages if cls is DistillRecipe else {"train": plan.train}).values():
        factors = [stage.factor(step) for step in {0, stage.steps // 2, max(stage.steps - 1, 0)}]
        assert all(np.isfinite(stage.lr * factor) and factor >= 0 for factor in factors), factors


def _dumped(data: Any) -> str:
    try:
        return yaml.safe_dump(data, allow_unicode=True, default_flow_style=None, width=10**6)
    except RecursionError:
        return "[" * 3000


def table_seeds(folder: Path) -> str:
    return (RECIPES / "pico-ablation.yaml").read_text()


def tables(rng: random.Random, seeds: str, here: Path) -> None:
    if rng.random() < 0.5:
        text = mutate.yaml_text(rng, seeds)
    else:
        text = _dumped(mutate.tree(rng, yaml.safe_load(seeds)))
    path = write(here / "t.yaml", text.encode("utf-8", "surrogatepass"))
    plan, where = load_plan(path)
    cells = cells_of(plan, where)
    assert len({(cell.table, str(cell), cell.seed) for cell in cells}) == len(cells)
