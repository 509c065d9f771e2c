"""What the three stages of a recipe cost a GPU at HoVLE's size: time, memory, and whether they learn and resume.

    python scripts/gpu/training.py --only stage1 stage2 --out training.json     # minutes each; results are merged
    python scripts/gpu/training.py --only stage3 --lengths 2048 4096 8192 --out training.json
    python scripts/gpu/training.py --only stage3 --lengths 16384 32768 --set stage3.recompute=mlp --out training.json
    python scripts/gpu/training.py --only stage3 --lengths 8192 --resume-check --out training.json
    python scripts/gpu/training.py --geometry nano --device cpu --recipe nano-linear --lengths 256 512 --steps 4

Random weights in the recipe's number formats; rows of one sequence with a tile (256 image tokens) for each 2,048
tokens, random pixels, random text of which the second half is scored. Up to 8,192 tokens a row is timed: a forward
and backward pass, from the row on the host, and the optimizer's step (clipping and update) apart; both as the recipe
takes them, replayed from CUDA graphs or not (``--set stage1.graph=false``). The peak is that of steps of one and of
two rows, with gradients and the optimizer's state in memory; beside it stands what ``mmmamba distill --dry-run``
reckons. Reserved is what the allocator took from the GPU for them, its gaps included. At the greatest timed length
the first steps of the recipe, at its rising rate, must lower the loss. FLOP counted are those of the matrix products
that a step needs: a frozen matrix 2 a parameter and token forward and 2 for the gradient of its input, a trained one
2 more, the causal half of softmax's scores and the recurrence's chunks; what is computed again is not counted. Prints
its table last, of all that ``--out`` holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba.checkpoints import read_safetensors
from mmmamba.data.loader import Skipped
from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import UNSCORED
from mmmamba.device import pick_device, pick_precision, release
from mmmamba.distill.allocated import Allocated
from mmmamba.distill.checked_tensors import TENSORS
from mmmamba.distill.first_steps import random_models
from mmmamba.distill.gpus import GPUS
from mmmamba.distill.memory_estimate import stage_memory
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.distill.run_folder import RunFolder
from mmmamba.distill.seeding import seed
from mmmamba.distill.stage_estimate import passes_of
from mmmamba.distill.stages import STAGES
from mmmamba.distill.time_estimate import step_work
from mmmamba.distill.train_config import StageConfig
from mmmamba.distill.trainer import train
from mmmamba.distill.training_step import Step, make_step
from mmmamba.distill.workload import Workload
from mmmamba.model.config import ModelConfig
from mmmamba.model.geometries import GEOMETRIES, geometry

TIMED_STAGES = ("stage1", "stage2", "stage3")
TIMED = 8192  # the greatest row of one sequence that is timed
WARM_UP, SAMPLES = 3, 12
ROWS = 4  # over which the loss is lowered
#: Published code on the same geometry and lengths, one H100: ms of forward and backward, GB at the peak (its optimizer
#: not counted).
PUBLISHED = {
    ("stage1", 2048): (272, 12.4), ("stage1", 4096): (327, 17.0), ("stage1", 8192): (704, 26.3),
    ("stage2", 2048): (263, 12.9), ("stage2", 4096): (323, 17.6), ("stage2", 8192): (705, 26.9),
    ("stage3", 2048): (334, 27.6), ("stage3", 4096): (377, 40.2), ("stage3", 8192): (544, 65.3),
}  # fmt: skip


class Trial:
    """A stage of a recipe on random weights and rows, ready to step."""

    def __init__(self, arguments: argparse.Namespace, stage: str) -> None:
        self.device = pick_device(arguments.device)
        self.precision = pick_precision("auto", self.device)
        self.teacher: ModelConfig = geometry(arguments.geometry)
        self.sequence: int = arguments.sequence
        if self.teacher.img_context_token_id < 0:  # which a tokenizer would say
            self.teacher = replace(self.teacher, img_context_token_id=1)
        plan = load_recipe(DistillRecipe, arguments.recipe, arguments.set)
        self.name, self.local = stage, STAGES[stage].layer_local
        self.config: StageConfig = getattr(plan, stage)
        self.student = plan.student_config(self.teacher, softmax=() if self.local else None)
        self.frozen = plan.frozen_dtype(self.precision)
        torch.manual_seed(0)
        model, aligned = random_models(plan, self.teacher, self.device, self.frozen)
        student = aligned if self.local else seed(model, self.student.layer_map, plan.mixer, aligned=aligned)
        self.objective = STAGES[stage].make_objective(model, student, self.config)

    def step(self) -> Step:
        return make_step(self.objective, self.config, self.device, self.precision)

    def forget(self) -> None:
        """Give back what a step that is no longer used held."""
        for parameter in self.objective.trained.values():
            parameter.grad = None
        release(self.device)

    def row(self, tokens: int, number: int = 0) -> Batch:
        """One sequence: pictures in front, then text, the second half of which is scored; or several of text alone."""
        vision, random = self.teacher.vision, torch.Generator().manual_seed(number)
        if self.sequence:
            return self._packed(tokens, random)
        assert vision is not None, "a language model's rows need --sequence"
        tiles, slot = max(1, tokens // 2048), self.teacher.img_context_token_id
        image = tiles * vision.tokens_per_tile
        ids = torch.randint(0, self.teacher.vocab_size, (1, tokens), generator=random)
        ids[ids == slot] = 0
        ids[0, 1 : 1 + image] = slot
        labels = ids.clone()
        labels[:, : (tokens + image) // 2] = UNSCORED
        side = vision.image_size
        pixels = torch.randint(0, 256, (tiles, side, side, 3), generator=random, dtype=torch.uint8)
        return Batch(ids, labels, torch.tensor([0, tokens], dtype=torch.int32), pixels, [str(number)])

    def _packed(self, tokens: int, random: torch.Generator) -> Batch:
        """Sequences of text of ``sequence`` tokens, a fifth of each a question."""
        ids = torch.randint(0, self.teacher.vocab_size, (1, tokens), generator=random)
        borders = torch.tensor([*range(0, tokens, self.sequence), tokens], dtype=torch.int32)
        labels = ids.clone()
        for start in borders[:-1].tolist():
            labels[:, start : start + self.sequence // 5] = UNSCORED
        no_tiles = torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
        return Batch(ids, labels, borders, no_tiles, [str(border) for border in borders[1:].tolist()])

    def reckoned(self, tokens: int) -> int:
        """The peak that a dry run says, in bytes."""
        passes = passes_of(self.teacher, self.precision, self.device.type == "cuda", self.frozen)
        return stage_memory(self.work(passes=passes), tokens).peak

    def flop(self, tokens: int) -> float:
        """Of a forward and a backward pass over a row."""
        return tokens * step_work(self.work(config=replace(self.config, recompute="none")), tokens)[0]

    def work(self, **changes: Any) -> Workload:
        """The stage, as its costs depend on it."""
        given = {"teacher": self.teacher, "student": self.student, "stage": STAGES[self.name], "config": self.config}
        return Workload(**{**given, **changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="hovle-2.6b-linear")
    parser.add_argument("--geometry", default="hovle-2.6b", choices=sorted(GEOMETRIES))
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys to change, e.g. stage3.recompute=mlp")
    parser.add_argument("--only", nargs="*", default=TIMED_STAGES, choices=TIMED_STAGES, help="stages")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--sequence", type=int, default=0, help="rows of texts of so many tokens; 0: one sequence")
    parser.add_argument("--steps", type=int, default=20, help="that must lower the loss; 0: none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume-check", action="store_true", help="interrupt, resume and compare, instead")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a row, instead")
    parser.add_argument("--out", type=Path, help="JSON; what it holds already is kept")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    results = Results(arguments)
    failed: list[str] = []
    for stage in arguments.only:
        if arguments.profile:
            profile(Trial(arguments, stage), max(arguments.lengths))
        elif arguments.resume_check:
            failed += resume_check(arguments, stage, min(max(arguments.lengths), TIMED), results)
        else:
            failed += measure(arguments, stage, results)
        release(pick_device(arguments.device))
    print(results.markdown())
    if failed:
        sys.exit("\n".join(failed))


# ---------------------------------------------------------------------------------------------- measuring


def measure(arguments: argparse.Namespace, stage: str, results: Results) -> list[str]:
    """Times and peaks of every length, then steps that must lower the loss."""
    failed = []
    with Allocated(pick_device(arguments.device)) as allocated:
        trial = Trial(arguments, stage)
        for tokens in sorted(arguments.lengths):
            began = time.perf_counter()
            try:
                entry = one_length(trial, tokens, allocated)
            except torch.OutOfMemoryError:
                entry = {"peak": None}
            trial.forget()
            entry |= {"reckoned": trial.reckoned(tokens), "recompute": trial.config.recompute}
            results.add(stage, tokens, entry)
            print(f"{stage}, {tokens} tokens: {entry} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        timed = [tokens for tokens in arguments.lengths if tokens <= TIMED]
        if timed and arguments.steps:
            losses = learn(trial, max(timed), arguments.steps)
            results.add(stage, max(timed), {"losses": losses})
            if not statistics.mean(losses[-ROWS:]) < statistics.mean(losses[:ROWS]):
                failed.append(f"{stage}: {arguments.steps} steps did not lower the loss: {losses}")
    return failed


def one_length(trial: Trial, tokens: int, allocated: Allocated) -> dict[str, Any]:
    """The peak of steps of one and two rows; of what is timed also ms of a pass and an update, and the host's share."""
    rows = [trial.row(tokens, number) for number in range(2)]
    allocated.reset()
    step = trial.step()
    step(rows[:1], 0.0)  # makes the optimizer's state, and whatever is compiled
    synchronize(trial.device)
    began = time.perf_counter()
    step(rows, 0.0)
    synchronize(trial.device)
    found: dict[str, Any] = {"step of two rows": time.perf_counter() - began}
    host: list[float] = []

    def passes() -> None:
        began = time.perf_counter()
        step.passes(rows[:1])
        host.append(1e3 * (time.perf_counter() - began))

    if tokens <= TIMED or trial.sequence:
        found["passes"] = clock(passes, trial.device, before=step.zero_grad)
        found["host"] = statistics.median(host[WARM_UP:])
        found["update"] = clock(step.update, trial.device)
        found["flop"] = trial.flop(tokens)
    found["peak"] = allocated.peak
    if trial.device.type == "cuda":
        found["reserved"] = torch.cuda.max_memory_reserved(trial.device)
    return found


