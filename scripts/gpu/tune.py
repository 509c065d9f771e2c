"""Find the fastest settings of the Triton kernels on one GPU: candidates are compiled, checked and timed.

    python scripts/gpu/tune.py --seconds 90 --out tuned.json
    python scripts/gpu/tune.py --only 128 --quick
    TRITON_INTERPRET=1 python scripts/gpu/tune.py --tiny        # tries this script itself, on a CPU

The launches of an operator are timed one by one, by events around each launch of a whole call with a cold L2 cache; so
one call times a candidate of every launch at once, and the fastest of each launch are then put together. A candidate
that does not compile, does not fit the GPU, or whose results are not the PyTorch twin's is named and left out. What
wins is printed as entries of the operator's table of settings.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba import ops
from mmmamba.ops.ssd import launch as ssd_launch
from mmmamba.ops.ssd.tuning import Launch, Tiles, Tuning

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16 = torch.bfloat16

Settings = dict[str, Any]  # launch or option → its setting


# ---------------------------------------------------------------------------------------------- launches


class Failed(Exception):
    """A launch that does not compile or does not fit the GPU."""


class Launches:
    """Stands in for a module's kernels while they are launched: to time each launch, or to do no more than compile it.

    ``name`` gives a launch's name from its kernel's name and its keyword arguments.
    """

    def __init__(self, module: Any, name: Callable[[str, dict[str, Any]], str], compile_only: bool = False) -> None:
        self.module, self.name, self.compile_only = module, name, compile_only
        self.kernels = {key: kernel for key, kernel in vars(module).items() if key.endswith("_kernel")}
        self.events: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Launches]:
        self.events = {}
        for key, kernel in self.kernels.items():
            setattr(self.module, key, _Kernel(self, key, kernel))
        try:
            yield self
        finally:
            for key, kernel in self.kernels.items():
                setattr(self.module, key, kernel)

    def milliseconds(self) -> dict[str, float]:
        if not CUDA:
            return {name: pair[1] - pair[0] for name, pair in self.events.items()}
        return {name: pair[0].elapsed_time(pair[1]) for name, pair in self.events.items()}


@dataclass
class _Kernel:
    launches: Launches
    key: str
    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            name = self.launches.name(self.key, options)
            try:
                if self.launches.compile_only:
                    compiled = self.kernel.warmup(*args, grid=grid, **options)
                    if compiled.metadata.shared > _shared_memory():
                        raise RuntimeError(f"{compiled.metadata.shared // 1024} KiB of shared memory")
                    return
                before = _now()
                self.kernel[grid](*args, **options)
                self.launches.events[name] = [before, _now()]
            except Exception as error:
                raise Failed(f"{name}: {(str(error) or type(error).__name__).strip().splitlines()[0][:120]}") from error

        return launch


def _now() -> Any:
    if not CUDA:
        return time.perf_counter() * 1e3
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _shared_memory() -> int:
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin if CUDA else 227 * 1024


# ---------------------------------------------------------------------------------------------- ssd


@dataclass(frozen=True)
class Case:
    """One row of ``length`` tokens, as ``sequences`` sequences of nearly one length (0: not packed)."""

    length: int
    h: int
    g: int
    size: int
    dtype: torch.dtype
    backward: bool
    sequences: int = 0

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        packed = f", {self.sequences} sequences" if self.sequences else ""
        return f"L {self.length:,}, h {self.h}, g {self.g}{packed}: {what}"


class SSD:
    """Cases, candidates and calls of the state space recurrence."""

    module = ssd_launch
    #: The launches whose settings each entry of :class:`Tuning` is.
    launches: ClassVar[dict[str, tuple[str, ...]]] = {
        "states": ("states", "backward states", "backward chunks"),
        "output": ("output",),
        "reads": ("backward reads",),
        "writes": ("backward writes",),
    }

    def classes(self, tiny: bool) -> dict[tuple[int, int], list[Case]]:
        """What is timed, for each entry of the table; what matters most comes first."""
        if tiny:
            return {(32, 2): [Case(96, 2, 1, 32, BF16, False), Case(80, 2, 1, 32, BF16, True, 3)]}

        def rows(size: int, h: int, g: int) -> list[Case]:
            forward = [Case(length, h, g, size, BF16, False) for length in (103_424, 16_384, 4_096)]
            return [*forward, Case(8_192, h, g, size, BF16, True)]

        training = [Case(12_000, 8, 4, 32, BF16, True, 92), Case(12_000, 8, 4, 32, BF16, False, 92)]
        return {(128, 2): rows(128, 16, 8), (32, 2): training, (64, 2): rows(64, 32, 16)[1:]}

    def candidates(self, key: tuple[int, int], quick: bool) -> dict[int, dict[str, list[Any]]]:
        """For each number of tokens a chunk: the candidates of each launch, and the numbers of segments."""
        size = key[0]
        if size == 128:
            tiles = {
                "states": [
                    Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2), Tiles(64, 128, 4, 4),
                    Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 2),
                ],
                "output": [
                    Tiles(64, 128, 4, 2), Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2),
                    Tiles(64, 128, 4, 3), Tiles(64, 128, 8, 3),
                ],
                "reads": [
                    Tiles(128, 32, 4, 2), Tiles(128, 32, 4, 1), Tiles(128, 64, 8, 1), Tiles(128, 64, 4, 2),
                    Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(128, 32, 4, 3),
                ],
                "writes": [Launch(4, 1), Launch(8, 1)],
            }  # fmt: skip
            segments = {64: [8, 16, 33], 128: [8, 16]}
        elif size == 64:
            tiles = {
                "states": [Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3), Tiles(64, 64, 8, 3)],
                "output": [
                    Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)
                ],
                "reads": [Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 2), Tiles(64, 64, 8, 1), Tiles(64, 32, 4, 1)],
                "writes": [Launch(4, 1), Launch(8, 1), Launch(4, 2), Launch(8, 2)],
            }  # fmt: skip
            segments = {64: [8, 16, 24], 128: [8, 16]}
        else:
            tiles = {
                "states": [Tiles(32, 32, warps, stages) for warps, stages in ((4, 2), (2, 2), (4, 3), (2, 3), (1, 2))],
                "output": [Tiles(32, 32, warps, stages) for warps, stages in ((4, 2), (2, 2), (4, 3), (2, 3), (8, 2))],
                "reads": [Tiles(32, 32, warps, 1) for warps in (4, 2, 8)],
                "writes": [Launch(4, 1), Launch(4, 2), Launch(2, 1), Launch(8, 1)],
            }
            segments = {32: [33, 66], 64: [33, 66, 132], 128: [33, 66]}
        if quick:
            tiles = {name: list(options[:3]) for name, options in tiles.items()}
            segments = {64: segments[64][:2]}
        return {chunk: {**tiles, "segments": counts} for chunk, counts in segments.items()}

    def tuning(self, settings: Settings, case: Case) -> Tuning:
        """The table's entry for these settings; its programs give ``case`` the settings' number of segments."""
        programs = settings["segments"] * case.h * -(-case.size // settings["output"].p)
        return Tuning(settings["chunk"], programs, *(settings[name] for name in self.launches))

    def base(self, key: tuple[int, int], case: Case) -> Settings:
        """The settings of the table as it is."""
        entry = ssd_launch.TUNED[key]
        segments = max(entry.programs // (case.h * -(-case.size // entry.output.p)), 1)
        return {"chunk": entry.chunk, "segments": segments, **{name: getattr(entry, name) for name in self.launches}}

    def name(self, kernel: str, options: dict[str, Any]) -> str:
        if kernel == "scan_kernel":
            part = "states" if options["LOCAL"] else "chunks" if self.direction else "output"
        else:
            part = kernel.removesuffix("_kernel")
        return self.direction + part

    direction = ""  # of the pass whose launches come

    def inputs(self, case: Case, length: int | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Random x, dt, A, B, C, and the borders of the sequences."""
        l, h, g, size = length or case.length, case.h, case.g, case.size
        A = -torch.rand(h, device=DEVICE) - 0.5
        dt = torch.exp(torch.empty(1, l, h, device=DEVICE).uniform_(-7, -1)) / -A
        x = torch.randn(1, l, g, size, device=DEVICE).to(case.dtype)
        B = (torch.randn(1, l, g, size, device=DEVICE) * size**-0.5).to(case.dtype)
        C = (torch.randn(1, l, h, size, device=DEVICE) * size**-0.5).to(case.dtype)
        borders = None
        if case.sequences:
            count = max(case.sequences * l // case.length, 2)
            cuts = (torch.arange(1, count) * l // count + torch.randint(-9, 9, (count - 1,))).clamp(0, l).sort().values
            borders = torch.tensor([0, *cuts.tolist(), l], dtype=torch.int32, device=DEVICE)
        return {"x": x, "dt": dt, "A": A, "B": B, "C": C}, borders

    def call(self, inputs: dict[str, Tensor], borders: Tensor | None, settings: Settings, key: tuple[int, int],
             case: Case, dy: Tensor) -> list[Tensor]:  # fmt: skip
        """y, and the gradients of x, dt, A, B and C where the case wants them."""
        with tuned(ssd_launch.TUNED, key, self.tuning(settings, case)):
            chunk, segments = settings["chunk"], settings["segments"]
            table = None if borders is None else ops.layout_of(borders).cuts(chunk)
            values = tuple(inputs.values())
            self.direction = ""
            y, _ = torch.ops.mmmamba.ssd(*values, None, table, 0, chunk, segments)
            if not case.backward:
                return [y]
            self.direction = "backward "
            return [y, *torch.ops.mmmamba.ssd_backward(*values, None, table, dy, None, chunk, segments)[:5]]

    def truth(self, inputs: dict[str, Tensor], borders: Tensor | None, case: Case, dy: Tensor) -> list[Tensor]:
        leaves = {name: tensor.detach().double().requires_grad_(case.backward) for name, tensor in inputs.items()}
        y, _ = ops.ssd_chunked(**leaves, cu_seqlens=borders)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy.double())] if case.backward else [y]

    def whole(self, inputs: dict[str, Tensor], borders: Tensor | None, case: Case, dy: Tensor) -> Callable[[], object]:
        """The call as a user makes it, with its dispatch and its autograd."""
        if not case.backward:
            return torch.no_grad()(lambda: ssd_launch.ssd(**inputs, cu_seqlens=borders))
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        return lambda: torch.autograd.grad(
            ssd_launch.ssd(**leaves, cu_seqlens=borders)[0], list(leaves.values()), dy
        )  # fmt: skip


