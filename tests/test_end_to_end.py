"""Every verb once, on the command line, each on what the ones before it left: data, teacher, students, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmmamba.checkpoints import fingerprint, load, read_config
from mmmamba.cli import main
from mmmamba.evaluation.suite import NANO_ABILITIES
from small_run import STAGE1, STAGE2, teach_recipe, write_jsonl, write_recipe

SOURCES = [{"path": f"primer/train-{name}.jsonl"} for name in ("scene", "text", "recall-1x")]


def run(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, a teacher taught on it, and its linear and hybrid students, all made by the verbs."""
    place = tmp_path_factory.mktemp("end-to-end")
    data = {"root": str(place / "data"), "scale": 0.01, "sources": SOURCES, "workers": 0, "max_length": 400}
    teach = teach_recipe(Path("unused"), vocab_size=400, train__steps=3) | {"data": data}
    stage = {"steps": 2, "batch_size": 2, "lr": 1e-3, "log_every": 1, "train": STAGE2}
    plan: dict[str, Any] = {"name": "student", "teacher": "unset", "mixer": {"rope": True}, "data": data}
    plan |= {"stage1": {**stage, "train": STAGE1}, "stage2": stage, "stage3": stage}
    write_recipe(place / "teacher.yaml", teach)
    write_recipe(place / "student.yaml", plan)

    for source in ("easy-vqa", "primer"):
        run("data", "build", "--out", place / "data", "--scale", "0.01", "--workers", "1", "--source", source)
    run("teach", place / "teacher.yaml", "--out", place / "teacher", "--device", "cpu")
    teacher = place / "teacher" / "model"
    before = fingerprint(teacher)
    for name, layers in {"linear": "linear", "hybrid": "[0]"}.items():
        out = place / "runs" / name
        run("distill", place / "student.yaml", "--teacher", teacher, "--set", f"layers={layers}",
            "--out", out, "--device", "cpu")  # fmt: skip
    assert fingerprint(teacher) == before
    return place


def test_the_students_are_what_was_asked_for(place: Path) -> None:
    assert read_config(place / "runs" / "linear" / "model").layer_map == ("mamba2", "mamba2")
    assert read_config(place / "runs" / "hybrid" / "model").layer_map == ("attention", "mamba2")
    teacher, student = load(place / "teacher" / "model"), load(place / "runs" / "linear" / "model")
    assert student.head.weight.equal(teacher.head.weight)
    assert not student.mixer(0).q_proj.weight.equal(teacher.mixer(0).q_proj.weight)  # stage 2 moved it


def test_run_folders_explain_themselves(place: Path) -> None:
    for name in ("linear", "hybrid"):
        folder = place / "runs" / name
        entries = {"recipe.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "model"}
        assert {path.name for path in folder.iterdir()} == entries
        manifest = json.loads((folder / "manifest.json").read_text())
        assert set(manifest["stages"]) == {"stage1", "stage2", "stage3"}
        assert ("from" in manifest["stages"]["stage1"]) == (name == "hybrid"), "the hybrid takes the linear one's"
    metrics = [json.loads(line) for line in (place / "runs" / "linear" / "metrics.jsonl").read_text().splitlines()]
    expected = [(stage, step) for stage in manifest["stages"] for step in (1, 2)]
    assert [(entry["stage"], entry["step"]) for entry in metrics] == expected
    assert all(entry["loss"] >= 0 and entry["tokens"] > 0 for entry in metrics)


def test_a_finished_run_is_not_made_twice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["distill", place / "student.yaml", "--teacher", place / "teacher" / "model", "--out",
             place / "runs" / "linear", "--device", "cpu"]  # fmt: skip
    before = fingerprint(place / "runs" / "linear" / "model")
    assert main([str(word) for word in again]) == 2
    assert "add --resume" in capsys.readouterr().err
    run(*again, "--resume")
    assert fingerprint(place / "runs" / "linear" / "model") == before


def test_eval_asks_every_ability_of_both(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "evaluation"
    run("eval", place / "runs" / "hybrid" / "model", "--against", place / "teacher" / "model", "--data-dir",
        place / "data", "--limit", "1", "--max-new-tokens", "2", "--out", out, "--device", "cpu")  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert [model["label"] for model in results["models"]] == ["model", "model (teacher)", "blind"]
    assert set(results["models"][0]["abilities"]) == set(NANO_ABILITIES)
    assert (out / "results.md").is_file() and (out / "abilities.png").is_file()
    assert "Retention" in capsys.readouterr().out


def test_a_converted_benchmark_is_scored(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": "Is it red?", "label": label} for label in ("yes", "no")]
    write_jsonl(tmp_path / "coco_pope_random.json", rows)
    run("data", "convert", "pope", tmp_path / "coco_pope_random.json", "--out", tmp_path / "pope.jsonl")
    advice = capsys.readouterr().out.splitlines()[-1].split()
    assert advice[:3] == ["mmmamba", "eval", "MODEL"]
    model = place / "runs" / "linear" / "model"
    run("eval", model, *advice[3:], "--max-new-tokens", "2", "--out", tmp_path / "pope", "--device", "cpu")
    [result, _] = json.loads((tmp_path / "pope" / "results.json").read_text())["models"]
    assert set(result["abilities"]) == {"random"}


def test_chat_answers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    model = place / "runs" / "linear" / "model"
    capsys.readouterr()
    run("chat", model, "Which colour?", "--image", tmp_path / "a.png", "--max-new-tokens", "3", "--device", "cpu")
    assert capsys.readouterr().out.endswith("\n")


def test_version_names_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    run("version")
    assert "torch" in capsys.readouterr().out
