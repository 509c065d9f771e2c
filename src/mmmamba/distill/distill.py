"""One command from teacher to student: seed, the stages, the finished model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from mmmamba.checkpoints import fingerprint, load, resolve, save_student
from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import Processor
from mmmamba.device import pick_device, pick_precision
from mmmamba.distill import dry_run as rehearsal
from mmmamba.distill import processes
from mmmamba.distill.borrowed_alignment import alignment_digest, borrow_alignment
from mmmamba.distill.checked_tensors import restore
from mmmamba.distill.parameters import label, own_parameters, part_of, unshare
from mmmamba.distill.placement import place
from mmmamba.distill.recipe import DistillRecipe, SourceConfig, check_teacher, load_recipe, with_teacher_cache
from mmmamba.distill.run_folder import RunFolder, alone
from mmmamba.distill.seeding import seed
from mmmamba.distill.stages import ALIGNMENT, PLACEMENT_ORDER, STAGES
from mmmamba.distill.teacher_cache import teacher_rows
from mmmamba.distill.train_config import StageConfig
from mmmamba.distill.trainer import train
from mmmamba.distill.training_data import TrainingData
from mmmamba.errors import UserError
from mmmamba.model.model import Model
from mmmamba.outputs import LEDGER
from mmmamba.report.table import show, table_of

MOST_BATCHES = 64  # that are looked at for one to measure on, where samples are bad


def distill(
    recipe: str,
    *,
    teacher: str | None = None,
    data: tuple[Path, ...] = (),
    out: Path | None = None,
    resume: bool = False,
    set: tuple[str, ...] = (),
    on_bad_sample: Literal["stop", "skip"] | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    cache_teacher: int | None = None,
    dry_run: bool = False,
    gpu: Literal["h100", "h200", "a100", "rtx4090"] | None = None,
    geometry: str | None = None,
) -> Path:
    """Turn a teacher into a linear or hybrid student: seed its mixers, then distil in stages.

    Example: mmmamba distill pico-linear --out runs/pico-linear

    Stage 1 aligns the new state space parameters with the attention they replace, stage 2 the whole mixer, both layer
    by layer; stage 3 matches the teacher's output distribution; stage 4, where the recipe has one, learns the answers
    themselves. A run that lies beside this one and aligned the same
    teacher in the same way (stages 1 and 2 of linear and hybrid are the same) lends its stages 1 and 2.

    With --dry-run nothing is trained or written. It prints what each stage trains, its memory by part, its tokens and
    hours on a GPU of the kind that --gpu names, then takes real first steps on random data, on a GPU or with a model
    small enough for a CPU, to see that they fit. It needs the teacher's config.json alone, or not even that:

        mmmamba distill hovle-2.6b-linear --dry-run --geometry hovle-2.6b

    Args:
        recipe: a recipe file, or the name of a built-in one.
        teacher: a teacher folder or built-in name, in place of the recipe's.
        data: JSONL files of conversations, in place of the recipe's sources.
        out: the run folder (default: runs/NAME).
        resume: go on with a run that was interrupted.
        set: recipe keys to change, e.g. --set stage3.steps=100 --set seed=1.
        on_bad_sample: stop at the first bad sample, or skip and list them.
        device: auto, cpu, cuda, cuda:1, ….
        precision: fp32, or bf16 passes over fp32 weights; auto picks bf16 on a GPU.
        cache_teacher: keep so many of the teacher's most likely tokens for each token on disk, beside the data, and
            train stage 3 from them: later epochs, and other students of this teacher, do without its passes. 32 to 64
            are a good choice.
        dry_run: say what the run will need and try its first steps, instead of running it.
        gpu: the kind of GPU to estimate for, with --dry-run (default: h100).
        geometry: hovle-2.6b or nano, in place of a teacher's folder, with --dry-run.

    Returns:
        the folder of the finished student, RUN/model; of a dry run, where it would be.
    """
    loaded = load_recipe(DistillRecipe, recipe, set)
    if teacher is not None:
        loaded = replace(loaded, teacher=teacher)
    if data:
        sources = tuple(SourceConfig(path=str(path.resolve())) for path in data)
        loaded = replace(loaded, data=replace(loaded.data, sources=sources))
    if on_bad_sample is not None:
        loaded = replace(loaded, data=replace(loaded.data, on_bad_sample=on_bad_sample))
    if cache_teacher is not None:
        loaded = with_teacher_cache(loaded, cache_teacher)
    where = pick_device(device) if dry_run else processes.join(pick_device(device))
    dtype = pick_precision(precision, where)
    run_folder = out or Path("runs") / loaded.name
    if dry_run:
        rehearsal.dry_run(
            loaded, geometry=geometry, gpu=gpu or "h100", device=where, precision=dtype, out=run_folder, resume=resume
        )
        return run_folder / "model"
    for name, given in (("geometry", geometry), ("gpu", gpu)):
        if given is not None:
            raise UserError(f"--{name} {given} goes with --dry-run; a run takes its teacher's weights and --device")
    with alone(run_folder, read=[resolve(loaded.teacher)]):
        return _distilled(loaded, run_folder, resume, where, dtype)


def _distilled(
    recipe: DistillRecipe, run_folder: Path, resume: bool, device: torch.device, precision: torch.dtype
) -> Path:
    """Make the whole run, alone in its folder."""
    folder = resolve(recipe.teacher)
    source_hash = fingerprint(folder)
    teacher = load(folder, dtype=recipe.frozen_dtype(precision), device=device)
    check_teacher(teacher.config, folder)
    recipe.check_student(teacher.config)
    processor = Processor.from_folder(folder)
    with processes.main_first():
        data = TrainingData(recipe.data, processor, recipe.seed)
    identity = {"kind": "distill", "teacher": source_hash, "data": data.identity}
    alignment = alignment_digest(recipe, source_hash, data, device, precision)
    with processes.main_first():
        run = RunFolder(run_folder, recipe, identity, resume=resume)
        pictures = run.check_pictures(data.picture_hashes)
        run.note(
            pictures=pictures, alignment=alignment, teacher={"path": str(recipe.teacher), "sha256": source_hash}
        )  # fmt: skip
        if processes.is_main():
            borrow_alignment(run, alignment, data.picture_hashes)

    student = _train(run, recipe, teacher, data, precision)
    if processes.is_main():
        if fingerprint(folder) != source_hash:
            raise UserError(
                f"{folder}: the teacher's files changed while the run was under way; the student is not saved"
            )
        save_student(
            student, run.model, teacher=recipe.teacher, delta=False, processor=processor, dtype=teacher.dtype,
            overwrite=run.replaces_model,
        )  # fmt: skip
        run.report_skipped()
        print(run.model)
    processes.leave()
    return run.model


def _train(run: RunFolder, recipe: DistillRecipe, teacher: Model, data: TrainingData, precision: torch.dtype) -> Model:
    """Seed the student and take it through all stages; those that are finished already are read from the run."""
    aligned = seed(teacher, mixer=recipe.mixer, seed=recipe.seed, init=recipe.init, dtype=torch.float32)
    for stage in ALIGNMENT:
        _run_stage(run, stage, recipe.stages[stage], aligned, teacher, data, precision)
    layer_map = recipe.layer_map(teacher.config.num_layers)
    if recipe.measured:
        layer_map = _placed(run, recipe, teacher, aligned, data, precision)
    student = seed(teacher, layer_map, recipe.mixer, aligned=aligned)
    for stage, config in recipe.stages.items():
        if stage not in ALIGNMENT:
            unshare(student, teacher, config.train)
            _run_stage(run, stage, config, student, teacher, data, precision)
    return student


def _run_stage(
    run: RunFolder,
    stage: str,
    config: StageConfig,
    student: Model,
    teacher: Model,
    data: TrainingData,
    precision: torch.dtype,
) -> None:
    """Train one stage, unless the run (or the one it borrowed from) has finished it."""
    objective = STAGES[stage].make_objective(teacher, student, config)
    done = run.result(stage)
    if done is None:
        if processes.is_main():
            describe(stage, student, objective.trained)
        rows = data.rows(config, STAGES[stage].order)
        with teacher_rows(rows, teacher, run.manifest["teacher"]["sha256"], config, precision, data.cache) as given:
            train(objective, config, given, run, stage, device=teacher.device, precision=precision)
        run.finish(stage, own_parameters(student, teacher), steps=config.steps)
    else:
        restore(own_parameters(student, teacher), done, run.checkpoints / stage)


def _placed(
    run: RunFolder, recipe: DistillRecipe, teacher: Model, aligned: Model, data: TrainingData, precision: torch.dtype
) -> tuple[str, ...]:
    """The layer map that a measurement picks, once a run: on one batch of stage 3's samples, none of its first."""
    layers = teacher.config.num_layers
    count = len(recipe.softmax_layers(layers))
    if "softmax_layers" not in run.manifest:
        rows = [row.to(teacher.device) for row in _measurable(data, recipe.stage3, teacher.device)]
        run.note(softmax_layers=place(teacher, aligned, recipe.mixer, count, rows, recipe.stage3, precision))
    kept = run.manifest["softmax_layers"]
    if len(set(kept)) != count or not all(0 <= layer < layers for layer in kept):
        raise UserError(f"{run.path / 'manifest.json'}: was altered: 'softmax_layers' is {kept} of {layers} layers")
    return recipe.keeping(kept, layers)