def clock(call: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> float:
    """Median milliseconds of a call, waited for."""
    taken = []
    for _ in range(WARM_UP + SAMPLES):
        if before is not None:
            before()
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[WARM_UP:])


def learn(trial: Trial, tokens: int, steps: int) -> list[float]:
    """The losses of the recipe's first steps, whose rate still rises, over a few rows in turn."""
    step = trial.step()
    rows = [trial.row(tokens, number) for number in range(ROWS)]
    losses = []
    for number in range(steps):
        found, _ = step([rows[number % len(rows)]], trial.config.lr * trial.config.factor(number))
        losses.append(float(found["loss"]))
    return losses


def profile(trial: Trial, tokens: int) -> None:
    """Print where a row's time goes, kernel by kernel."""
    rows, step = [trial.row(tokens)], trial.step()
    for _ in range(WARM_UP):
        step(rows, 0.0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trial.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        step(rows, 0.0)
        synchronize(trial.device)
    key = "self_cuda_time_total" if trial.device.type == "cuda" else "self_cpu_time_total"
    print(f"{trial.name}, {tokens} tokens", seen.key_averages().table(sort_by=key, row_limit=45), sep="\n")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------- resuming


class Rows:
    """A row a step; ends the run, as a kill would, at step ``die``."""

    def __init__(self, trial: Trial, tokens: int, steps: int, die: int | None = None) -> None:
        self.trial, self.tokens, self.steps, self.die = trial, tokens, steps, die
        self.bad_samples: list[Skipped] = []

    def __call__(self, start: int) -> Iterator[Sequence[Batch]]:
        for step in range(start, self.steps):
            if step == self.die:
                raise KeyboardInterrupt
            yield [self.trial.row(self.tokens, step)]


def resume_check(arguments: argparse.Namespace, stage: str, tokens: int, results: Results) -> list[str]:
    """Six steps as they come, the same with an interruption after the fourth; what the checkpoint of three holds."""
    steps, every, die = 6, 3, 4
    teacher = {"path": f"random {arguments.geometry}", "sha256": "seed 0"}
    losses: list[list[float]] = []
    held: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory(dir=arguments.out and arguments.out.resolve().parent) as place:
        for name, ends in (("whole", (None,)), ("cut", (die, None))):
            for end in ends:
                release(pick_device(arguments.device))
                trial = Trial(arguments, stage)
                trial.config = replace(trial.config, steps=steps, checkpoint_every=every, log_every=1)
                run = RunFolder(Path(place) / name, {"stage": stage}, {"kind": "check"}, resume=True)
                run.note(teacher=teacher)
                with contextlib.suppress(KeyboardInterrupt):
                    rows = Rows(trial, tokens, steps, end)
                    train(trial.objective, trial.config, rows, run, stage, device=trial.device,
                          precision=trial.precision)  # fmt: skip
                if end is not None:
                    held = read_safetensors(run.checkpoints / f"{stage}-step{every:07d}" / TENSORS)
                trained = set(trial.objective.trained)
                del trial, rows
            losses.append([line["loss"] for line in run.metrics()])
    whole, resumed = losses
    worst = max(abs(a - b) / abs(a) for a, b in zip(whole, resumed, strict=True))
    names = {name.partition("/")[2] for name in held}
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    results.add(stage, tokens, {"resumed": {"whole": whole, "resumed": resumed, "worst": worst, "checkpoint": size}})
    failed = [] if worst < 0.02 else [f"{stage}: a resumed run's losses differ by {worst:.1%}: {whole}, {resumed}"]
    if names != trained or not all(tensor.is_floating_point() for tensor in held.values()):
        failed.append(f"{stage}: the checkpoint holds other tensors than what is trained: {sorted(names ^ trained)}")
    return failed


# ---------------------------------------------------------------------------------------------- results


class Results:
    """What was measured, by stage, length and what is computed again; read from and written to ``--out``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path: Path | None = arguments.out
        kept = json.loads(self.path.read_text()) if self.path and self.path.is_file() else {}
        device = pick_device(arguments.device)
        self.entries: dict[str, dict[str, Any]] = kept.get("entries", {})
        plan = load_recipe(DistillRecipe, arguments.recipe, arguments.set)
        self.variant = {stage: getattr(plan, stage) for stage in TIMED_STAGES}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.about = {"device": name, "torch": torch.__version__, "recipe": arguments.recipe, "set": arguments.set,
                      "geometry": arguments.geometry}  # fmt: skip
        self.published = arguments.geometry == "hovle-2.6b"

    def add(self, stage: str, tokens: int, entry: dict[str, Any]) -> None:
        config = self.variant[stage]
        variant = f"recompute {config.recompute}" + ", compiled" * config.compile + ", replayed" * config.graph
        recipe = self.about["recipe"]
        found = self.entries.setdefault(f"{recipe} {stage} {tokens} {variant}", {})
        found |= {"stage": stage, "tokens": tokens, "variant": variant, "about": self.about, **entry}
        if self.path:
            self.path.write_text(json.dumps({"entries": self.entries}, indent=1))

    def markdown(self) -> str:
        """Tables of times and memory, then of losses."""
        keys = ("stage", "variant", "tokens")
        ordered = sorted(self.entries.values(), key=lambda e: (e["about"]["recipe"], *(e[key] for key in keys)))
        lines = [
            "| recipe | stage | variant | tokens | forward + backward, ms | published | factor | host, ms "
            "| update, ms | tokens/s | TFLOP/s | MFU | peak, GB | published | estimated | difference | reserved |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for entry in ordered:
            if "reckoned" not in entry:
                continue
            cells = [entry["about"]["recipe"], entry["stage"], entry["variant"],
                     f"{entry['tokens']:,}", *self._times(entry), *self._memory(entry)]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        learnt = [entry for entry in ordered if "losses" in entry]
        if learnt:
            head = f"| recipe | stage | variant | tokens | steps | loss, first {ROWS} | last {ROWS} |"
            lines += ["", head, "|---|---|---|---:|---:|---:|---:|"]
        for entry in learnt:
            first, last = (statistics.mean(part) for part in (entry["losses"][:ROWS], entry["losses"][-ROWS:]))
            lines.append(
                f"| {entry['about']['recipe']} | {entry['stage']} | {entry['variant']} | {entry['tokens']:,} "
                f"| {len(entry['losses'])} | {first:.4g} | {last:.4g} |"
            )
        for entry in ordered:
            if "resumed" in entry:
                found = entry["resumed"]
                lines += ["", f"{entry['stage']}, {entry['tokens']:,} tokens, interrupted and resumed: losses within "
                          f"{100 * found['worst']:.2g} % of the uninterrupted run's; its checkpoint holds only what "
                          f"is trained and the optimizer's state, {found['checkpoint'] / 1e9:.2f} GB."]  # fmt: skip
        return "\n".join(lines)

    def _times(self, entry: dict[str, Any]) -> list[str]:
        if "passes" not in entry:
            return [""] * 8
        ms, per_second = entry["passes"], entry["flop"] / entry["passes"] * 1e3
        published = PUBLISHED.get((entry["stage"], entry["tokens"])) if self.published else None
        rate = next((gpu.rate for name, gpu in GPUS.items() if name in entry["about"]["device"].lower()), None)
        share = f"{100 * per_second / rate:.0f} %" if rate else ""
        return [
            f"{ms:.0f}", f"{published[0]}" if published else "", f"{published[0] / ms:.2f}" if published else "",
            f"{entry['host']:.0f}", f"{entry['update']:.1f}", f"{1e3 * entry['tokens'] / ms:,.0f}",
            f"{per_second / 1e12:.3g}", share,
        ]  # fmt: skip

    def _memory(self, entry: dict[str, Any]) -> list[str]:
        published = PUBLISHED.get((entry["stage"], entry["tokens"])) if self.published else None
        said = f"{published[1]:.1f}" if published else ""
        if entry["peak"] is None:
            return ["did not fit", said, f"{entry['reckoned'] / 1e9:.2f}", "", ""]
        difference = entry["reckoned"] / entry["peak"] - 1
        reserved = f"{entry['reserved'] / 1e9:.2f}" if "reserved" in entry else ""
        return [
            f"{entry['peak'] / 1e9:.2f}", said, f"{entry['reckoned'] / 1e9:.2f}", f"{100 * difference:+.0f} %", reserved
        ]  # fmt: skip


if __name__ == "__main__":
    main()
