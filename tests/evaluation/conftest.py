"""Small question sets on disk, in the layout of the built-in data and of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from question_files import picture, record, write_jsonl

from mmmamba.evaluation.suite import NANO_ABILITIES


@pytest.fixture
def nano_data(tmp_path: Path) -> Path:
    """A built data folder with four questions per ability; recall is text only."""
    folder = tmp_path / "nano"
    picture(folder / "easy-vqa" / "p.png")
    picture(folder / "primer" / "p.png", seed=1)
    for ability in NANO_ABILITIES:
        source = "easy-vqa" if ability == "easy" else "primer"
        image = None if ability.startswith(("recall", "text")) else "p.png"
        file = folder / source / "test.jsonl"
        earlier = file.read_text() if file.is_file() else ""
        records = [record(f"{ability}-{i}", f"how many {i} ?", str(i), image, ability=ability) for i in range(4)]
        write_jsonl(file, records)
        file.write_text(earlier + file.read_text())
    return folder


@pytest.fixture
def own_data(tmp_path: Path) -> Callable[..., Path]:
    """``own_data(record, …)`` → a JSONL file beside the picture p.png."""

    def build(*records: dict[str, Any]) -> Path:
        picture(tmp_path / "own" / "p.png")
        return write_jsonl(tmp_path / "own" / "questions.jsonl", list(records))

    return build
