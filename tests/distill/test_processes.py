"""Several processes: each takes its share of every step, and together they are one that takes all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_losses
import torch
from torch import multiprocessing

import small_run
from mmmamba.checkpoints import read_safetensors
from mmmamba.data.packed_batch import pack
from mmmamba.distill import objectives, processes
from mmmamba.distill.train_config import TrainConfig
from mmmamba.distill.training_data import ProcessOrder
from mmmamba.distill.training_step import Step
from mmmamba.errors import UserError
from mmmamba.model import Model, initialise
from tiny import make_config

pytest.importorskip("accelerate")

CPU = torch.device("cpu")
cheap_pixels = test_losses.cheap_pixels
ROWS = [[sample] for sample in test_losses.SAMPLES]
#: Which rows each of two processes takes.
SHARES = {"alternating": (ROWS[::2], ROWS[1::2]), "uneven": (ROWS[:1], ROWS[1:]), "one idle": (ROWS, [])}


def launched(rank: int, count: int, port: int) -> dict[str, str]:
    """The variables that ``torchrun`` and ``accelerate launch`` set for a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---------------------------------------------------------------------------------------------- gradients


def gradients(name: str, groups: list[Any]) -> dict[str, torch.Tensor]:
    """Losses, the gradient's norm and all gradients of one step, as the optimizer sees them."""
    objective = test_losses.OBJECTIVES[name](initialise(Model(make_config())).double())
    step = Step(objective, TrainConfig(steps=1, batch_size=1, lr=0.0, clip=1e9), CPU, torch.float32)
    losses, norm = step([pack(group) for group in groups], 0.0)
    found = {n: p.grad for n, p in objective.trained.items() if p.grad is not None}
    return {**{f"loss {key}": value for key, value in losses.items()}, "norm": norm, **found}


def process(rank: int, port: int, out: str) -> None:
    os.environ |= launched(rank, 2, port)
    wide = objectives.normalise
    objectives.normalise = lambda tiles: wide(tiles).double()
    assert processes.join(CPU) == CPU and (processes.rank(), processes.count()) == (rank, 2)
    assert processes.is_main() == (rank == 0) and processes.gather([rank, rank]) == [0, 0, 1, 1]
    found = {(n, s): gradients(n, groups[rank]) for n in test_losses.OBJECTIVES for s, groups in SHARES.items()}
    assert gradients("align", []) == {"norm": torch.tensor(0.0)}, "no process has rows: nothing to learn from"
    torch.save(found, f"{out}/{rank}.pt")
    processes.leave()
    assert processes.count() == 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[dict[tuple[str, str], dict[str, torch.Tensor]]]:
    """What each of two processes found, by objective and share."""
    out = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (free_port(), str(out)), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.usefixtures("cheap_pixels")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", test_losses.OBJECTIVES)
def test_losses_and_gradients_are_those_of_one_process(name, share, shared):
    first, second = (found[name, share] for found in shared)
    alone = gradients(name, ROWS)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), f"{key}: the processes drift apart"
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


# ---------------------------------------------------------------------------------------------- shares


def test_shares_are_the_step_of_one_process(monkeypatch):
    def indices(rank: int, count: int) -> list[list[int]]:
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda: count)
        order = ProcessOrder([(50, None), (9, 2.0)], seed=3, batch_size=7)
        return [order.indices(step) for step in range(20)]

    whole = indices(0, 1)
    for parts in zip(whole, *(indices(rank, 3) for rank in range(3)), strict=True):
        step, *shares = parts
        assert sorted(step) == sorted(index for share in shares for index in share)
        assert [len(share) for share in shares] == [3, 2, 2]


def test_a_gpu_for_all_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:1: several processes were launched"):
        processes.join(torch.device("cuda:1"))


# ---------------------------------------------------------------------------------------------- the command


def start(count: int, *args: str | Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    command, pipe = [sys.executable, "-m", "mmmamba", *map(str, args)], subprocess.PIPE
    settings = [small_run.ENVIRONMENT | launched(rank, count, port) for rank in range(count)]
    return [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) for env in settings]


def finish(running: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), said
    return said


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def test_two_processes_make_one_run(teacher_folder, tmp_path):
    """A placement by measurement and a bad sample included; interrupted and resumed, to the same bits."""
    data = small_run.make_data(tmp_path / "data", samples=9)
    data.write_text(data.read_text() + "{}\n")
    plan = small_run.recipe(
        layers="measured:4", data__on_bad_sample="skip", **{f"stage{i}__batch_size": 5 for i in (1, 2, 3)}
    )
    recipe = small_run.write_recipe(tmp_path / "small.yaml", plan)
    command = ["distill", recipe, "--teacher", teacher_folder, "--data", data, "--device", "cpu", "--resume", "--out"]
    one, two, cut = (tmp_path / name / "run" for name in ("one", "two", "cut"))
    finish([small_run.start(*command, one)])
    _, (printed, _) = finish(start(2, *command, two))
    assert not printed, "the main process alone says what comes of it"

    assert [line["tokens"] for line in metrics(one)] == [line["tokens"] for line in metrics(two)]
    for ours, truth in zip(metrics(two), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-2)
    assert sorted(path.name for path in two.rglob("*")) == sorted(path.name for path in one.rglob("*"))
    a, b = (json.loads((run / "manifest.json").read_text()) for run in (one, two))
    assert a["softmax_layers"] == b["softmax_layers"]
    bad = [[entry["where"] for entry in m["skipped"][f"stage{i}"]] for m in (a, b) for i in (1, 2, 3)]
    assert bad == [[f"{data}:10"]] * 6
    ours, truth = (read_safetensors(run / "model" / "model.safetensors") for run in (two, one))
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}")

    running = start(2, *command, cut)
    while not (cut / "metrics.jsonl").is_file() or (cut / "metrics.jsonl").read_bytes().count(b"\n") < 7:
        assert all(process.poll() is None for process in running)
    for process in running:
        process.kill()
        process.communicate()
    finish(start(2, *command, cut))
    assert metrics(cut) == metrics(two)
    assert (cut / "model" / "model.safetensors").read_bytes() == (two / "model" / "model.safetensors").read_bytes()