OPERATORS = {"ssd": SSD()}


@contextlib.contextmanager
def tuned(table: dict[Any, Any], key: Any, entry: Any) -> Iterator[None]:
    before = table[key]
    table[key] = entry
    try:
        yield
    finally:
        table[key] = before


# ---------------------------------------------------------------------------------------------- compiling


def compile_one(operator: str, key: tuple[int, int], case: Case, settings: Settings) -> str | None:
    """Compile all launches of a short call, which are those of a long one; what went wrong, if anything did.

    For the worker processes: what they compile reaches the others through Triton's cache on disk.
    """
    op = OPERATORS[operator]
    try:
        inputs, borders = op.inputs(case, 512)
        dy = torch.empty(*inputs["C"].shape[:3], case.size, dtype=case.dtype, device=DEVICE)
        with Launches(op.module, op.name, compile_only=True)():
            op.call(inputs, borders, settings, key, case, dy)
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


# ---------------------------------------------------------------------------------------------- timing


class Tuner:
    """Compiles, checks and times the candidates of one operator until its time is up."""

    def __init__(self, operator: str, seconds: float, quick: bool, tiny: bool, workers: int) -> None:
        self.operator, self.op = operator, OPERATORS[operator]
        self.quick, self.tiny = quick, tiny
        self.end = time.monotonic() + seconds
        self.cache = torch.empty(2**29 if CUDA else 1, dtype=torch.uint8, device=DEVICE)
        self.report: dict[str, Any] = {}
        self.compiled: dict[tuple[Any, ...], Future[str | None]] = {}
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context) if CUDA and workers else None

    def late(self) -> bool:
        return time.monotonic() > self.end

    def rows(self, key: tuple[int, int]) -> Iterator[Settings]:
        """Settings that between them have every candidate of every launch: row i has each launch's i-th candidate."""
        for chunk, options in self.op.candidates(key, self.quick).items():
            depth = max(len(options[name]) for name in self.op.launches)
            for i in range(depth):
                row = {name: options[name][i % len(options[name])] for name in self.op.launches}
                yield {"chunk": chunk, "segments": options["segments"][0], **row}

    def compile(self, key: tuple[int, int], cases: list[Case]) -> None:
        """Hand all rows of a class to the workers; the cases of a class differ in what they launch."""
        if self.pool is not None:
            for row in self.rows(key):
                for case in self._kinds(cases):
                    self.compiled[self._name(key, case, row)] = self.pool.submit(
                        compile_one, self.operator, key, case, row
                    )

    @staticmethod
    def _kinds(cases: list[Case]) -> list[Case]:
        return list({(case.backward, bool(case.sequences)): case for case in cases}.values())

    @staticmethod
    def _name(key: tuple[int, int], case: Case, row: Settings) -> tuple[Any, ...]:
        row = {name: value for name, value in row.items() if name != "segments"}
        return key, case.backward, bool(case.sequences), *sorted(row.items())

    def error(self, key: tuple[int, int], case: Case, row: Settings) -> str | None:
        """What keeps this row from being right, if anything does."""
        future = self.compiled.get(self._name(key, case, row))
        try:
            found = None if future is None else future.result(timeout=max(self.end - time.monotonic(), 1))
            if found is not None:
                return found
            torch.manual_seed(0)
            inputs, borders = self.op.inputs(case, 60 if self.tiny else 1_000)
            dy = torch.randn(*inputs["C"].shape[:3], case.size, device=DEVICE).to(case.dtype)
            values = self.op.call(inputs, borders, {**row, "segments": 3}, key, case, dy)
            truth = self.op.truth(inputs, borders, case, dy)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(values, truth, strict=True)]
            limit = 1e-2 if case.dtype != torch.float32 else 1e-4
            return None if all(error <= limit for error in errors) else f"wrong: errors {errors}"
        except Exception as error:
            return (str(error) or type(error).__name__).splitlines()[0]

    def time(self, key: tuple[int, int], case: Case, data: tuple[Any, ...], row: Settings) -> dict[str, float]:
        """Median milliseconds of each launch, with the L2 cold before the call and the host well ahead of the GPU."""
        inputs, borders, dy = data
        launches, found = Launches(self.op.module, self.op.name), []
        for i in range(3 if not CUDA else 6 if self.quick else 9):
            self.cache.zero_()
            if CUDA:
                torch.cuda._sleep(2_000_000)
            with launches():
                self.op.call(inputs, borders, row, key, case, dy)
            if CUDA:
                torch.cuda.synchronize()
            if i >= 2:
                found.append(launches.milliseconds())
        return {name: statistics.median(times[name] for times in found) for name in found[0]}

    def total(self, call: Callable[[], object]) -> float:
        """Median milliseconds of a whole call as a user makes it, the host's part included."""
        found = []
        for i in range(3 if not CUDA else 24):
            self.cache.zero_()
            before = _now()
            call()
            after = _now()
            if CUDA:
                torch.cuda.synchronize()
            if i >= (2 if not CUDA else 4):
                found.append(after - before if not CUDA else before.elapsed_time(after))
        return statistics.median(found)

    def run(self, key: tuple[int, int], cases: list[Case]) -> None:
        """Time a class's candidates and print what wins."""
        torch.manual_seed(1)
        data = {}
        for case in cases:
            inputs, borders = self.op.inputs(case)
            data[case] = inputs, borders, torch.randn(*inputs["C"].shape[:3], case.size, device=DEVICE).to(case.dtype)
        trial = Trial(key, cases, self.op.base(key, cases[0]), data)
        base = trial.base

        def errors(row: Settings) -> list[str]:
            return [error for case in self._kinds(cases) if (error := self.error(key, case, row)) is not None]

        # The table's own settings first: what they take is what there is to win.
        if not errors(base):
            self.measure(trial, base, [base["segments"]])
        for row in self.rows(key):
            if self.late():
                print("time is up: candidates are left", flush=True)
                break
            counts = self.op.candidates(key, self.quick)[row["chunk"]]["segments"]
            wrong = errors(row)
            if not wrong:
                self.measure(trial, row, counts)
                continue
            trial.failures.append(f"{label(row)}: {wrong[0]}")
            # One bad launch must not hide its neighbours: each alone among the settings known to work.
            for name in self.op.launches:
                alone = {**base, "chunk": row["chunk"], name: row[name]}
                if not self.late() and row[name] != base[name] and not errors(alone):
                    self.measure(trial, alone, counts)
        self.choose(trial)

    def measure(self, trial: Trial, row: Settings, counts: list[int]) -> None:
        """Time a row with each number of segments, and keep the least time of each of its candidates."""
        owner = {launch: name for name, launches in self.op.launches.items() for launch in launches}
        for case, segments in itertools.product(trial.cases, counts):
            if self.late():
                return
            try:
                found = self.time(trial.key, case, trial.data[case], {**row, "segments": segments})
            except Exception as error:
                trial.failures.append(f"{label(row)}: {(str(error) or type(error).__name__).splitlines()[0]}")
                return
            parts: dict[str, float] = {}
            for launch, milliseconds in found.items():
                parts[owner.get(launch, "")] = parts.get(owner.get(launch, ""), 0.0) + milliseconds
            slot = trial.times.setdefault((row["chunk"], segments), {}).setdefault(case, {})
            for part, milliseconds in parts.items():
                best = slot.setdefault(part, {}).get(row.get(part), float("inf"))
                slot[part][row.get(part)] = min(best, milliseconds)

    def choose(self, trial: Trial) -> None:
        """Of each (chunk, segments) the best candidates together; of these the best: checked, timed and printed."""
        start = trial.times.get((trial.base["chunk"], trial.base["segments"]), {})
        reference = {case: milliseconds(start[case], trial.base) for case in trial.cases if case in start}
        ranked = []
        for place, slot in trial.times.items():
            if all(case in slot for case in trial.cases):
                choice = best_together(self.op.launches, trial, place)
                total = {case: milliseconds(slot[case], choice) for case in trial.cases}
                ranked.append((sum(total[case] / (reference.get(case) or 1.0) for case in trial.cases), choice, total))
        ranked.sort(key=lambda item: item[0])

        print(f"\n==== {self.operator}, class {trial.key}: launches, milliseconds ====", flush=True)
        for line in trial.lines():
            print(line)
        result: dict[str, Any] = {"failures": trial.failures, "cases": {}}
        for _score, choice, total in ranked:
            wrong = [e for case in self._kinds(trial.cases) if (e := self.error(trial.key, case, choice)) is not None]
            if not wrong:
                result |= self.report_choice(trial, choice, reference, total)
                break
            print("left out:", label(choice), wrong[0])
        result["times"] = [
            {"chunk": chunk, "segments": segments, "case": str(case), "launch": part, "candidate": short(c), "ms": ms}
            for (chunk, segments), slot in trial.times.items() for case, parts in slot.items()
            for part, t in parts.items() for c, ms in t.items()
        ]  # fmt: skip
        self.report[str(trial.key)] = result

    def report_choice(self, trial: Trial, choice: Settings, reference: dict[Case, float],
                      total: dict[Case, float]) -> dict[str, Any]:  # fmt: skip
        """Time whole calls with a choice, print them and its entry of the table, and return both for the report."""
        entry = self.op.tuning(choice, trial.cases[0])
        alone = fastest_alone(trial)
        cases = {}
        print(f"-- the best together: {choice['segments']} segments (launches' sum; one call with its host part)")
        for case in trial.cases:
            inputs, borders, dy = trial.data[case]
            with tuned(self.op.module.TUNED, trial.key, entry):
                whole = self.total(self.op.whole(inputs, borders, case, dy))
            print(
                f"{case!s:58} was {reference.get(case, float('nan')):.4f}  now {total[case]:.4f}  call {whole:.4f}"
                f"  best for it alone {alone[case][0]:.4f} ({alone[case][1]})"
            )
            cases[str(case)] = {"was": reference.get(case), "now": total[case], "call": whole, "alone": alone[case]}
        print(f"    {trial.key}: {literal(entry)},", flush=True)
        return {"cases": cases, "entry": literal(entry)}


