"""The verb on tiny runs, on the CPU: all that it leaves, killed and gone on with, in parts, several at once."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import small_run
from mmmamba import cli
from mmmamba.ablation.ablate import ablate
from mmmamba.ablation.journal import Result, read
from mmmamba.ablation.report import filled
from mmmamba.errors import UserError
from mmmamba.locks import alone_in


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: sums are then in one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def go(place: Path, out: str = "out", **options: Any) -> Path:
    return ablate(str(place / "tiny.yaml"), out=place / out, device="cpu", **options)


def named(file: Path) -> dict[str, Result]:
    return {f"{result.table}/{result.cell}/{result.seed}": result for result in read(file).cells}


def numbers(file: Path) -> dict[str, Any]:
    """What must not depend on who made it, when, and in what order."""
    return {name: (r.id, r.losses, r.abilities, r.mean, r.steps, r.set) for name, r in sorted(named(file).items())}


EVERY = [f"{cell}/{seed}" for cell in ("layers/none", "layers/two", "stages/all", "stages/only-3") for seed in (0, 1)]


def test_a_whole_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = place / "page.md"
    page.write_text("<!-- ablation: stages of tiny.jsonl -->\n<!-- /ablation -->\n")
    file = go(place, into=(page,))
    found = named(file)
    assert sorted(found) == EVERY and len(file.read_text().splitlines()) == 9
    one, two, alone = found["stages/all/0"], found["layers/two/0"], found["stages/only-3/0"]
    assert one.abilities == found["layers/none/0"].abilities and one.id == found["layers/none/0"].id
    assert (one.shared, two.shared, alone.shared) == (True, True, False)
    assert set(one.losses) == {"stage1", "stage2", "stage3"} and set(alone.losses) == {"stage3"}
    assert one.losses["stage1"] == two.losses["stage1"] and one.losses["stage3"] != two.losses["stage3"]
    assert one.losses["stage3"] != found["stages/all/1"].losses["stage3"], "seeds differ"
    assert {name: ability.n for name, ability in one.abilities.items()} == {"easy": 2, "read": 2, "recall-4x": 2}
    assert one.device == "cpu" and one.precision == "float32" and one.versions["torch"]
    assert (alone.steps, one.steps) == ((0, 0, 2), (2, 2, 2)) and one.seconds["distill"] > 0
    # Runs are removed when their line is written; alignments stay.
    assert {path.name for path in (place / "out" / "runs").glob("*/*")} == {"aligned"}
    assert len(list((place / "out" / "teachers").iterdir())) == 1
    for name in ("tables.md", "stages.svg", "stages.png", "layers.svg"):
        assert (place / "out" / name).stat().st_size > 500
    assert filled(page) == page.read_text() and "Does each stage bring something?" in page.read_text()
    assert (place / "tiny.jsonl").read_bytes() == file.read_bytes() and (place / "tiny-stages.svg").is_file()
    log = next((place / "out" / "logs").glob("seed0-layers-two-*.log")).read_text()
    assert "stages 1 and 2 are those of" in log

    # Results beside a page are not replaced by fewer.
    with pytest.raises(UserError, match=r"tiny\.jsonl holds results of 6 runs that .*none.* lacks; --merge "):
        go(place, out=place / "none", report=True, into=(page,))
    assert (place / "tiny.jsonl").read_bytes() == file.read_bytes()

    # Again: everything is known, nothing runs, and no byte changes.
    before = file.read_bytes()
    capsys.readouterr()
    assert go(place) == file and file.read_bytes() == before
    assert "6 runs: 6 finished, 0 to go" in capsys.readouterr().err

    # A cell that is changed runs again, one that asks for what is known under a new name does not.
    text = (place / "tiny.yaml").read_text().replace("title: How many?\n", "title: How many?\n    seeds: [0]\n")
    text = text.replace("      none: {}\n", "      none: {}\n      also: {}\n      other: {stage3.lr: 0.01}\n")
    (place / "tiny.yaml").write_text(text)
    go(place)
    assert "6 runs: 5 finished, 1 to go" in capsys.readouterr().err
    found = named(file)
    assert set(found) == {*EVERY, "layers/also/0", "layers/other/0"}
    assert found["layers/also/0"].abilities == one.abilities and found["layers/also/0"].set == one.set
    assert found["layers/other/0"].losses["stage3"] != one.losses["stage3"]


def test_cells_may_start_otherwise_train_more_and_go_on(place: Path) -> None:
    more = "[dt_proj, conv, gate_proj, norm, q_proj, k_proj, v_proj, o_proj]"
    cells = f"""      none: {{}}
      scratch: {{init: scratch, stage3.train: {more}}}
      after: {{stage3.steps: 1, stage4: {{train: {more}, steps: 3, batch_size: 2, lr: 0.01}}}}
