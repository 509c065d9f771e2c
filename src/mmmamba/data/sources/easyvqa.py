"""easy-VQA 1.0: 5,000 pictures of one shape and 48,248 questions, as published on PyPI (MIT), with its own split.

The files are read where pip put them; the package's code is never imported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DATA_BYTES, read_any
from mmmamba.progress import Progress

PACKAGE, VERSION = "easy-vqa", "1.0"
IMAGES = {"train": 4_000, "test": 1_000}
QUESTIONS = {"train": 38_575, "test": 9_673}
ABILITY = "easy"
MOST_TURNS = 4
IMAGES_PER_FOLDER = 2_000
SHAPES = frozenset(("circle", "rectangle", "triangle"))
COLOURS = frozenset(("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"))


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str
    answer: str
    image: int


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write ``train.jsonl``, ``test.jsonl`` and the images into ``folder``.

    In training the questions about one image are shuffled by the seed and dealt to conversations of up to four turns;
    a test record is one question.

    Returns:
        How many records each file holds.
    """
    data = package_folder()
    counts = {}
    for split in ("train", "test"):
        by_image = _grouped(read_questions(data, split), split)
        _copy_images(data / split / "images", folder, split)
        records = _train(by_image, seed) if split == "train" else _test(by_image)
        name = f"{split}.jsonl"
        counts[name] = 0
        with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts[name] += 1
    return counts


def package_folder() -> Path:
    """Where pip put the data of the one version we know."""
    found = next(iter(metadata.distributions(name=PACKAGE)), None)
    if found is None:
        raise UserError(f"easy-VQA is not installed: pip install {PACKAGE}=={VERSION}")
    if found.version != VERSION:
        raise UserError(f"easy-VQA {found.version} is installed, not {VERSION}: pip install {PACKAGE}=={VERSION}")
    folder = Path(str(found.locate_file("easy_vqa/data")))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; reinstall it: pip install --force-reinstall {PACKAGE}=={VERSION}")
    return folder


def read_questions(data: Path, split: str) -> list[Question]:
    path = data / split / "questions.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; reinstall it: pip install --force-reinstall {PACKAGE}=={VERSION}")
    rows = read_any(path, limit=MAX_DATA_BYTES)
    if len(rows) != QUESTIONS[split]:
        raise UserError(f"{path}: has {len(rows)} questions, {PACKAGE} {VERSION} has {QUESTIONS[split]}")
    return [Question(text=text, answer=answer, image=image) for text, answer, image in rows]


def chance(answer: str) -> float:
    """How often a guess is right that knows what kind of answer is wanted, and no more."""
    return 1 / len(SHAPES) if answer in SHAPES else 1 / len(COLOURS) if answer in COLOURS else 0.5


def _grouped(questions: list[Question], split: str) -> dict[int, list[Question]]:
    by_image: dict[int, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    if set(by_image) != set(range(IMAGES[split])):
        raise UserError(f"{PACKAGE}: the {split} questions are about {len(by_image)} images, not {IMAGES[split]}")
    return by_image


def _copy_images(source: Path, folder: Path, split: str) -> None:
    with Progress(f"easy-vqa {split} images", total=IMAGES[split]) as bar:
        for image in range(IMAGES[split]):
            target = folder / _image_path(split, image)
            if image % IMAGES_PER_FOLDER == 0:
                target.parent.mkdir(parents=True)
            picture = source / f"{image}.png"
            if not picture.is_file():
                raise UserError(f"{picture}: no such file; pip install --force-reinstall {PACKAGE}=={VERSION}")
            shutil.copyfile(picture, target)
            bar.update(image + 1)


def _image_path(split: str, image: int) -> str:
    return f"images/{split}/{image // IMAGES_PER_FOLDER:04d}/{image}.png"


def _train(by_image: dict[int, list[Question]], seed: int) -> Iterator[dict[str, Any]]:
    for image, questions in sorted(by_image.items()):
        shuffled = Random(f"{seed}/easy-vqa/{image}").sample(questions, len(questions))
        for part, start in enumerate(range(0, len(shuffled), MOST_TURNS)):
            yield _record("train", f"{image}-{part}", shuffled[start : start + MOST_TURNS])


def _test(by_image: dict[int, list[Question]]) -> Iterator[dict[str, Any]]:
    for image, questions in sorted(by_image.items()):
        for i, question in enumerate(questions):
            record = _record("test", f"{image}-{i}", [question])
            yield {**record, "chance": round(chance(question.answer), 4)}


def _record(split: str, name: str, questions: list[Question]) -> dict[str, Any]:
    conversation = []
    for i, question in enumerate(questions):
        text = question.text if i else f"<image>\n{question.text}"
        conversation += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return {
        "id": f"easy-vqa-{split}-{name}",
        "image": _image_path(split, questions[0].image),
        "conversations": conversation,
        "ability": ABILITY,
    }
