"""A table file over tiny runs: a random teacher of five layers, six samples, two questions an ability."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from made_up import ABILITIES, plan_data

import small_run
from small_run import conversation, write_jsonl


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, small_data: Path) -> Path:
    """A folder with ``base.yaml``, ``tiny.yaml`` and the questions, to run commands in."""
    for source, abilities in (("easy-vqa", ["easy"]), ("primer", ABILITIES[1:])):
        records = [
            {"id": f"{ability}-{i}", "conversations": conversation(f"how many {i} ?", str(i)), "ability": ability}
            for ability in abilities
            for i in range(3)
        ]
        (tmp_path / "questions" / source).mkdir(parents=True)
        write_jsonl(tmp_path / "questions" / source / "test.jsonl", records)
    two = {f"stage{i}__steps": 2 for i in (1, 2, 3)}
    base = small_run.recipe(**two, teacher=str(teacher_folder))
    base["data"]["sources"] = [{"path": str(small_data)}]
    small_run.write_recipe(tmp_path / "base.yaml", base)
    plan = plan_data(str(tmp_path / "base.yaml"), questions__data=str(tmp_path / "questions"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return tmp_path