"""
    text = (place / "tiny.yaml").read_text()
    (place / "tiny.yaml").write_text(text.replace("      none: {}\n", cells))
    found = named(go(place, only=("layers",), seeds=(0,)))
    none, scratch, after = (found[f"layers/{name}/0"] for name in ("none", "scratch", "after"))
    assert none.shared and after.shared and not scratch.shared
    assert after.losses["stage2"] == none.losses["stage2"] != scratch.losses["stage2"]
    assert (after.steps, after.batch_sizes) == ((2, 2, 1, 3), (2, 2, 2, 2)) and "stage4" in after.losses
    assert "2 + 2 + 1 + 3" in (place / "out" / "tables.md").read_text()


def test_a_cell_is_what_its_commands_give(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    file = go(place, only=("layers/two",), seeds=(1,), keep=True)
    result = named(file)["layers/two/1"]
    for command in result.commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    kept = next((place / "out" / "runs").glob("*/seed1-layers-two-*"))
    theirs = place / "runs" / "layers-two-seed1"
    weights = [run / "model" / "model.safetensors" for run in (kept, theirs)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    report = json.loads((place / "runs" / "layers-two-seed1-eval" / "results.json").read_text())
    said = report["models"][0]["abilities"]
    for name, ability in result.abilities.items():
        assert (said[name]["n"], said[name]["accuracy"]) == (ability.n, ability.accuracy)
        assert said[name]["nll"] == pytest.approx(ability.nll) and said[name]["agreement"] == ability.agreement


def wait_for(process: subprocess.Popen[str], happened: Any) -> None:
    deadline = time.monotonic() + 100
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_it_goes_on_in_the_cell_that_it_was_in(place: Path) -> None:
    text = (place / "base.yaml").read_text().replace("steps: 2", "steps: 40")
    (place / "base.yaml").write_text(text)
    options = ("--only", "layers", "--seeds", "0", "--device", "cpu")
    command = ["ablate", place / "tiny.yaml", *options, "--out", place / "cut"]
    process = small_run.start(*command)

    def in_second_cell() -> bool:
        logged = list((place / "cut" / "runs").glob("*/seed0-layers-two-*/metrics.jsonl"))
        return bool(logged) and logged[0].read_bytes().count(b"\n") > 4

    wait_for(process, in_second_cell)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    file = place / "cut" / "results.jsonl"
    assert list(named(file)) == ["layers/none/0"]
    file.write_bytes(file.read_bytes() + b'{"result": {"table": "layers", "ce')  # and in the middle of a line
    done = small_run.run(*command)
    assert done.returncode == 0, done.stderr
    assert "the incomplete last line" in done.stderr and "2 runs: 1 finished, 1 to go" in done.stderr
    assert numbers(file) == numbers(go(place, "whole", only=("layers",), seeds=(0,)))
    resumed = {name: result.resumed for name, result in named(file).items()}
    assert resumed == {"layers/none/0": False, "layers/two/0": True}


@pytest.mark.slow
def test_parts_and_processes_give_the_same_lines(place: Path) -> None:
    """Two shards, one of them with two processes at a time, joined; against one command alone."""
    base = (place / "base.yaml").read_text()
    assert "workers: 0" in base
    (place / "base.yaml").write_text(base.replace("workers: 0", "workers: 1\n  cache: true"))
    alone = go(place, "alone")
    first = go(place, "first", shard="1/2")
    command = ["ablate", place / "tiny.yaml", "--device", "cpu", "--shard", "2/2", "--jobs", "2"]
    done = small_run.run(*command, "--out", place / "second")
    assert done.returncode == 0, done.stderr
    second = place / "second" / "results.jsonl"
    assert named(first) and named(second) and not set(named(first)) & set(named(second))
    joined = go(place, "joined", merge=(first, second))
    assert sorted(named(joined)) == EVERY and numbers(joined) == numbers(alone)
    table = (place / "joined" / "tables.md").read_text().split("<details>")[0]
    assert table == (place / "alone" / "tables.md").read_text().split("<details>")[0]
    assert list(named(go(place, "joined", merge=(first,)))) == list(named(joined))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupt_ends_the_processes_and_says_how_to_go_on(place: Path) -> None:
    (place / "base.yaml").write_text((place / "base.yaml").read_text().replace("steps: 2", "steps: 4000"))
    process = small_run.start("ablate", place / "tiny.yaml", "--device", "cpu", "--jobs", "2", "--out", place / "out")
    wait_for(process, lambda: len(list((place / "out" / "runs").glob("*/*/metrics.jsonl"))) >= 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert "run the same command to continue" in said and "Traceback" not in said
    logged = [path.read_bytes() for path in sorted((place / "out" / "runs").glob("*/*/metrics.jsonl"))]
    time.sleep(1.0)
    assert logged == [path.read_bytes() for path in sorted((place / "out" / "runs").glob("*/*/metrics.jsonl"))]


def descendants(pid: int) -> set[int]:
    """Every process below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = set[int](), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_a_killed_command_leaves_no_process_and_whole_lines(place: Path) -> None:
    """Two cells at a time, each with a process that loads; killed, and gone on with to the same lines."""
    base = (place / "base.yaml").read_text().replace("workers: 0", "workers: 1").replace("steps: 2", "steps: 20")
    (place / "base.yaml").write_text(base)
    out = place / "cut"
    command = ["ablate", place / "tiny.yaml", "--device", "cpu", "--jobs", "2", "--only", "layers", "--out", out]
    process = small_run.start(*command)
    wait_for(process, lambda: (out / "results.jsonl").is_file() and len(read(out / "results.jsonl").cells) >= 1)
    seen: list[set[int]] = []
    wait_for(process, lambda: seen.append(descendants(process.pid)) or len(seen[-1]) >= 4)  # two cells, their loaders
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while left := {pid for pid in seen[-1] if is_alive(pid)}:
        assert time.monotonic() < deadline, f"{left} outlive the command"
        time.sleep(0.1)
    file = out / "results.jsonl"
    assert all(json.loads(line) for line in file.read_text().splitlines()) and file.read_bytes().endswith(b"\n")
    metrics = list((out / "runs").glob("*/*/metrics.jsonl"))
    assert metrics and all(json.loads(line) for path in metrics for line in path.read_text().split("\n")[:-1])
    done = small_run.run(*command)
    assert done.returncode == 0, done.stderr
    assert numbers(file) == numbers(go(place, "whole", only=("layers",)))


