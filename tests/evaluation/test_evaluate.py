"""The whole way with tiny random models: answers, comparison with a teacher, files, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from question_files import record

from mmmamba.data.processor import Encoded, Processor
from mmmamba.errors import UserError
from mmmamba.evaluation import predict
from mmmamba.evaluation.aggregate import Report
from mmmamba.evaluation.evaluate import compare, evaluate
from mmmamba.evaluation.predict import Loaded, answer
from mmmamba.evaluation.report import write_report
from mmmamba.evaluation.suite import Suite, nano_suite, own_suite
from mmmamba.inference.engine import Generated

Own = Callable[..., Path]


@pytest.fixture
def teacher(tiny_model: Callable[..., Any], tiny_processor: Processor) -> Loaded:
    return Loaded(tiny_model(), tiny_processor)


@pytest.fixture
def student(tiny_model: Callable[..., Any], tiny_processor: Processor) -> Loaded:
    return Loaded(tiny_model(("mamba2",) * 5, seed=3), tiny_processor)


def scripted(monkeypatch: pytest.MonkeyPatch, answers: Callable[[Loaded, Encoded], str]) -> None:
    """Let models say what ``answers`` says: scores are then known. Everything around the words stays real."""

    def generate(model: Any, processor: Processor, prompts: list[Encoded], **options: Any) -> list[Generated]:
        said = [answers(Loaded(model, processor), prompt) for prompt in prompts]
        options["progress"](len(said), len(said))
        return [Generated(text=text, token_ids=(5, 6), logprobs=(0.0, 0.0), finish="stop") for text in said]

    monkeypatch.setattr(predict, "generate", generate)


def is_student(loaded: Loaded) -> bool:
    return "mamba2" in loaded.model.config.layer_map


def is_blind(prompt: Encoded) -> bool:
    return bool(len(prompt.tiles)) and bool((prompt.tiles == 128).all())


def test_real_models_end_to_end(nano_data: Path, teacher: Loaded, student: Loaded, tmp_path: Path) -> None:
    suite = nano_suite(nano_data, limit=1, max_new_tokens=3)
    report = compare({"teacher": teacher, "linear": student}, suite, against={"linear": "teacher"})
    assert [model.label for model in report.models] == ["teacher", "linear", "blind"]
    assert [model.against for model in report.models] == [None, "teacher", "teacher"]
    assert [model.layers for model in report.models] == ["5 attention", "5 mamba2", "5 attention"]
    for model in report.models:
        assert set(model.abilities) == set(suite.abilities)
        assert model.mean.n == len(suite.items)
        assert model.mean.nll > 0
        assert model.mean.perplexity == pytest.approx(np.exp(model.mean.nll))
        assert model.mean.tokens_per_second > 0
    data = json.loads(write_report(report, tmp_path / "out").read_text())
    assert data["questions"] == dict.fromkeys(suite.abilities, 1)
    assert (tmp_path / "out" / "abilities.png").stat().st_size > 1000


def test_answers_and_perplexity_do_not_depend_on_batching(
    nano_data: Path, student: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = nano_suite(nano_data, limit=3, abilities=["easy", "read"], max_new_tokens=4)
    whole = answer(student, suite)
    monkeypatch.setattr(predict, "CHUNK_TOKENS", 1)
    single = answer(student, suite, batch_tokens=1)
    assert whole.texts == single.texts
    for index, score in whole.likelihood.items():
        assert score.tokens == single.likelihood[index].tokens
        assert score.nll == pytest.approx(single.likelihood[index].nll, rel=1e-4)


def test_the_prompt_is_what_the_processor_makes_of_it(nano_data: Path, own_data: Own, teacher: Loaded) -> None:
    turns = [("human", "<image>\nhow many ?"), ("gpt", "2"), ("human", "is it red ?"), ("gpt", "no")]
    conversation = {"id": "c", "image": "p.png", "conversations": [{"from": f, "value": v} for f, v in turns]}
    for item in (*nano_suite(nano_data, limit=1).items, *own_suite(own_data(conversation)).items):
        prompt, whole = predict._encode(teacher.processor, item, blind=False)
        expected = teacher.processor.encode(item.sample, answer=False)
        assert np.array_equal(prompt.input_ids, expected.input_ids)
        assert np.array_equal(prompt.tiles, expected.tiles)
        said = whole.input_ids[whole.labels != -100]
        assert teacher.processor.decode(said.tolist()) == item.references[0]


def test_perplexity_is_that_of_the_reference(own_data: Own, teacher: Loaded) -> None:
    suite = own_suite(own_data(record("a", "is it red ?", "no")), max_new_tokens=1)
    whole = teacher.processor.encode(suite.items[0].sample)
    with torch.no_grad():
        logits = teacher.model(torch.from_numpy(whole.input_ids).long()[None]).logits[0].log_softmax(-1)
    targets = [(t, int(token)) for t, token in enumerate(whole.labels) if token != -100]
    expected = -sum(float(logits[t - 1, token]) for t, token in targets)
    found = answer(teacher, suite).likelihood[0]
    assert found.tokens == len(targets)
    assert found.nll == pytest.approx(expected, rel=1e-4)


def test_blind_sees_grey_pictures_only(nano_data: Path, teacher: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watch(loaded: Loaded, prompt: Encoded) -> str:
        seen.append(is_blind(prompt))
        return "1"

    scripted(monkeypatch, watch)
    suite = nano_suite(nano_data, abilities=["easy", "recall-1x"])
    answer(teacher, suite)
    answer(teacher, suite, blind=True)
    assert seen == [False] * 8 + [True] * 4 + [False] * 4  # recall has no picture to blank


def scored(suite: Suite, monkeypatch: pytest.MonkeyPatch, teacher: Loaded, student: Loaded) -> Report:
    """Teacher right on all, blind on a quarter, student on half (and it says what the blind one says elsewhere)."""

    def say(loaded: Loaded, prompt: Encoded) -> str:
        number = int(prompt.id.rsplit("-", 1)[1])
        if is_student(loaded):
            return str(number) if number < 2 else "0"
        return "0" if is_blind(prompt) else f" {number}. "

    scripted(monkeypatch, say)
    return compare({"teacher": teacher, "linear": student}, suite, against={"linear": "teacher"})


def test_numbers_of_a_comparison(
    nano_data: Path, teacher: Loaded, student: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scored(nano_suite(nano_data, abilities=["easy", "read"]), monkeypatch, teacher, student)
    assert report.model("teacher").mean.score.value == 1
    assert report.model("blind").mean.score.value == 0.25
    linear = report.model("linear")
    for result in (*linear.abilities.values(), linear.mean):
        assert result.score.value == 0.5
        assert result.retention is not None
        assert result.retention.value == 0.5
        assert result.retention_over_chance == pytest.approx((0.5 - 0.25) / (1 - 0.25))
        assert result.agreement is not None
        assert result.agreement.value == 0.5
    assert linear.abilities["easy"].chance == 0.25
    assert linear.abilities["easy"].chance_from == "answers of blind"
    assert [p.correct for p in report.predictions["linear"]] == [True, True, False, False] * 2


def test_stated_chance_is_used_where_nobody_was_blinded(
    own_data: Own, teacher: Loaded, student: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda loaded, prompt: "b" if is_student(loaded) and prompt.id == "2" else "a")
    path = own_data(*(record(str(i), "q", "a", chance=0.5) for i in range(4)))
    report = compare({"t": teacher, "s": student}, own_suite(path), against={"s": "t"}, blind=False)
    assert [model.label for model in report.models] == ["t", "s"]
    result = report.model("s").abilities["all"]
    assert (result.chance, result.chance_from) == (0.5, "stated by the data")
    assert result.retention_over_chance == pytest.approx(0.5)


def test_mme_retention_is_the_ratio_of_scores(
    own_data: Own, teacher: Loaded, student: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch, lambda loaded, prompt: "No" if is_student(loaded) and prompt.id == "0" else "Yes")
    images = ["p.png", "p.png", "own/../p.png", "own/../p.png"]
    (tmp_path / "own" / "own").mkdir(parents=True)
    path = own_data(*(record(str(i), "q", "yes", images[i], ability="OCR") for i in range(4)))
    report = compare({"t": teacher, "s": student}, own_suite(path, metric="mme"), against={"s": "t"}, blind=False)
    result = report.model("s").abilities["OCR"]
    assert result.extra["score"] == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert result.retention is not None
    assert result.retention.value == pytest.approx(result.extra["score"] / 200)
    assert report.model("s").mean.extra["perception"] == pytest.approx(125)


@pytest.mark.parametrize(
    ("attribute", "option", "row"),
    [("int8_steps", "int8", "s, int8"), ("half_states", "half_states", "s, bfloat16 states")],
)
def test_cheaper_steps_get_a_row_of_their_own_which_decodes_with_them(
    attribute: str,
    option: str,
    row: str,
    nano_data: Path,
    teacher: Loaded,
    student: Loaded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, lambda loaded, prompt: "1" if getattr(loaded.model, attribute) else "2")
    suite = nano_suite(nano_data, limit=1)
    report = compare({"t": teacher, "s": student}, suite, against={"s": "t"}, **{option: ["s"]})
    assert [(m.label, m.against) for m in report.models] == [("t", None), ("s", "t"), (row, "t"), ("blind", "t")]
    assert not getattr(student.model, attribute)
    rounded, own = report.model(row), report.model("s")
    assert rounded.mean.nll == own.mean.nll  # likelihoods come from a pass
    said = {label: {one.prediction for one in given} for label, given in report.predictions.items()}
    assert said == {"t": {"2"}, "s": {"2"}, row: {"1"}, "blind": {"2"}}
    with pytest.raises(UserError, match=f"cannot ask 'x' with {row.removeprefix('s, ')}"):
        compare({"s": student}, suite, **{option: ["x"]})


def test_a_network_without_states_has_none_in_bfloat16(nano_data: Path, teacher: Loaded) -> None:
    with pytest.raises(UserError, match="'t' with bfloat16 states: it has no Mamba-2 layer"):
        compare({"t": teacher}, nano_suite(nano_data, limit=1), half_states=["t"])


def test_several_teachers_get_a_blind_row_each(
    nano_data: Path, teacher: Loaded, student: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda loaded, prompt: "1")
    models = {"a": teacher, "a student": student, "b": teacher, "b student": student}
    report = compare(models, nano_suite(nano_data, limit=1), against={"a student": "a", "b student": "b"})
    assert [(m.label, m.against) for m in report.models] == [
        ("a", None),
        ("a student", "a"),
        ("b", None),
        ("b student", "b"),
        ("a, blind", "a"),
        ("b, blind", "b"),
    ]


def test_one_bad_picture_stops_or_is_left_out_for_everyone(
    own_data: Own, teacher: Loaded, student: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda loaded, prompt: "a")
    path = own_data(record("good", "q", "a", "p.png"), record("bad", "q", "a", "missing.png"))
    with pytest.raises(UserError, match=r"questions\.jsonl:2: 'image': no such file: .*missing\.png"):
        compare({"t": teacher}, own_suite(path))
    report = compare({"t": teacher, "s": student}, own_suite(path), against={"s": "t"}, on_bad_sample="skip")
    assert [item.sample.id for item in report.items] == ["good"]
    assert {len(said) for said in report.predictions.values()} == {1}
    assert [note["id"] for note in report.bad_samples] == ["bad"]
    with pytest.raises(UserError, match="no question could be asked; 1 were skipped"):
        compare({"t": teacher}, replace(own_suite(path), items=own_suite(path).items[1:]), on_bad_sample="skip")


@pytest.fixture
def folders(teacher: Loaded, student: Loaded, tmp_path: Path) -> tuple[Path, Path]:
    """(student, teacher) as checkpoint folders."""
    from mmmamba.checkpoints import save_hovle, save_student

    save_hovle(teacher.model, teacher.processor, tmp_path / "teacher", dtype=torch.float32)
    save_student(
        student.model, tmp_path / "linear", teacher=tmp_path / "teacher", delta=False, processor=student.processor
    )
    return tmp_path / "linear", tmp_path / "teacher"


def test_the_verb_writes_a_folder(
    folders: tuple[Path, Path], nano_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = folders
    out = tmp_path / "out"
    options: dict[str, Any] = {
        "against": str(teacher), "data_dir": nano_data, "limit": 1, "abilities": ("easy", "read"), "out": out,
        "device": "cpu", "max_new_tokens": 2,
    }  # fmt: skip
    evaluate(str(student), **options)
    assert f"results: {out / 'results.json'}" in capsys.readouterr().out
    data = json.loads((out / "results.json").read_text())
    assert [model["label"] for model in data["models"]] == ["linear", "teacher", "blind"]
    assert data["models"][0]["against"] == "teacher"
    assert {p.name for p in out.iterdir()} == {
        ".mmmamba.json", "results.json", "results.md", "abilities.png", "abilities.svg",
        "predictions-linear.jsonl", "predictions-teacher.jsonl", "predictions-blind.jsonl",
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "predictions-linear.jsonl").read_text().splitlines()]
    assert [line["ability"] for line in lines] == ["easy", "read"]
    assert set(lines[0]) == {"id", "ability", "prompt", "reference", "prediction", "score", "correct"}
    assert "| linear | teacher |" in (out / "results.md").read_text()

    evaluate(str(student), **options)  # the same again is no other evaluation
    with pytest.raises(UserError, match=r"holds another evaluation \(other models, weights\); choose .*--overwrite"):
        evaluate(str(student), **(options | {"against": None}))
    evaluate(str(student), **(options | {"against": None}), overwrite=True)
    assert not (out / "predictions-teacher.jsonl").exists()
    assert json.loads((out / "results.json").read_text())["models"][1]["label"] == "blind"


def test_the_verb_scores_own_data_by_any_metric(folders: tuple[Path, Path], own_data: Own, tmp_path: Path) -> None:
    path = own_data(
        record("a", "is it red ?", "yes", "p.png", choices=["yes", "no"]),
        record("b", "is it blue ?", "no", "p.png", choices=["yes", "no"]),
    )
    for metric in ("exact", "yes_no", "choice", "mme", "vqa"):
        out = tmp_path / metric
        evaluate(str(folders[0]), data=path, metric=metric, out=out, max_new_tokens=2, device="cpu")  # type: ignore[arg-type]
        data = json.loads((out / "results.json").read_text())
        assert data["metric"] == metric
        assert data["questions"] == {"all": 2}


def test_contradictory_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass them with --data"):
        evaluate("nano-linear", metric="vqa")
    with pytest.raises(UserError, match="pass one of them"):
        evaluate("nano-linear", data=tmp_path / "a.jsonl", data_dir=tmp_path)
    with pytest.raises(UserError):
        evaluate(str(tmp_path / "missing"), data=tmp_path / "a.jsonl", out=tmp_path / "out")


@pytest.mark.parametrize("device", ["gpu0", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--device {device}"):
        predict.load_model(tmp_path, device=device)