@dataclass
class Trial:
    """What is known of one class of sizes.

    ``times``: (chunk, segments) → case → part of the tuning ("" for what has no settings) → candidate → milliseconds.
    """

    key: tuple[int, int]
    cases: list[Case]
    base: Settings
    data: dict[Case, tuple[Any, ...]]
    times: dict[tuple[int, int], dict[Case, dict[str, dict[Any, float]]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """What was timed, fastest first, and what was left out."""
        for (chunk, segments), slot in self.times.items():
            for case in slot:
                yield f"chunk {chunk}, {segments} segments; {case}"
                for part, t in slot[case].items():
                    listed = sorted(t.items(), key=lambda item: item[1])
                    yield f"  {part or 'others':8} " + "  ".join(f"{short(c)} {ms:.4f}" for c, ms in listed)
        yield from (f"left out: {failure}" for failure in self.failures)


def milliseconds(parts: dict[str, dict[Any, float]], choice: Settings) -> float:
    """The sum of a case's launches with the candidates of a choice; the fastest where a candidate was not timed."""
    return sum(t.get(choice.get(part), min(t.values())) for part, t in parts.items())


def best_together(launches: Iterable[str], trial: Trial, place: tuple[int, int]) -> Settings:
    """Of each launch the candidate that is best over all cases, at ``place`` (chunk, segments)."""
    slot = trial.times[place]
    choice: Settings = {**{name: trial.base[name] for name in launches}, "chunk": place[0], "segments": place[1]}
    for part in launches:
        timed = [slot[case][part] for case in trial.cases if part in slot[case]]
        shared = set.intersection(*map(set, timed)) if timed else set()
        if shared:
            # Cases count alike, whatever their length: a candidate's times relative to the fastest.
            choice[part] = min(shared, key=lambda c: sum(t[c] / min(t.values()) for t in timed))
    return choice


def fastest_alone(trial: Trial) -> dict[Case, tuple[float, str]]:
    """For each case the least time that any (chunk, segments) with all cases reaches, and which one."""
    found: dict[Case, tuple[float, str]] = {}
    for (chunk, segments), slot in trial.times.items():
        if all(case in slot for case in trial.cases):
            for case in trial.cases:
                alone = sum(min(t.values()) for t in slot[case].values())
                before = found.get(case, (float("inf"), ""))
                found[case] = min(before, (alone, f"chunk {chunk}, {segments} segments"))
    return found


def short(candidate: Any) -> str:
    return (
        "" if candidate is None else "/".join(map(str, candidate)) if isinstance(candidate, tuple) else str(candidate)
    )


def label(row: Settings) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in row.items())


def literal(entry: tuple[Any, ...]) -> str:
    """A named tuple (of named tuples) as the positional call that makes it."""
    values = (literal(value) if isinstance(value, tuple) else repr(value) for value in entry)
    return f"{type(entry).__name__}({', '.join(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=sorted(OPERATORS), default="ssd")
    parser.add_argument("--only", help="sizes to tune, as 128,64,32")
    parser.add_argument("--seconds", type=float, default=90.0, help="for everything")
    parser.add_argument("--workers", type=int, default=min(len(os.sched_getaffinity(0)), 16), help="that compile")
    parser.add_argument("--quick", action="store_true", help="fewer candidates")
    parser.add_argument("--tiny", action="store_true", help="sizes that Triton's interpreter can do")
    parser.add_argument("--out", type=Path, help="a JSON file for all times")
    options = parser.parse_args()
    if not CUDA and not options.tiny:
        parser.error("there is no GPU: only --tiny works, under TRITON_INTERPRET=1")
    tuner = Tuner(options.operator, options.seconds, options.quick or options.tiny, options.tiny, options.workers)
    classes = tuner.op.classes(options.tiny)
    if options.only:
        sizes = {int(size) for size in options.only.split(",")}
        classes = {key: cases for key, cases in classes.items() if key[0] in sizes}
    try:
        for key, cases in classes.items():
            tuner.compile(key, cases)
        for key, cases in itertools.takewhile(lambda _: not tuner.late(), classes.items()):
            tuner.run(key, cases)
            if options.out:
                options.out.write_text(json.dumps(tuner.report, indent=1))
            if CUDA:
                torch.cuda.empty_cache()
    finally:
        if tuner.pool is not None:
            tuner.pool.shutdown(wait=False, cancel_futures=True)
    print(f"\n{max(tuner.end - time.monotonic(), 0):.0f} s were left")


if __name__ == "__main__":
    main()
