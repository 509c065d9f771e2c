"""The ``bench`` verb: every point of the report, one model in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mmmamba.benchmark.claims import same_size
from mmmamba.benchmark.compare import comparison
from mmmamba.benchmark.limits import measure_rates, prefill_cost
from mmmamba.benchmark.measure import (
    Measured,
    decode,
    decode_published,
    greatest_batch,
    read_prompt,
    weight_bytes,
    wide,
)
from mmmamba.benchmark.memory import attempt, release
from mmmamba.benchmark.pages import fill
from mmmamba.benchmark.report import check_report, write_report
from mmmamba.benchmark.results import Point, Results, Task, What, earlier, read, save
from mmmamba.benchmark.subjects import Series, Subject, given_subjects, random_subjects, series_of
from mmmamba.benchmark.tables import print_results
from mmmamba.device import pick_device, pick_dtype
from mmmamba.errors import UserError
from mmmamba.inference.steps import check_positive
from mmmamba.locks import alone_in
from mmmamba.model.model import Model
from mmmamba.model.state import state_bytes
from mmmamba.outputs import LEDGER, check_folder
from mmmamba.progress import Progress, Terminal
from mmmamba.report.environment import environment

CONTEXTS = {"cpu": "1k,4k,16k", "cuda": "1k,8k,32k,103424,262144,1m"}
POINT_SECONDS = {"cpu": 8.0, "cuda": 30.0}
SAMPLE_SECONDS = {"cpu": 0.3, "cuda": 1.0}
CPU_MEMORY = 1.0  # GB
UNITS = {"k": 2**10, "m": 2**20}
MOST_TOKENS = 2**40  # of a context
MOST_GB_OR_SECONDS = 1e6


def bench(
    models: tuple[str, ...] = (),
    *,
    geometry: str | None = None,
    contexts: str | None = None,
    report: Path | None = None,
    measure: tuple[What, ...] = ("decode", "prefill", "batch"),
    memory: float | None = None,
    point_seconds: float | None = None,
    prefill_chunk: int = 16384,
    resume: bool = False,
    overwrite: bool = False,
    compare: tuple[Path, Path] | None = None,
    into: tuple[Path, ...] = (),
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    seed: int = 0,
) -> Results | None:
    """Measure what models cost on this machine: latency, prefill, memory and throughput against the context.

    Without a MODEL, the teacher, linear student and hybrid student of a geometry are measured with random weights,
    which cost as much as trained ones. The teacher is measured as this package serves it. It is also measured twice in
    the published way (the cache is copied for every token, no CUDA graph), without and with an attention mask. So a
    student is never compared with a slow teacher only. All models are measured with int8 weights too, which halve what
    a step of one sequence reads. Every figure comes with the least that the machine could take. For example:

        mmmamba bench --geometry nano --contexts 1k,4k

    or your own checkpoints, all of one geometry:

        mmmamba bench runs/teacher/model runs/linear/model --report runs/costs

    The report is a folder: results.json (written after every point), report.md, report.html, and the plots latency,
    memory, throughput and prefill as PNG and SVG.

    Args:
        models: Checkpoint folders or names of built-in models. A teacher of random weights joins them if none is one.
        geometry: The size of the networks when no MODEL is given: nano, smollm2-135m, or hovle-2.6b, the
            paper's. Default: nano on a CPU, hovle-2.6b on a GPU.
        contexts: Context lengths in tokens, separated by commas; k is 1,024 and m is 1,048,576. Default:
            1k,4k,16k on a CPU; 1k,8k,32k,103424,262144,1m on a GPU.
        report: The folder for the report. Default: runs/bench-GEOMETRY, or runs/bench-MODEL of the first one.
        measure: Measure only this: decode (a token), prefill (time to the first token), batch (the largest that fits).
            Repeat it for several.
        memory: Most memory that weights and states may take, in GB (1e9 bytes). Default: all of a GPU, 1 on a CPU.
        point_seconds: Skip a point if one call is expected to take longer than this, judged by shorter contexts.
            Default: 8 on a CPU, 30 on a GPU.
        prefill_chunk: Read prompts in pieces of this many tokens when they are not read at once.
        resume: Continue the report in that folder.
        overwrite: Replace the report in that folder.
        compare: Two results.json: print every figure of both with the difference in per cent. Nothing is measured.
        into: Fill the marked blocks of this Markdown page again, from the results that they name, and measure nothing.
            Repeat it for several.
        device: Where to run, such as cpu or cuda. The default takes a GPU when there is one.
        dtype: Number format of the weights. The default is bfloat16 on a GPU and float32 elsewhere.
        seed: Draws the random weights and texts.

    Returns:
        what was measured; None for ``compare`` and ``into``, which measure nothing.
    """
    if compare is not None or into:
        _tell(compare, into)
        return None
    check_positive(prefill_chunk=prefill_chunk)
    where = pick_device(device)
    kind = "cuda" if where.type == "cuda" else "cpu"
    numbers = parse_contexts(contexts or CONTEXTS[kind])
    if memory is None and kind == "cpu":
        memory = CPU_MEMORY
    point_seconds = POINT_SECONDS[kind] if point_seconds is None else point_seconds
    for name, value in (("--memory", memory), ("--point-seconds", point_seconds)):
        if value is not None and not 0 < value < MOST_GB_OR_SECONDS:
            raise UserError(f"{name} must be above 0 and below {MOST_GB_OR_SECONDS:g}, got {value}")
    if models and geometry is not None:
        raise UserError("--geometry is for random weights: leave it out, or the models")
    geometry = geometry or ("hovle-2.6b" if kind == "cuda" else "nano")
    subjects = given_subjects(models) if models else random_subjects(geometry)
    series = series_of(subjects)
    folder = report or Path("runs") / f"bench-{Path(models[0]).name if models else geometry}"
    number_format = pick_dtype(dtype, where)
    request: dict[str, Any] = {
        "models": list(models), "geometry": None if models else geometry, "contexts": numbers,
        "measure": list(dict.fromkeys(measure)), "memory": memory, "point_seconds": point_seconds,
        "prefill_chunk": prefill_chunk, "seed": seed,
    }  # fmt: skip
    machine = environment(where, number_format)
    check_folder(folder, "--report")
    with alone_in(folder, "--report"):
        results = earlier(folder, request, machine, resume=resume, overwrite=overwrite) or Results(
            request=request,
            environment=machine,
            series=tuple(series),
            paper=same_size(subjects[0].config),
            rates=measure_rates(where, number_format),
        )
        # A report of an earlier version has no ledger. The files next to its results count as its own.
        check_report(folder, overwrite=overwrite or (results.complete and not (folder / LEDGER).exists()))
        runner = _Runner(
            device=where,
            dtype=number_format,
            seed=seed,
            budget=None if memory is None else int(memory * 1e9),
            seconds=SAMPLE_SECONDS[kind],
            longest=point_seconds,
            chunk=prefill_chunk,
        )
        results = runner.run(subjects, tasks(subjects, series, numbers, request["measure"]), results, folder)
        page = write_report(results, folder)
    console = Terminal()
    print_results(results, console)
    console.print(f"report: {page}", soft_wrap=True)
    return results


def _tell(compare: tuple[Path, Path] | None, into: Sequence[Path]) -> None:
    """Compare or write down results that exist already.

    Raises:
        UserError: when figures in a page's prose differ from its results.
    """
    if compare is not None:
        first, second = (read(file) for file in compare)
        print(comparison(first, second).markdown())
    wrong = [line for page in into for line in fill(page)]
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    if wrong:
        raise UserError(f"{len(wrong)} figures of the pages differ from their results")


def parse_contexts(text: str) -> list[int]:
    """Read ``1k,4096,1m`` as increasing numbers of tokens.

    Raises:
        UserError: naming the piece that is not a number of tokens.
    """
    found = set()
    for piece in text.split(","):
        word = piece.strip().lower().replace("_", "")
        digits, unit = (word[:-1], UNITS[word[-1]]) if word[-1:] in UNITS else (word, 1)
        count = int(digits) * unit if re.fullmatch("[0-9]{1,20}", digits) else 0
        if not 1 <= count <= MOST_TOKENS:
            raise UserError(f"--contexts {text}: '{piece.strip()}' is not a number of tokens such as 4096, 4k or 1m")
        found.add(count)
    return sorted(found)


def tasks(
    subjects: Sequence[Subject], series: Sequence[Series], contexts: Sequence[int], measure: Sequence[str]
) -> list[Task]:
    """Every point of a report, those of a subject together, shorter contexts first."""
    found: list[Task] = []
    configs = {subject.label: subject.config for subject in subjects}
    for one in series:
        config = configs[one.subject]
        variants: dict[What, Sequence[str]] = {"decode": [""]}
        if one.style == "engine":
            variants["prefill"] = ["text"] if config.vision is None else ["text", "images"]
            variants["batch"] = ["float32", "bfloat16"] if config.new_layers else ["cache"]
        found += [
            Task(series=one.label, what=what, variant=variant, context=context)
            for what in get_args(What)
            if what in measure
            for variant in variants.get(what, ())
            for context in contexts
        ]
    return found


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """How points are measured. ``budget``: bytes for weights and states. ``longest``: seconds of one call."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    budget: int | None
    seconds: float
    longest: float
    chunk: int

    @torch.no_grad()
    def run(self, subjects: Sequence[Subject], wanted: Sequence[Task], results: Results, folder: Path) -> Results:
        """Measure the missing points, and save the results after each."""
        done = {point.task for point in results.points}
        series = {one.label: one for one in results.series}
        torch.manual_seed(self.seed)
        save(results, folder)
        # Kernels are launched on the current device, even if their tensors are on another.
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with current, Progress("bench", len(wanted), start=len(done)) as bar:
            for subject in subjects:
                missing = [t for t in wanted if t not in done and series[t.series].subject == subject.label]
                if not missing:
                    continue
                model = attempt(lambda one=subject: one.open(self.device, self.dtype, self.seed), self.device)  # type: ignore[misc]
                for task in missing:
                    point = self._point(model, task, series[task.series], results)
                    results = results.with_point(point)
                    save(results, folder)
                    bar.advance(**_shown(point))
                del model
                release(self.device)
        results = replace(results, complete=True)
        save(results, folder)
        return results

    def _point(self, model: Model | None, task: Task, series: Series, results: Results) -> Point:
        if model is None or self._ran_out_before(task, results):
            return Point(task=task, oom=True)
        model.int8_steps = series.style == "int8"
        reason = self._why_not(model, task, series, results)
        if reason:
            return Point(task=task, skipped=reason)
        measured = attempt(lambda: self._measure(model, task, series), self.device)
        return Point(task=task, measured=measured, oom=measured is None)

    def _measure(self, model: Model, task: Task, series: Series) -> Measured | None:
        if task.what == "prefill":
            images = task.variant == "images"
            return read_prompt(
                model,
                length=task.context,
                images=images,
                chunk=self.chunk,
                seconds=self.seconds,
                longest=self.longest,
            )
        if task.what == "batch":
            return greatest_batch(
                model,
                context=task.context,
                state_dtype=None if task.variant == "cache" else getattr(torch, task.variant),
                budget=self.budget,
                seconds=self.seconds / 2,
            )
        if not series.published:
            return decode(model, context=task.context, seconds=self.seconds)
        mask = series.style == "published, mask"
        return decode_published(model, context=task.context, mask=mask, seconds=self.seconds)

    def _why_not(self, model: Model, task: Task, series: Series, results: Results) -> str:
        """Why a point is skipped; '' when it is measured."""
        vision = model.config.vision
        if task.variant == "images" and vision is not None and task.context < vision.tokens_per_tile:
            return f"shorter than the {vision.tokens_per_tile} tokens of one tile"
        state = state_bytes(model.config, self.dtype, wide(self.dtype)).at(task.context)
        copies = 2 if series.published else 1
        needed = weight_bytes(model) + copies * state
        if self.budget is not None and needed > self.budget:
            return f"needs {needed / 1e9:.3g} GB, more than the {self.budget / 1e9:.3g} allowed by --memory"
        expected = self._expected_seconds(model, task, results)
        if expected > self.longest:
            return f"would take about {expected:,.0f} s, more than the {self.longest:g} of --point-seconds"
        return ""

    def _expected_seconds(self, model: Model, task: Task, results: Results) -> float:
        """Estimate the time to read a prompt from the longest shorter one, by the ratio of their operations."""
        if task.what != "prefill":
            return 0.0
        known = [
            (point.task.context, point.measured)
            for point in results.points
            if point.measured is not None and replace(point.task, context=task.context) == task
        ]
        if not known:
            return 0.0
        _, shorter = max(known, key=lambda one: one[0])
        state = state_bytes(model.config, self.dtype, wide(self.dtype))
        return shorter.timing.ms / 1e3 * prefill_cost(model, state, length=task.context).flops / shorter.flops

    def _ran_out_before(self, task: Task, results: Results) -> bool:
        """Whether the same task ran out of memory at a shorter context."""
        return any(
            point.oom and point.task.context < task.context and replace(point.task, context=task.context) == task
            for point in results.points
        )


def _shown(point: Point) -> dict[str, Any]:
    """What the progress line shows of a point."""
    task, measured = point.task, point.measured
    what = " ".join(filter(None, [task.series, task.what, task.variant, f"{task.context:,}"]))
    if measured is None:
        return {what: "out of memory" if point.oom else "skipped"}
    return {what: f"{measured.timing.ms:.3g} ms" + (f", batch {measured.batch:,}" if task.what == "batch" else "")}
