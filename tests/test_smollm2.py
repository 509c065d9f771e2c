"""A real model against transformers, where its file is at hand (scripts/smollm2.py checks more prompts)."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "data" / "smollm2").glob("*.gguf"))


@pytest.mark.skipif(not FILES, reason="no data/smollm2/*.gguf: python scripts/smollm2.py fetches it with pip (93 MB)")
def test_smollm2_is_that_of_transformers():
    script = runpy.run_path(str(ROOT / "scripts" / "smollm2.py"))
    prompts = (script["PROMPTS"][6], script["PROMPTS"][17])  # odd spaces; a conversation
    for outcome in script["compare"](FILES[0], prompts):
        assert outcome.passed, outcome
