"""The demo's two students at the same time: each in a process that may have loaders of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

import small_run
from mmmamba import demo
from mmmamba.errors import UserError


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


def test_both_students_load_with_workers(students: dict[str, Path], tmp_path: Path) -> None:
    models = demo._stage3(Path("out"), "cpu", Console(quiet=True))
    assert set(models) == {"linear", "hybrid"}
    assert all((model / "model.safetensors").is_file() for model in models.values())
    assert "out/hybrid.yaml/model" in Path("out/hybrid.yaml.log").read_text()


def test_what_fails_beside_is_told(students: dict[str, Path]) -> None:
    students["hybrid"].write_text(students["hybrid"].read_text().replace("stage3:\n", "stage3:\n  temperature: -1\n"))
    with pytest.raises(UserError, match=r"hybrid.yaml failed: .*temperature must be greater than 0, got -1"):
        demo._stage3(Path("out"), "cpu", Console(quiet=True))
    assert "error: " in Path("out/hybrid.yaml.log").read_text()