def test_a_failure_is_told_at_the_end_and_the_others_are_kept(place: Path) -> None:
    text = (place / "tiny.yaml").read_text()
    (place / "tiny.yaml").write_text(text.replace("      none: {}\n", "      none: {stage3.lr: 1.0e+9}\n"))
    with pytest.raises(UserError, match=r"layers/none, seed 0: stage3, step \d: the .* is (nan|inf)"):
        go(place, only=("layers",), seeds=(0,))
    assert list(named(place / "out" / "results.jsonl")) == ["layers/two/0"]
    assert "error: stage3" in next((place / "out" / "logs").glob("seed0-layers-none-*.log")).read_text()


def test_a_list_runs_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablate(str(place / "tiny.yaml"), out=place / "out", list=True, device="cuda", only=("layers",), steps_scale=2.0)
    said = capsys.readouterr().out
    assert not (place / "out").exists()
    lines = said.splitlines()
    assert lines[0] == "layers/none, seed 0: 4 + 4 + 4 steps"
    assert lines[1].strip().startswith("mmmamba distill ") and "--device cuda" in lines[1]
    assert lines[3] == "layers/two, seed 0: 4 + 4 + 4 steps, stages 1 and 2 shared"
    assert lines[-1] == "4 cells, 4 runs, 4 to go: 32 steps"


def test_a_quick_look_goes_into_a_folder_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    look = {"only": ("stages/only-3",), "seeds": (0,), "device": "cpu"}
    file = ablate("tiny.yaml", steps_scale=0.5, **look)
    assert file == Path("runs/tiny-x0.5/results.jsonl")
    [result] = read(file).cells
    assert (result.steps, result.steps_scale) == ((0, 0, 1), 0.5)
    assert "(all steps × 0.5)" in (file.parent / "tables.md").read_text()
    assert ablate("tiny.yaml", shard="1/9", list=True) == Path("runs/tiny-shard1of9/results.jsonl")


def test_what_cannot_be_is_refused_before_anything_runs(place: Path) -> None:
    page = place / "page.md"
    page.write_text("nothing to fill\n")
    for options, message in (
        ({"jobs": 0}, "--jobs must be from 1 to 128"),
        ({"jobs": 10**6}, "--jobs must be from 1 to 128"),
        ({"steps_scale": 0.0}, "--steps-scale must be greater than 0"),
        ({"merge": (place / "x",), "list": True}, "--merge runs no cell"),
        ({"report": True, "seeds": (0,)}, "--report runs no cell"),
        ({"into": (page,)}, "has no block <!-- ablation: TABLE of tiny.jsonl -->"),
        ({"only": ("stagez",)}, "--only stagez: there is no such cell"),
        ({"set": ("teacher=gone",)}, "gone"),
    ):
        with pytest.raises(UserError, match=message):
            go(place, **options)
    assert not list(place.glob("out/runs/*"))


def test_two_commands_do_not_work_in_one_folder(place: Path) -> None:
    with alone_in(place / "out"), pytest.raises(UserError, match=r"out: is in use by .*process"):
        go(place)
