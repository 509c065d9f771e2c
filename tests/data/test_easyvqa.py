"""easy-VQA as published: every question and every picture, once."""

from __future__ import annotations

import json
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.sources import easyvqa
from mmmamba.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("easy-vqa")
    assert easyvqa.write(path, seed=0) == {"train.jsonl": 11_121, "test.jsonl": 9_673}
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def qa(record: dict) -> list[tuple[str, str]]:
    texts = [turn["value"] for turn in record["conversations"]]
    return [(q.removeprefix("<image>\n"), a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


@pytest.mark.parametrize(("split", "questions", "images"), [("train", 38_575, 4_000), ("test", 9_673, 1_000)])
def test_every_published_question_is_there_once(folder, split, questions, images):
    rows = records(folder / f"{split}.jsonl")
    asked = Counter((q, a, int(Path(r["image"]).stem)) for r in rows for q, a in qa(r))
    published = easyvqa.read_questions(easyvqa.package_folder(), split)
    assert asked == Counter((q.text, q.answer, q.image) for q in published)
    assert asked.total() == questions
    assert len({row["image"] for row in rows}) == images
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["ability"] for row in rows} == {"easy"}


def test_pictures_are_the_published_bytes(folder):
    data = easyvqa.package_folder()
    for split, count in (("train", 4_000), ("test", 1_000)):
        paths = sorted((folder / "images" / split).rglob("*.png"))
        assert len(paths) == count
        assert max(Counter(path.parent for path in paths).values()) <= 2_000
        for path in paths[::500]:
            assert path.read_bytes() == (data / split / "images" / path.name).read_bytes()


def test_training_groups_up_to_four_turns_and_tests_ask_one(folder):
    train = [len(row["conversations"]) // 2 for row in records(folder / "train.jsonl")]
    assert set(train) == {1, 2, 3, 4}
    for row in records(folder / "test.jsonl"):
        assert len(row["conversations"]) == 2
        answer = row["conversations"][1]["value"]
        assert row["chance"] == (0.5 if answer in ("yes", "no") else 0.3333 if answer in easyvqa.SHAPES else 0.125)


def test_the_reader_takes_it(folder):
    dataset = JsonlDataset(folder / "test.jsonl")
    sample = dataset[len(dataset) - 1]
    assert len(sample.turns) == 2
    assert Path(sample.images[0]).is_file()


def test_seed_decides_the_order_of_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(easyvqa, "_copy_images", lambda source, folder, split: None)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        easyvqa.write(tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_missing_package_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "distributions", lambda **_: iter(()))
    with pytest.raises(UserError, match=r"not installed: pip install easy-vqa==1\.0"):
        easyvqa.write(tmp_path, 0)


def test_damaged_package_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"questions\.json: no such file"):
        easyvqa.read_questions(tmp_path, "train")
    (tmp_path / "train" / "questions.json").write_text('[["is there a circle?", "yes", 0]]')
    with pytest.raises(UserError, match=r"has 1 questions, easy-vqa 1\.0 has 38575"):
        easyvqa.read_questions(tmp_path, "train")
