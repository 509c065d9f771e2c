"""Killed at any moment, --resume goes on to the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import small_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")

KILLED_RUNS = Path(__file__).parent / "killed_runs.py"


def run_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """See killed_runs.py."""
    done = subprocess.run(
        [sys.executable, str(KILLED_RUNS)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=small_run.ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def losses(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def assert_same_run(run: Path, reference: Path) -> None:
    assert weights(run) == weights(reference)
    assert losses(run) == losses(reference)
    assert files(run) == files(reference), "nothing of the killed processes is left"


@pytest.fixture(params=["distill", "teach"])
def command(request, tmp_path, teacher_folder, small_data) -> list[str]:
    if request.param == "teach":
        return ["teach", str(small_run.write_recipe(tmp_path / "teach.yaml", small_run.teach_recipe(small_data)))]
    plan = small_run.recipe(layers="hybrid:3", mixer={"rope": True}, stage2__steps=6, stage3__log_every=3)
    path = small_run.write_recipe(tmp_path / "distill.yaml", plan)
    return ["distill", str(path), "--teacher", str(teacher_folder), "--data", str(small_data)]


def test_killed_at_any_disk_operation(command, tmp_path):
    """One run is killed again and again, at moments spread over all it does; another at its very beginning."""
    whole, often, start = (tmp_path / name / "run" for name in ("whole", "often", "start"))

    def job(out: Path, die: int | None = None) -> dict[str, Any]:
        return {"args": [*command, "--out", str(out), "--resume"], "die": die}

    # A resumed run needs about twenty operations to its next checkpoint.
    distils = command[0] == "distill"
    moments = [18, 25, 21, 12, 23] if distils else [11, 14, 13, 12]
    saving_the_model_again = [15, 16, 17] if distils else [13, 14, 15]
    jobs = [
        job(whole),
        *(job(start, die) for die in (1, 2, 4, 5)),
        job(start),
        *(job(often, die) for die in moments),
        job(often),
        *(job(start, die) for die in saving_the_model_again),
        job(start),
    ]
    ended = run_jobs(jobs)
    expected = [0 if job["die"] is None else -signal.SIGKILL for job in jobs]
    assert [entry["ended"] for entry in ended] == expected, "every kill hit"
    left = [name for entry in ended for name in entry["hidden"]]
    assert any("-step" in name and ".tmp-" in name for name in left), "a checkpoint was cut short"
    assert any(name.startswith(".model.old-") for name in left), "a model was moved aside"
    for out in (start, often):
        assert_same_run(out, whole)


def wait_for(process: subprocess.Popen[str], metrics: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)


def test_a_user_kills_the_command_and_resumes_it(tmp_path, teacher_folder, small_data):
    """``python -m mmmamba distill``, killed from outside in every stage, with a worker process."""
    steps = {f"stage{i}__steps": 6 for i in (1, 2, 3)}
    after = {**small_run.recipe(**steps)["stage3"], "train": [*small_run.STAGE2, "o_proj", "mlp"]}
    plan = small_run.recipe(**steps, data__workers=1, stage4=after)
    path = small_run.write_recipe(tmp_path / "plan.yaml", plan)
    command = ["distill", str(path), "--teacher", str(teacher_folder), "--data", str(small_data)]
    cut, whole = tmp_path / "a" / "run", tmp_path / "b" / "run"
    process = small_run.start(*command, "--out", cut)
    wait_for(process, cut / "metrics.jsonl", 3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    ended = run_jobs(
        [
            {"args": [*command, "--out", str(cut)]},  # refused without --resume
            *({"args": [*command, "--out", str(cut), "--resume"], "lines": lines} for lines in (9, 15, 21)),
            *({"args": [*command, "--out", str(out), "--resume"]} for out in (cut, whole)),
        ]
    )
    assert [entry["ended"] for entry in ended] == [2, *[-signal.SIGKILL] * 3, 0, 0]
    assert_same_run(cut, whole)
