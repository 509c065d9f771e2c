"""Published files of five benchmarks, in small, to our JSONL, and back into a suite by the benchmark's own metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from question_files import picture

from mmmamba.errors import UserError
from mmmamba.evaluation.converters import METRIC_OF, convert_dataset
from mmmamba.evaluation.suite import Suite, own_suite


def converted(source: str, path: Path, tmp_path: Path, **options: Any) -> Suite:
    out = convert_dataset(source, path, out=tmp_path / "out.jsonl", overwrite=True, **options)  # type: ignore[arg-type]
    return own_suite(out, metric=METRIC_OF[source])


def test_pope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pope"
    picture(folder / "images" / "COCO_1.jpg")
    for name, label in (("random", "yes"), ("popular", "no")):
        row = {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog in the image?", "label": label}
        (folder / f"coco_pope_{name}.json").write_text(json.dumps(row) + "\n\n")
    suite = converted("pope", folder, tmp_path, image_root=folder / "images")
    assert suite.abilities == ("popular", "random")
    assert [item.references for item in suite.items] == [("no",), ("yes",)]
    assert suite.items[0].sample.images == (str(folder / "images" / "COCO_1.jpg"),)
    assert suite.items[0].prompt.startswith("<image>\nIs there a dog in the image?\nAnswer the question")
    assert "--metric yes_no" in capsys.readouterr().out
    plain = converted("pope", folder / "coco_pope_random.json", tmp_path, image_root=folder / "images", prompt="")
    assert plain.items[0].prompt == "<image>\nIs there a dog in the image?"


def science(tmp_path: Path) -> Path:
    folder = tmp_path / "scienceqa"
    picture(folder / "test" / "2" / "image.png")
    problem = {"question": "Which is it?", "choices": ["cat", "dog", "fox"], "answer": 2, "hint": "", "image": None}
    problems = {"1": problem, "2": problem | {"image": "image.png", "hint": "Look.", "answer": 0}, "3": problem}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["1", "2"], "train": ["3"]}))
    return folder


def test_scienceqa(tmp_path: Path) -> None:
    suite = converted("scienceqa", science(tmp_path), tmp_path)
    assert suite.abilities == ("text", "image")
    assert [item.references for item in suite.items] == [("C",), ("A",)]
    assert suite.items[0].choices == ("cat", "dog", "fox")
    assert suite.items[0].chance == pytest.approx(1 / 3)
    assert "Look.\nWhich is it?\nA. cat\nB. dog\nC. fox\nAnswer with" in suite.items[1].prompt
    assert len(converted("scienceqa", science(tmp_path), tmp_path, split="train").items) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_mme(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "mme"
    for subtask in ("existence", "OCR"):
        texts = folder / subtask / "questions_answers_YN" if nested else folder / subtask
        picture((folder / subtask / "images" if nested else folder / subtask) / "0001.jpg")
        texts.mkdir(parents=True, exist_ok=True)
        (texts / "0001.txt").write_text("Is it red? Please answer yes or no.\tYes\nIs it blue?\tNo\n")
    suite = converted("mme", folder, tmp_path)
    assert suite.abilities == ("OCR", "existence")
    assert [item.references for item in suite.items] == [("Yes",), ("No",)] * 2
    assert suite.items[0].prompt == "<image>\nIs it red? Please answer yes or no."


def test_textvqa(tmp_path: Path) -> None:
    picture(tmp_path / "train_images" / "abc.jpg")
    answers = ["nokia"] * 6 + ["NOKIA phone"] * 4
    row = {"question": "What brand?", "image_id": "abc", "question_id": 7, "answers": answers}
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": [row]}))
    suite = converted("textvqa", path, tmp_path, image_root=tmp_path / "train_images")
    assert suite.items[0].references == tuple(answers)
    assert suite.items[0].sample.turns[-1].text == "nokia"
    assert suite.items[0].sample.id == "7"


def test_gqa(tmp_path: Path) -> None:
    picture(tmp_path / "n1.jpg")
    path = tmp_path / "testdev_balanced_questions.json"
    path.write_text(json.dumps({"201": {"question": "Is it red?", "answer": "yes", "imageId": "n1", "types": {}}}))
    suite = converted("gqa", path, tmp_path)
    assert suite.items[0].references == ("yes",)
    assert suite.items[0].sample.id == "201"


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        ("pope", "p.json", '{"image": "a.jpg", "text": "q"}', r"p\.json:1: field 'label' is missing"),
        ("pope", "p.json", "{", r"p\.json:1: not JSON"),
        ("pope", "p.json", '{"image": "a.jpg", "text": "q", "label": "hm"}', "must be yes or no, got 'hm'"),
        ("pope", "p.json", '{"image": "a.jpg", "text": "q", "label": "no"}', r"'image': no such picture: .*a\.jpg"),
        ("pope", "p.json", "", "no pope question found"),
        ("textvqa", "t.json", '{"rows": []}', r"t\.json: field 'data' is missing"),
        ("textvqa", "t.json", '{"data": [{"question": "q"}]}', r"data\[0\]: field 'answers' is missing"),
        ("gqa", "g.json", "[]", "must hold a JSON object"),
        ("gqa", "g.json", '{"1": {"question": "q", "answer": "a"}}', r"question 1: field 'imageId' is missing"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, source: str, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        converted(source, tmp_path / name, tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


def test_mme_and_scienceqa_errors(tmp_path: Path) -> None:
    picture(tmp_path / "mme" / "OCR" / "1.jpg")
    (tmp_path / "mme" / "OCR" / "1.txt").write_text("one question\tyes\n")
    with pytest.raises(UserError, match=r"1\.txt: must hold two questions"):
        converted("mme", tmp_path / "mme", tmp_path)
    (tmp_path / "mme" / "OCR" / "1.txt").write_text("one question\tyes\nanother yes\n")
    with pytest.raises(UserError, match=r"1\.txt:2: must be a question, a tab, and Yes or No"):
        converted("mme", tmp_path / "mme", tmp_path)
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        converted("scienceqa", science(tmp_path), tmp_path, split="val")
    with pytest.raises(UserError, match="no such file or folder"):
        converted("gqa", tmp_path / "missing.json", tmp_path)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """U+2028 and its like may stand inside a question; so may a carriage return between JSON's tokens."""
    picture(tmp_path / "p.jpg")
    question = "Is there\u2028a\u2029dog\x85here\x0b?"
    row = {"question_id": 1, "image": "p.jpg", "text": question, "label": "yes"}
    text = json.dumps(row, ensure_ascii=False).replace(', "image"', ',\r"image"') + "\r\n"
    file = tmp_path / "coco_pope_random.json"
    file.write_bytes(text.encode())
    (item,) = converted("pope", file, tmp_path, prompt="").items
    assert item.prompt == f"<image>\n{question}"
    mme = tmp_path / "mme" / "existence"
    picture(mme / "1.jpg")
    (mme / "1.txt").write_bytes("Is\u2028it red?\tYes\r\nIs it blue?\tNo\r\n".encode())
    assert [i.prompt for i in converted("mme", tmp_path / "mme", tmp_path).items] == [
        "<image>\nIs\u2028it red?",
        "<image>\nIs it blue?",
    ]


def test_scienceqa_whose_options_are_letters_keeps_its_answer(tmp_path: Path) -> None:
    folder = science(tmp_path)
    problem = {"question": "Which letter?", "choices": ["B", "A"], "answer": 1, "hint": "", "image": None}
    (folder / "problems.json").write_text(json.dumps({"1": problem}))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["1"]}))
    assert [item.references for item in converted("scienceqa", folder, tmp_path).items] == [("B",)]
