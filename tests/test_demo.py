"""The demo's jobs: each in a process that may have loaders of its own, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import small_run
from mmmamba import demo
from mmmamba.ablation.schedule import workers
from mmmamba.errors import UserError
from mmmamba.jobs import run_jobs
from mmmamba.progress import Terminal

TINY = demo.Size(changes={"linear": (), "hybrid": ()}, limit=1, nano=False)


@pytest.fixture
def students(
    tmp_path: Path, teacher_folder: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """Two recipes in the current folder, whose loaders are processes on any machine."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, layers in (("linear", "linear"), ("hybrid", "hybrid:4")):
        plan = small_run.recipe(layers=layers, teacher=str(teacher_folder), data__workers=1)
        plan["data"]["sources"] = [{"path": str(small_data)}]
        found[name] = small_run.write_recipe(tmp_path / f"{name}.yaml", plan)
    monkeypatch.setattr(demo, "STUDENTS", {name: path.name for name, path in found.items()})
    return found


def distil(this: demo._Demo, *names: str) -> None:
    """Run these of the demo's jobs, each in another process."""
    jobs = [replace(job, needs=tuple({*job.needs} & {*names})) for job in this.jobs() if job.name in names]
    assert [job.name for job in jobs] == [*names]
    with workers(2, "cpu") as executor:
        run_jobs(jobs, demo.STEPS, executor, 2, Terminal(quiet=True))
    for job in jobs[1:]:
        assert job.watch is not None
        share, words = job.watch()
        assert share == 1 and ", loss " in words


def test_both_students_load_with_workers(students: dict[str, Path], tmp_path: Path) -> None:
    distil(demo._Demo(Path("out"), TINY, 1, "cpu"), "data", "alignment", "linear", "hybrid")
    assert all((Path("out") / path.name / "model" / "model.safetensors").is_file() for path in students.values())
    assert "out/hybrid.yaml/model" in Path("out/logs/hybrid.log").read_text()
    assert f"stages 1 and 2 are those of {tmp_path / 'out' / 'aligned'}" in Path("out/logs/linear.log").read_text()
    longer = demo.Size(changes={"linear": ("stage3.steps=100",), "hybrid": ()}, limit=1, nano=False)
    with pytest.raises(UserError, match="out: holds a demo of another length or version; pass --fresh"):
        demo._Demo(Path("out"), longer, 1, "cpu")


def test_what_fails_beside_is_told(students: dict[str, Path]) -> None:
    this = demo._Demo(Path("out"), TINY, 1, "cpu")
    students["hybrid"].write_text(students["hybrid"].read_text().replace("stage3:\n", "stage3:\n  temperature: -1\n"))
    with pytest.raises(UserError, match=r"hybrid failed: .*temperature must be greater than 0, got -1"):
        distil(this, "hybrid")
    assert "error: " in Path("out/logs/hybrid.log").read_text()


@pytest.mark.parametrize(("size", "asked"), [(demo.SHORT, 5), (demo.LONG, 8)])
def test_who_is_asked(size: demo.Size, asked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "builtin_names", lambda: demo.SHIPPED.values())
    jobs = demo._Demo(tmp_path, size, 1, "cpu").jobs()
    assert sum(job.name.startswith("ask ") for job in jobs) == asked
    names = [job.name for job in jobs]
    assert all(need in names for job in jobs for need in job.needs)


def test_a_run_is_watched_by_what_it_logs(tmp_path: Path) -> None:
    look = demo._watch(tmp_path, {"stage1": 10, "stage2": 30})
    assert look() == (0.0, "")
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"stage": "stage1", "step": 10, "loss": 2.0}) + "\n")
    assert look() == (0.25, "10/40, loss 2")
    log.write_text(log.read_text() + json.dumps({"stage": "stage2", "step": 20, "loss": 1.23456}) + "\n" + '{"sta')
    assert look() == (0.75, "30/40, loss 1.23")
    log.write_text(json.dumps({"stage": "stage3", "step": 5, "loss": 1.0}) + "\n")
    assert look() == (0.0, "")
    log.write_text("no JSON\n")
    assert look() == (0.0, "")
