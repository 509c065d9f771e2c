"""Which runs, where and in what order: nothing twice, nothing lost, shared stages first, a failure stops no other."""

from __future__ import annotations

import multiprocessing
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch
from made_up import plan_data

from mmmamba.ablation import schedule
from mmmamba.ablation.experiment import Setting
from mmmamba.ablation.journal import Result
from mmmamba.ablation.plan import Cell, Plan, cells_of, load_plan
from mmmamba.ablation.schedule import Unit, run, shard, units
from mmmamba.config_files import from_dict
from mmmamba.device import cores
from mmmamba.errors import UserError


def tiny() -> list[Unit]:
    return units(cells_of(from_dict(Plan, plan_data("nano-linear")), "tiny.yaml"))


def test_a_run_that_two_cells_ask_for_is_made_once() -> None:
    found = tiny()
    assert [[str(cell) for cell in unit.cells] for unit in found] == [
        ["stages/all, seed 0", "layers/none, seed 0"],
        ["layers/two, seed 0"],  # beside the one that it shares stages 1 and 2 with
        ["stages/all, seed 1", "layers/none, seed 1"],
        ["layers/two, seed 1"],
        ["stages/only-3, seed 0"],
        ["stages/only-3, seed 1"],
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards_are_disjoint_whole_and_of_a_size(count: int) -> None:
    whole = units(cells_of(*load_plan("nano-ablation")))
    parts = [shard(whole, f"{k}/{count}") for k in range(1, count + 1)]
    assert [unit for part in parts for unit in part] == whole
    steps = [sum(sum(unit.first.steps) for unit in part) for part in parts]
    assert max(steps) < 1.35 * sum(steps) / count
    alignments = [{unit.first.alignment for unit in part} for part in parts]
    assert sum(len(one & next) for one, next in pairwise(alignments)) <= count - 1


def test_more_shards_than_runs_lose_nothing() -> None:
    parts = [shard(tiny(), f"{k}/50") for k in range(1, 51)]
    assert [unit for part in parts for unit in part] == tiny()


@pytest.mark.parametrize("text", ["2", "0/2", "3/2", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_wrong_shard_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--shard {text}: must be K/N"):
        shard(tiny(), text)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is aligned and measured, instead of being so; a cell whose name is in ``calls`` beforehand fails."""
    made: list[str] = []

    def align(cell: Cell, setting: Setting) -> None:
        made.append(f"align {cell.alignment}")

    def measure(cell: Cell, setting: Setting) -> Result:
        if f"fail {cell}" in made:
            raise UserError("stage3, step 4: the loss is nan")
        made.append(str(cell))
        return made_up.result("rope", cell.seed, 1, 1, 1, id=cell.id)

    monkeypatch.setattr(schedule, "align", align)
    monkeypatch.setattr(schedule, "measure", measure)
    return made


def go(todo: list[Unit], tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    done: list[str] = []

    def note(unit: Unit, result: Any) -> None:
        assert result.id == unit.first.id
        done.append(str(unit.first))

    return done, run(todo, Setting(out=tmp_path, device="cpu"), 1, note)


def test_shared_stages_run_first_and_once(calls: list[str], tmp_path: Path) -> None:
    todo = tiny()
    done, failed = go(todo, tmp_path)
    assert failed == {} and sorted(done) == sorted(str(unit.first) for unit in todo)
    first, second = todo[0].first, todo[2].first
    assert calls == [
        f"align {first.alignment}", "stages/all, seed 0", "layers/two, seed 0",
        f"align {second.alignment}", "stages/all, seed 1", "layers/two, seed 1",
        "stages/only-3, seed 0", "stages/only-3, seed 1",
    ]  # fmt: skip


def test_workers_start_loaders_as_this_process_would() -> None:
    with schedule.workers(2, "cpu") as executor:
        assert executor.submit(multiprocessing.get_start_method).result() == multiprocessing.get_start_method()
        assert executor.submit(torch.get_num_threads).result() == max(1, cores() // 2)


@pytest.mark.parametrize(("ours", "theirs"), [(None, ["0", "1"]), ("3,GPU-5e", ["3", "GPU-5e"])])
def test_workers_are_dealt_out_to_all_gpus(
    ours: str | None, theirs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if ours is not None:
        monkeypatch.setenv(name, ours)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [schedule._gpu(job, "auto") for job in range(4)] == [*theirs, *theirs]
    assert schedule._gpu(1, "cuda:1") is None, "the one that was asked for"
    with schedule.workers(2, "auto") as executor:  # the first to start takes the first
        assert executor.submit(os.getenv, name).result() == theirs[0]
    with schedule.workers(2, "cuda:1") as executor:
        assert executor.submit(os.getenv, name).result() == ours
    assert os.environ.get(name) == ours


def test_a_cell_that_fails_stops_no_other(calls: list[str], tmp_path: Path) -> None:
    calls.append("fail layers/two, seed 0")
    done, failed = go(tiny(), tmp_path)
    assert failed == {"layers/two, seed 0": "stage3, step 4: the loss is nan"} and len(done) == 5


def test_where_the_alignment_fails_all_that_needs_it_does(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def align(cell: Cell, setting: Setting) -> None:
        raise UserError("stage1, step 1: the loss is nan")

    monkeypatch.setattr(schedule, "align", align)
    done, failed = go(tiny(), tmp_path)
    assert done == ["stages/only-3, seed 0", "stages/only-3, seed 1"]
    assert len(failed) == 4 and set(failed.values()) == {"stage1, step 1: the loss is nan"}
