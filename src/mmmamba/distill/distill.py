"""One command from teacher to student: seed, the stages, the finished model."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmmamba.checkpoints import fingerprint, load, resolve, save_student
from mmmamba.checkpoints.io import write_atomically
from mmmamba.data.packed_batch import Batch
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.data.processor import Processor
from mmmamba.device import pick_device, pick_precision
from mmmamba.distill import dry_run as rehearsal
from mmmamba.distill import processes
from mmmamba.distill.checked_tensors import TENSORS, read_checked, restore
from mmmamba.distill.objectives import AlignHeads, MatchLogits, PredictAnswers
from mmmamba.distill.parameters import check_stages, kind_of, own_parameters, unshare
from mmmamba.distill.placement import place
from mmmamba.distill.recipe import ALIGNMENT, DistillRecipe, SourceConfig, StageConfig, label, load_recipe
from mmmamba.distill.run_folder import RunFolder, alone, checked_manifest, digest, pictures_of
from mmmamba.distill.seeding import seed
from mmmamba.distill.trainer import train
from mmmamba.distill.training_data import TrainingData
from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json
from mmmamba.model.mixers import ATTENTION, MAMBA2
from mmmamba.model.model import Model
from mmmamba.outputs import LEDGER
from mmmamba.report.table import show, table_of

ORDERS = {"stage1": 0, "stage2": 1, "stage3": 2, "placing": 3, "stage4": 4}  # each takes its samples in its own

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
        dry_run: say what the run will need and try its first steps, instead of running it.
        gpu: the kind of GPU to reckon with, with --dry-run (default: h100).
        geometry: hovle-2.6b or nano, in place of a teacher's folder, with --dry-run.

    Returns:
        the folder of the finished student, RUN/model; of a dry run, where it would be.
    """
    plan = load_recipe(DistillRecipe, recipe, set)
    if teacher is not None:
        plan = replace(plan, teacher=teacher)
    if data:
        sources = tuple(SourceConfig(path=str(path.resolve())) for path in data)
        plan = replace(plan, data=replace(plan.data, sources=sources))
    if on_bad_sample is not None:
        plan = replace(plan, data=replace(plan.data, on_bad_sample=on_bad_sample))
    where = pick_device(device) if dry_run else processes.join(pick_device(device))
    dtype = pick_precision(precision, where)
    run_folder = out or Path("runs") / plan.name
    if dry_run:
        rehearsal.dry_run(
            plan, geometry=geometry, gpu=gpu or "h100", device=where, precision=dtype, out=run_folder, resume=resume
        )
        return run_folder / "model"
    for name, given in (("geometry", geometry), ("gpu", gpu)):
        if given is not None:
            raise UserError(f"--{name} {given} goes with --dry-run; a run takes its teacher's weights and --device")
    with alone(run_folder, read=[resolve(plan.teacher)]):
        return _distilled(plan, run_folder, resume, where, dtype)


