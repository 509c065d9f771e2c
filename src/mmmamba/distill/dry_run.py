"""``mmmamba distill RECIPE --dry-run``: what a run will need, and whether its first step fits, before it runs."""

from __future__ import annotations

from pathlib import Path

import torch

from mmmamba.checkpoints import fingerprint, read_config, resolve
from mmmamba.distill.dry_run_tables import tables
from mmmamba.distill.first_steps import rehearse
from mmmamba.distill.gpus import BANDWIDTH_USED, GPUS, LAUNCH, OVERHEAD, RATE_USED, REPLAY
from mmmamba.distill.recipe import DistillRecipe, check_teacher
from mmmamba.distill.run_folder import MANIFEST, check_run
from mmmamba.distill.sample_lengths import sample_lengths
from mmmamba.distill.stage_estimate import estimate_stages
from mmmamba.distill.training_data import check_sources, identity_of
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.geometries import geometry as named_geometry
from mmmamba.outputs import check_folder
from mmmamba.report.table import show


def dry_run(
    recipe: DistillRecipe,
    *,
    geometry: str | None,
    gpu: str,
    device: torch.device,
    precision: torch.dtype,
    out: Path,
    resume: bool = False,
) -> None:
    """Print what ``recipe`` needs, then take real first steps on random data where that can be done.

    What a run would refuse is refused here, as far as it is there to be looked at: with a ``geometry`` neither teacher
    nor data have to be.

    Raises:
        UserError: as a run in ``out`` would; when there is neither a teacher folder nor a geometry; when a real step
            does not fit.
    """
    teacher = teacher_config(recipe.teacher, geometry)
    recipe.check_student(teacher)
    identity = None
    if geometry is None:
        check_sources(recipe.data)
        if resume and (out / MANIFEST).is_file():
            identity = {
                "kind": "distill",
                "teacher": fingerprint(resolve(recipe.teacher)),
                "data": identity_of(recipe.data),
            }
    check_folder(out, read=[] if geometry is not None else [resolve(recipe.teacher)])
    check_run(out, recipe, identity, resume=resume)
    data = sample_lengths(recipe)
    stages = estimate_stages(recipe, teacher, data, gpu)
    for table in tables(stages, gpu):
        show(table)
    named = GPUS[gpu]
    print(f"Samples: {data.source}; {data.mean:,.0f} tokens on average.")
    frozen = "float32" if recipe.frozen_dtype(torch.bfloat16) == torch.float32 else "bfloat16"
    print(
        f"Estimated with bfloat16 passes over {frozen} weights on one {gpu}, at {RATE_USED:.0%} of its matrix rate of "
        f"{named.rate / 1e12:.0f} TFLOP/s and {BANDWIDTH_USED:.0%} of its {named.bandwidth / 1e12:.2f} TB/s. The "
        f"host takes {1000 * LAUNCH:g} ms to launch a layer's kernels for a row ({1000 * REPLAY:g} ms in a graph), the "
        f"driver {OVERHEAD / 1e9:.1f} GB. Reading and decoding the data is not part of it."
    )
    rehearse(recipe, teacher, stages, device, precision)
    if data.bad and recipe.data.on_bad_sample == "stop":
        raise UserError(f"{data.bad}: a run stops there; --on-bad-sample skip leaves such samples out")


def teacher_config(teacher: str, geometry: str | None) -> ModelConfig:
    """The geometry of that name or, without one, what the teacher's folder says; no weight is read."""
    if geometry is not None:
        return named_geometry(geometry)
    try:
        config = read_config(resolve(teacher))
    except UserError as error:
        raise UserError(f"{error} (--geometry hovle-2.6b estimates without the folder)") from error
    check_teacher(config, teacher)
    return config
