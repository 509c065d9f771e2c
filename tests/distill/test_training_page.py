"""The page about training says what the results of scripts/gpu/training.py hold."""

from __future__ import annotations

import runpy
from argparse import Namespace
from pathlib import Path

import pytest

from documents import ROOT

PLACE = ROOT / "docs" / "results"


@pytest.mark.parametrize("file", sorted(PLACE.glob("training-*.json")), ids=lambda file: file.stem)
def test_the_page_has_the_tables_of_the_results(file: Path):
    script = runpy.run_path(str(ROOT / "scripts" / "gpu" / "training.py"))
    request = Namespace(out=file, device="cpu", recipe="hovle-2.6b-linear", set=[], geometry="hovle-2.6b")
    assert script["Results"](request).markdown() in (PLACE / "training.md").read_text(encoding="utf-8")