def _distilled(plan: DistillRecipe, run_folder: Path, resume: bool, where: torch.device, dtype: torch.dtype) -> Path:
    """The run, alone in its folder."""
    folder = resolve(plan.teacher)
    source_hash = fingerprint(folder)
    model = load(folder, dtype=plan.frozen_dtype(dtype), device=where)
    if model.config.new_layers:
        layer = model.config.new_layers[0]
        raise UserError(f"{folder}: layer {layer} is Mamba-2; a teacher has softmax attention in every layer")
    layer_map = plan.layer_map(model.config.num_layers)
    check_stages(plan, replace(model.config, layer_map=layer_map, mixer=plan.mixer))
    processor = Processor.from_folder(folder)
    with processes.main_first():
        data = TrainingData(plan.data, processor, plan.seed)
    alignment = digest(
        {
            "teacher": source_hash,
            "mixer": plan.mixer,
            "init": plan.init,
            "seed": plan.seed,
            "data": data.identity,
            "stage1": plan.stage1,
            "stage2": plan.stage2,
            "places": [str(path.resolve()) for path in data.paths],  # pictures are read from beside the files
            "max_length": plan.data.max_length,
            "max_tiles": plan.data.max_tiles,
            "on_bad_sample": plan.data.on_bad_sample,
            "device": where.type,
            "precision": str(dtype),
            "frozen": plan.frozen,
        }
    )
    identity = {"kind": "distill", "teacher": source_hash, "data": data.identity}
    with processes.main_first():
        run = RunFolder(run_folder, plan, identity, resume=resume)
        pictures = run.check_pictures(data.picture_hashes)
        run.note(
            pictures=pictures, alignment=alignment, teacher={"path": str(plan.teacher), "sha256": source_hash}
        )  # fmt: skip
        if processes.is_main():
            _borrow_alignment(run, alignment, data.picture_hashes)

    aligned = seed(model, mixer=plan.mixer, seed=plan.seed, init=plan.init, dtype=torch.float32)
    for stage in ALIGNMENT:
        config = plan.stages[stage]
        _run_stage(run, stage, AlignHeads(model, aligned, config), config, aligned, model, data, where, dtype)
    if plan.measured:
        layer_map = _placed(run, plan, model, aligned, data, dtype)
    student = seed(model, layer_map, plan.mixer, aligned=aligned)
    for stage, config in plan.stages.items():
        if stage not in ALIGNMENT:
            unshare(student, model, config.train)
            objective = MatchLogits(model, student, config) if stage == "stage3" else PredictAnswers(student, config)
            _run_stage(run, stage, objective, config, student, model, data, where, dtype)

    if processes.is_main():
        if fingerprint(folder) != source_hash:
            raise UserError(
                f"{folder}: the teacher's files changed while the run was under way; the student is not saved"
            )
        save_student(
            student, run.model, teacher=plan.teacher, delta=False, processor=processor, dtype=model.dtype,
            overwrite=run.replaces_model,
        )  # fmt: skip
        run.report_skipped()
        print(run.model)
    processes.leave()
    return run.model


