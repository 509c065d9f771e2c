"""What `mmmamba eval` replaces: its own results of the same evaluation, and nothing of anybody else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from question_files import picture, record

from mmmamba.checkpoints import save_hovle
from mmmamba.data.processor import Processor
from mmmamba.errors import UserError
from mmmamba.evaluation import evaluate as verb
from mmmamba.evaluation.evaluate import evaluate
from mmmamba.evaluation.predict import Answers, Loaded, answer
from mmmamba.locks import alone_in
from mmmamba.model.model import Model

Own = Callable[..., Path]


@pytest.fixture
def model(tiny_model: Callable[..., Model], tiny_processor: Processor, tmp_path: Path) -> Path:
    return save_hovle(tiny_model(), tiny_processor, tmp_path / "models" / "teacher", dtype=torch.float32)


@pytest.fixture
def questions(own_data: Own) -> Path:
    return own_data(record("a", "is it red ?", "yes", "p.png"), record("b", "is it blue ?", "no", "p.png"))


@pytest.fixture
def ask(model: Path, questions: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the verb; its results.json."""

    def run(name: str | Path = model, **options: Any) -> dict[str, Any]:
        given = {"data": questions, "out": tmp_path / "out", "max_new_tokens": 1, "device": "cpu", **options}
        evaluate(str(name), **given)
        return json.loads((given["out"] / "results.json").read_text())

    return run


@pytest.fixture
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that is asked fails the test: what is wrong must be told before."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a question was asked before the folder was looked at")

    monkeypatch.setattr(verb, "answer", fail)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["blind", "teacher, blind", "blind, blind", "m, int8", "Blind"])
def test_a_model_called_like_a_control_has_its_own_numbers(ask, model, name, monkeypatch) -> None:
    """The control that is blinded answers something else than the model: their numbers must not meet."""

    def scripted(loaded: Loaded, suite: Any, *, blind: bool = False, **options: Any) -> Answers:
        answers = answer(loaded, suite, blind=blind, **options)
        answers.texts = {i: "nonsense" if blind else item.references[0] for i, item in enumerate(suite.items)}
        return answers

    monkeypatch.setattr(verb, "answer", scripted)
    shutil.copytree(model, folder := model.with_name(name))
    data = ask(folder, int8=name == "m, int8")
    scores = {row["label"]: (row["mean"]["accuracy"], row["blind"]) for row in data["models"]}
    assert scores[name] == (1.0, False)
    assert sorted(scores.values()) == sorted([(1.0, False)] * (len(scores) - 1) + [(0.0, True)])
    files = set(data["predictions"].values())
    assert len({file.casefold() for file in files}) == len(scores)


def test_models_whose_names_become_one_file_name_keep_their_files_apart(ask, model, tmp_path) -> None:
    for name in ("a b", "A-B"):
        shutil.copytree(model, model.with_name(name))
    data = ask(model.with_name("a b"), against=str(model.with_name("A-B")))
    assert data["predictions"] == {
        "a b": "predictions-a-b.jsonl", "A-B": "predictions-A-B-2.jsonl", "blind": "predictions-blind.jsonl",
    }  # fmt: skip


def test_the_same_evaluation_may_be_repeated(ask, tmp_path) -> None:
    first, again = ask(), ask()
    assert {**first, "models": 0} == {**again, "models": 0}  # the models' rows have seconds


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("change", ["picture", "answer", "question", "weights"])
def test_other_questions_pictures_or_weights_are_another_evaluation(ask, questions, model, tmp_path, change) -> None:
    ask()
    before = snapshot(tmp_path / "out")
    if change == "picture":
        picture(questions.parent / "p.png", seed=9)
    elif change == "weights":
        save = model / "model.safetensors"
        save.write_bytes(save.read_bytes()[:-1] + b"\x01")
    else:
        old, new = ("yes", "no") if change == "answer" else ("is it red", "is it big")
        questions.write_text(questions.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"results\.json holds another evaluation \(other (pictures|asked|weights)\)"):
        ask()
    assert snapshot(tmp_path / "out") == before
    ask(overwrite=True)


@pytest.mark.usefixtures("nothing_asked")
@pytest.mark.parametrize("name", ["results.md", "results.json", "abilities.png", "predictions-teacher.jsonl"])
def test_a_strangers_file_is_refused_before_any_question(ask, tmp_path, name) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: was not written by mmmamba eval; choose .*--overwrite"):
        ask()
    assert snapshot(tmp_path / "out") == {name: b"mine"}


def test_what_lies_beside_the_results_stays_whatever_its_name(ask, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("predictions-mine.jsonl", "notes.md"):
        (out / name).write_text("mine")
    ask(overwrite=True)
    ask(blind=False, overwrite=True)  # its own predictions of the control are gone, nobody else's
    assert not (out / "predictions-blind.jsonl").exists()
    assert (out / "predictions-mine.jsonl").read_text() == (out / "notes.md").read_text() == "mine"


def test_a_result_that_was_edited_is_not_replaced(ask, tmp_path) -> None:
    ask()
    (tmp_path / "out" / "results.md").write_text("my notes")
    with pytest.raises(UserError, match=r"results\.md: was changed since mmmamba eval wrote it"):
        ask()
    ask(overwrite=True)
    assert "my notes" not in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.usefixtures("nothing_asked")
def test_places_that_cannot_be_written_are_found_before_any_question(ask, model, questions, tmp_path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, message in (
        (tmp_path / "file", "is a file; --out takes a folder"),
        (tmp_path / "file" / "below", "can't be made: .*file is not a folder"),
        (tmp_path / "link", "is a link to nothing"),
        (Path("/proc/mmmamba"), "can't be (made|written)"),
        (tmp_path / ("x" * 300), "File name too long"),
        (model, "lies in .*teacher, which is read"),
        (model / "eval", "lies in .*teacher, which is read"),
    ):
        with pytest.raises(UserError, match=message):
            ask(out=out)
    (tmp_path / "other").mkdir()
    os.link(questions, tmp_path / "other" / "results.md")
    with pytest.raises(UserError, match=r"results\.md: is what is read"):
        ask(out=tmp_path / "other", overwrite=True)


@pytest.mark.usefixtures("nothing_asked")
def test_a_folder_in_use_is_refused(ask, tmp_path) -> None:
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match=rf"out: is in use by .*{os.getpid()}"):
        ask()
