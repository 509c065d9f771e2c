"""Files that users have still load, as an older version wrote them: a student's folder, a killed run, a session.

``tests/old_files`` was written by the version before kinds of layers had a package of their own (commit d67043f). It
holds a teacher of two layers; its hybrid student with the gated delta rule, as a delta; the run that made it, killed
after step 2 of stage 3; a session with the student; and what that version went on to compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmmamba.checkpoints import load
from mmmamba.data.processor import Processor
from mmmamba.distill.distill import distill
from mmmamba.inference.session import load_session, save_session
from mmmamba.model import ATTENTION, MAMBA2

OLD = Path(__file__).parent / "old_files"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the old files, which is the current folder."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_an_old_student_folder_gives_the_same_logits(old):
    student = load("student")
    assert student.config.layer_map == (ATTENTION, MAMBA2) and student.config.mixer.rule == "gated_delta"
    logits = student(torch.arange(4, 24)[None], logits="last").logits[0, :8]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"]), rtol=1e-4, atol=1e-4)


def test_an_old_session_goes_on_and_is_written_the_same(old):
    student = load("student")
    chat = load_session("talk.session", student, Processor.from_folder("student"), max_new_tokens=4)
    again = save_session("again.session", chat)
    assert again.read_bytes() == Path("talk.session").read_bytes()
    assert "".join(chat.ask("and 2 ?", ())) and list(chat.answer.token_ids) == EXPECTED["continued"]


def test_an_old_run_is_resumed_after_it_was_killed(old):
    distill("run/recipe.yaml", out=Path("run"), resume=True, device="cpu")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(EXPECTED["losses"], rel=1e-4)
    assert load("run/model").config == load("student").config
