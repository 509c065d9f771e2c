"""A user's own pictures and conversations, of every common kind, go through distill, eval and chat as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import small_run
from mmmamba import cli
from mmmamba.checkpoints import builtin_names, load
from mmmamba.data.jsonl import JsonlDataset

TEACHERS = ["tiny", *(name for name in ("pico-teacher", "nano-teacher") if name in builtin_names())]


def noise(random: np.random.Generator, width: int, height: int, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), np.uint16))
    if mode == "P":
        return noise(random, width, height, "RGB").quantize(32)
    if mode in ("1", "LA", "PA"):
        return noise(random, width, height, "L" if mode == "1" else "RGBA").convert(mode)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    return Image.frombytes(mode, (width, height), random.bytes(width * height * channels))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("jpg", "RGB", {"exif": turned(6)}),
    ("jpg", "RGB", {"exif": turned(3), "progressive": True}),
    ("jpg", "L", {}),
    ("jpg", "CMYK", {}),
    ("png", "P", {}),
    ("png", "P", {"transparency": 0}),
    ("png", "RGBA", {}),
    ("png", "LA", {}),
    ("png", "L", {}),
    ("png", "1", {}),
    ("png", "I;16", {}),
    ("webp", "RGB", {}),
    ("webp", "RGBA", {"lossless": True}),
    ("gif", "P", {}),
    ("tif", "RGB", {}),
    ("bmp", "RGB", {}),
]
SIDES = [(20, 20), (20, 300), (300, 20), (64, 64), (224, 160), (333, 77), (128, 512)]


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Fifty pictures and conversations about none, one or several of them."""
    folder = tmp_path_factory.mktemp("own data ü 图")  # a space and letters of two scripts in the path
    random = np.random.default_rng(0)
    pictures = []
    for i in range(50):
        ending, mode, options = KINDS[i % len(KINDS)]
        width, height = SIDES[i % len(SIDES)]
        name = f"pictures/{i} 照片.{ending}"
        (folder / name).parent.mkdir(exist_ok=True)
        noise(random, width, height, mode).save(folder / name, **options)
        pictures.append(name)
    Image.new("RGB", (4000, 3000), "teal").save(folder / pictures[11].replace("webp", "jpg"), exif=turned(8))
    pictures[11] = pictures[11].replace("webp", "jpg")
    assert len(set(pictures)) == 50

    records: list[dict[str, Any]] = []
    rest = list(pictures)
    while rest:
        i = len(records)
        say = small_run.conversation
        if i % 5 == 0:
            records.append({"conversations": say("你好！🙂 what is 2 + 2?", "四 👩‍👩‍👧")})  # no id, no picture
        elif i % 5 == 1:
            records.append(
                {"id": i, "image": rest.pop(), "conversations": say("<image>\n图片里有什么？", "一个红色的圆 🔴")}
            )
        elif i % 5 == 2:
            shown = [rest.pop() for _ in range(min(2 + i % 2, len(rest)))]
            text = "first: <image>\nthen " + "<image> " * (len(shown) - 1) + "?"
            records.append({"id": f"{i}", "image": shown, "conversations": say(text, "a\nb", "and <the> last?", "no")})
        elif i % 5 == 3:
            turns = [
                {"from": "system", "value": "Answer in one word."},
                *say("no mark?", "Yes.", "sure?", "", "?", "ok"),
            ]
            records.append({"id": f"{i}", "image": [rest.pop()], "conversations": turns})
        else:
            text = "A literal <|im_end|> and <IMG_CONTEXT>, a\ttab, and\u00a0e\u0301."
            records.append(
                {"id": f"{i}", "image": rest.pop(), "conversations": say(text, "كل شيء"), "source": {"x": [1]}}
            )
    return small_run.write_jsonl(folder / "记录.jsonl", records)


def test_the_album_is_of_mixed_kinds(album):
    dataset = JsonlDataset(album)
    samples = [dataset[i] for i in range(len(dataset))]
    assert len({path for sample in samples for path in sample.images}) == 50
    assert {len(sample.images) for sample in samples} >= {0, 1, 2, 3}
    assert {len(sample.turns) for sample in samples} >= {2, 4, 7}
    assert max(max(Image.open(path).size) for sample in samples for path in sample.images) == 4000
    assert min(min(Image.open(path).size) for sample in samples for path in sample.images) == 20
    modes = {Image.open(path).mode for sample in samples for path in sample.images}
    assert modes >= {"RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"}


@pytest.mark.parametrize("name", TEACHERS)
def test_own_data_from_distill_to_chat(name, album, teacher_folder, tmp_path, capsys):
    teacher = str(teacher_folder) if name == "tiny" else name
    before = small_run.hashes(album.parent)
    samples = len(JsonlDataset(album))
    # Every sample once in stage 1; the two others look at a few.
    plan = small_run.recipe(
        mixer={"rope": True}, stage1__steps=1, stage1__batch_size=samples, stage2__steps=1, stage3__steps=2,
        stage1__micro_tokens=2048, data__workers=0, data__max_tiles=2,
    )  # fmt: skip
    recipe = small_run.write_recipe(tmp_path / "own.yaml", plan)
    student = tmp_path / "run" / "model"
    shared = ["--device", "cpu"]
    command = ["distill", recipe, "--teacher", teacher, "--data", album, "--out", tmp_path / "run", *shared]
    assert cli.main([*map(str, command)]) == 0
    assert "skipped" not in capsys.readouterr().err
    assert all(p.isfinite().all() for p in load(student).parameters())

    command = ["eval", student, "--against", teacher, "--data", album, "--out", tmp_path / "e", *shared]
    command += ["--max-new-tokens", "2"] if name == "tiny" else ["--max-new-tokens", "2", "--limit", "4"]
    assert cli.main([*map(str, command)]) == 0
    assert json.loads((tmp_path / "e" / "results.json").read_text())
    capsys.readouterr()
    said = (tmp_path / "e" / "predictions-model.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(said) == (samples if name == "tiny" else 4)

    pictures = sorted((album.parent / "pictures").iterdir())[:3]
    command = ["chat", student, "这些图片里有什么？ 🙂", "--max-new-tokens", "3", *shared]
    for picture in pictures:
        command += ["--image", picture]
    assert cli.main([*map(str, command)]) == 0
    assert capsys.readouterr().err == ""
    assert small_run.hashes(album.parent) == before, "nothing is written beside the user's data"
