"""Real first steps of every stage, on random weights and tokens: whether they fit, and what they take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import UNSCORED
from mmmamba.distill.allocated import Allocated
from mmmamba.distill.dry_run_tables import peak_unit
from mmmamba.distill.memory_estimate import greatest_row
from mmmamba.distill.parameters import unshare
from mmmamba.distill.recipe import DistillRecipe
from mmmamba.distill.seeding import seed
from mmmamba.distill.stage_estimate import StageEstimate, passes_of
from mmmamba.distill.time_estimate import step_work
from mmmamba.distill.training_step import make_step
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import Options
from mmmamba.model.model import Model
from mmmamba.progress import Progress
from mmmamba.report.table import show, table_of

CPU_WORK, CPU_MEMORY = 1e12, 4e9  # FLOP and bytes up to which a CPU takes real steps: about half a minute


def rehearse(
    recipe: DistillRecipe,
    teacher: ModelConfig,
    stages: Sequence[StageEstimate],
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Take the first steps of every stage on random weights and tokens; print what they took beside the estimate.

    On a CPU only where the model is small enough. Graphs and compilation are left out.

    Raises:
        UserError: when a stage's rows do not fit.
    """
    on_gpu = device.type == "cuda"
    passes = passes_of(teacher, precision, kernels=on_gpu, frozen=recipe.frozen_dtype(precision))
    expected = {stage.name: stage.memory_with(passes).peak for stage in stages}
    work = sum(3 * stage.row * step_work(stage.work, stage.row)[0] for stage in stages)
    if not on_gpu and (work > CPU_WORK or max(expected.values()) > CPU_MEMORY):
        print("No real step was taken: there is no GPU here, and for a CPU the model or its rows are too large.")
        return
    took: dict[str, Took | None] = {}
    with Allocated(device) as allocated, Progress("first steps", total=len(stages)) as progress:
        try:
            models = random_models(recipe, teacher, device, recipe.frozen_dtype(precision))
        except torch.OutOfMemoryError as error:
            raise UserError("the teacher's weights and the students' mixers alone do not fit into this GPU") from error
        for stage in stages:
            took[stage.name] = first_steps(stage, *models, device, precision, allocated)
            progress.advance()
    _print_first_steps(stages, expected, took, torch.cuda.get_device_name(device) if on_gpu else "this CPU")
    failed = next((stage for stage in stages if took[stage.name] is None), None)
    if failed is not None:
        total = total_memory(device)
        most = greatest_row(replace(failed.work, passes=passes), total)
        raise UserError(
            f"{failed.name}: rows of {failed.row:,} tokens do not fit into this GPU's {total / 1e9:.0f} GB; "
            + (f"{most:,} should (micro_tokens, and max_length of the data)" if most else "nor would any other")
        )


def _print_first_steps(
    stages: Sequence[StageEstimate], expected: Mapping[str, int], took: Mapping[str, Took | None], where: str
) -> None:
    unit, unit_name = peak_unit(expected.values())
    rows: list[Sequence[Any]] = []
    for stage in stages:
        peak, found = expected[stage.name], took[stage.name]
        measured: Sequence[Any] = (None, "did not fit", None, None)
        if found is not None:
            hours = found.seconds * stage.tokens / stage.row * stage.steps / 3600
            measured = (found.peak / unit, f"{100 * (found.peak / peak - 1):+.0f} %", found.seconds, hours)
        rows.append((stage.name, stage.row, peak / unit, *measured))
    columns = ("stage", "tokens of a row", f"estimated peak, {unit_name}", f"measured, {unit_name}", "difference",
               "seconds a row", "hours of the stage")  # fmt: skip
    show(table_of(f"First steps on {where}, random weights and tokens", columns, rows))


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


@dataclass(frozen=True)
class Took:
    """What a step took: its peak in bytes, and seconds of a row."""

    peak: int
    seconds: float


def random_models(
    recipe: DistillRecipe, teacher: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Model, Model]:
    """A random teacher in ``dtype``, and the student that stages 1 and 2 align with it."""
    with torch.device(device):
        model = Model(teacher).to(dtype)
    return model, seed(model, mixer=recipe.mixer, seed=recipe.seed, init=recipe.init, dtype=torch.float32)


def first_steps(
    estimate: StageEstimate,
    teacher: Model,
    aligned: Model,
    device: torch.device,
    precision: torch.dtype,
    allocated: Allocated,
) -> Took | None:
    """Take two steps of a stage; None when they do not fit.

    The first makes AdamW's state, and whatever is compiled; of the second's two rows the last finds all gradients.
    """
    work = estimate.work
    config = replace(work.config, graph=False, compile=False)
    student = aligned
    if not work.stage.layer_local:
        mixer = aligned.config.mixer
        assert isinstance(mixer, Options)  # one kind is seeded
        student = seed(teacher, work.student.layer_map, mixer, aligned=aligned)
        unshare(student, teacher, (*work.owned, *config.train))
    objective = work.stage.make_objective(teacher, student, config)
    rows = [_random_row(estimate.row, teacher.config) for _ in range(2)]
    allocated.reset()
    try:
        step = make_step(objective, config, device, precision)
        float(step(rows[:1], config.lr)[1])  # waits for the device
        began = time.perf_counter()
        float(step(rows, config.lr)[1])
        return Took(allocated.peak, (time.perf_counter() - began) / len(rows))
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in objective.trained.values():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _random_row(tokens: int, config: ModelConfig) -> Batch:
    """One sequence of random text, the second half of it scored."""
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids[ids == config.img_context_token_id] = 0
    labels = ids.clone()
    labels[:, : tokens // 2] = UNSCORED
    side = config.vision.image_size if config.vision else 0
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    return Batch(ids, labels, borders, torch.zeros(0, side, side, 3, dtype=torch.uint8), ["random"])