def _measurable(data: TrainingData, stage: StageConfig, device: torch.device) -> Sequence[Batch]:
    """The rows of the first batch of the measurement's order in which any process has a good sample."""
    all_samples = -(-sum(len(source) for source in data.sources) // stage.batch_size)  # in so many batches, about
    batches = min(2 * all_samples, MOST_BATCHES)
    for step in range(batches):
        one = replace(stage, steps=step + 1)
        rows = next(iter(data.rows(one, PLACEMENT_ORDER)(step)))
        if int(processes.total(torch.tensor(len(rows), device=device))):
            return rows
    raise UserError(f"layers: measured: none of {batches * stage.batch_size:,} samples is good; see mmmamba data check")


def describe(stage: str, student: Model, trained: dict[str, torch.nn.Parameter]) -> None:
    """Print what the stage trains and what it leaves frozen, with counts and shares."""
    total = sum(p.numel() for p in student.parameters())
    counts: Counter[str] = Counter()
    for name, parameter in trained.items():
        counts[part_of(name, student.config)] += parameter.numel()
    rows = [["trained", label(part), count, f"{100 * count / total:.2f} %"] for part, count in counts.items()]
    moved = counts.total()
    rows.append(["trained", "all", moved, f"{100 * moved / total:.2f} %"])
    rows.append(["frozen", "the teacher's and untouched", total - moved, f"{100 * (1 - moved / total):.2f} %"])
    layers = Counter(student.config.layer_map)
    title = f"{stage}: " + ", ".join(f"{count} {kind} layers" for kind, count in layers.items())
    show(table_of(title, ("", "parameters", "count", "share"), rows))


def seeded(recipe: str, *, teacher: str | None = None, set: tuple[str, ...] = (), out: Path) -> Path:
    """The seeded student of a recipe, not distilled at all: the control that shows what distillation brings.

    Args:
        recipe: a recipe file, or the name of a built-in one.
        teacher: a teacher folder or built-in name, in place of the recipe's.
        set: recipe keys to change.
        out: folder of the student; one that was written here is replaced.
    """
    loaded = load_recipe(DistillRecipe, recipe, set)
    name = teacher or loaded.teacher
    model = load(name)
    student = seed(
        model, loaded.layer_map(model.config.num_layers), loaded.mixer, seed=loaded.seed, init=loaded.init
    )  # fmt: skip
    # A student of an earlier version has no ledger in its folder.
    save_student(student, out, teacher=name, delta=True, overwrite=not (out / LEDGER).exists())
    return out