def _run_stage(
    run: RunFolder,
    stage: str,
    objective: AlignHeads | MatchLogits | PredictAnswers,
    config: StageConfig,
    student: Model,
    teacher: Model,
    data: TrainingData,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """One stage, unless the run (or the one it borrowed from) has finished it."""
    done = run.result(stage)
    if done is None:
        if processes.is_main():
            describe(stage, student, objective.trained)
        rows = data.rows(config, ORDERS[stage])
        train(objective, config, rows, run, stage, device=device, precision=precision)
        run.finish(stage, own_parameters(student, teacher), steps=config.steps)
    else:
        restore(own_parameters(student, teacher), done, run.checkpoints / stage)


def _placed(
    run: RunFolder, plan: DistillRecipe, teacher: Model, aligned: Model, data: TrainingData, precision: torch.dtype
) -> tuple[str, ...]:
    """The layer map that a measurement picks, once a run: on one batch of stage 3's samples, none of its first."""
    layers = teacher.config.num_layers
    if "softmax_layers" not in run.manifest:
        count = plan.layer_map(layers).count(ATTENTION)
        rows = [row.to(teacher.device) for row in _measurable(data, plan.stage3, teacher.device)]
        run.note(softmax_layers=place(teacher, aligned, plan.mixer, count, rows, plan.stage3, precision))
    kept = run.manifest["softmax_layers"]
    if len(set(kept)) != plan.layer_map(layers).count(ATTENTION) or not all(0 <= layer < layers for layer in kept):
        raise UserError(f"{run.path / 'manifest.json'}: was altered: 'softmax_layers' is {kept} of {layers} layers")
    return tuple(ATTENTION if i in kept else MAMBA2 for i in range(layers))


def _measurable(data: TrainingData, stage: StageConfig, device: torch.device) -> Sequence[Batch]:
    """The rows of the first batch of the measurement's order in which any process has a good sample."""
    all_samples = -(-sum(len(source) for source in data.sources) // stage.batch_size)  # in so many batches, about
    batches = min(2 * all_samples, MOST_BATCHES)
    for step in range(batches):
        one = replace(stage, steps=step + 1)
        rows = next(iter(data.rows(one, ORDERS["placing"])(step)))
        if int(processes.total(torch.tensor(len(rows), device=device))):
            return rows
    raise UserError(f"layers: measured: none of {batches * stage.batch_size:,} samples is good; see mmmamba data check")


def _borrow_alignment(run: RunFolder, alignment: str, picture_hashes: Mapping[str, PictureHashes]) -> None:
    """Take stages 1 and 2 from a sibling run that aligned the same teacher in the same way."""
    if run.result("stage2") is not None or run.last_step("stage1") or run.last_step("stage2"):
        return
    for manifest in sorted(run.path.resolve().parent.glob("*/manifest.json")):
        sibling = manifest.parent
        if sibling == run.path.resolve():
            continue
        found = _readable(manifest)
        if found.get("alignment") != alignment or not {*ALIGNMENT} <= set(found.get("stages", {})):
            continue
        kept = pictures_of(found)
        if any(now.changed(kept.get(source, "")) for source, now in picture_hashes.items()):
            continue  # it saw other pictures
        if not all(_lends(sibling / "checkpoints" / stage, stage) for stage in ALIGNMENT):
            continue
        for stage in ALIGNMENT:
            copy = functools.partial(_copy_result, sibling / "checkpoints" / stage)
            write_atomically(run.checkpoints / stage, copy, folder=True)
            run.manifest["stages"][stage] = {**found["stages"][stage], "from": str(sibling)}
        run.note(skipped={stage: found.get("skipped", {}).get(stage, []) for stage in ALIGNMENT})
        print(f"stages 1 and 2 are those of {sibling}", file=sys.stderr)
        return


def _copy_result(source: Path, target: Path) -> None:
    shutil.copyfile(source / TENSORS, target / TENSORS)


def _lends(folder: Path, stage: str) -> bool:
    """Whether a neighbour's result is there and whole; a damaged one is no affair of this run."""
    try:
        return bool(read_checked(folder, {"stage": stage}, remedy=""))
    except UserError:
        return False


def _readable(manifest: Path) -> dict[str, Any]:
    """A neighbour's manifest; empty where it is damaged, which is no affair of this run."""
    try:
        return checked_manifest(read_json(manifest, limit=MAX_DATA_BYTES), manifest)
    except UserError:
        return {}


def describe(stage: str, student: Model, trained: dict[str, torch.nn.Parameter]) -> None:
    """Print what the stage trains and what it leaves frozen, with counts and shares."""
    everything = dict(student.named_parameters())
    total = sum(p.numel() for p in everything.values())
    counts: dict[str, int] = {}
    for name, parameter in everything.items():
        if name in trained:
            kind = kind_of(name, student.config)
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    rows = [["trained", label(kind), count, f"{100 * count / total:.2f} %"] for kind, count in counts.items()]
    moved = sum(counts.values())
    rows.append(["trained", "all", moved, f"{100 * moved / total:.2f} %"])
    rows.append(["frozen", "the teacher's and untouched", total - moved, f"{100 * (1 - moved / total):.2f} %"])
    title = (
        f"{stage}: {len(student.config.new_layers)} Mamba-2 layers, "
        f"{len(student.config.attention_layers)} softmax layers"
    )
    show(table_of(title, ("", "parameters", "count", "share"), rows))


def seeded(recipe: str, *, teacher: str | None = None, out: Path) -> Path:
    """The seeded student of a recipe, not distilled at all: the control that shows what distillation brings.

    Args:
        recipe: a recipe file, or the name of a built-in one.
        teacher: a teacher folder or built-in name, in place of the recipe's.
        out: folder of the student; one that was written here is replaced.
    """
    plan = load_recipe(DistillRecipe, recipe)
    name = teacher or plan.teacher
    model = load(name)
    student = seed(model, plan.layer_map(model.config.num_layers), plan.mixer, seed=plan.seed, init=plan.init)
    # A student of an earlier version has no ledger in its folder.
    save_student(student, out, teacher=name, delta=True, overwrite=not (out / LEDGER).exists())
    return out
