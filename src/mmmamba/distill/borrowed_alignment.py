"""Stages 1 and 2 of a neighbouring run, which this run can take instead of its own.

They align the mixers of all layers, whatever the recipe's ``layers`` says. So the linear and the hybrid run of one
recipe share them.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmmamba.checkpoints.io import write_atomically
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.distill.checked_tensors import TENSORS, read_checked
from mmmamba.distill.recipe import DistillRecipe
from mmmamba.distill.run_folder import RunFolder, checked_manifest, digest, pictures_of
from mmmamba.distill.stages import ALIGNMENT
from mmmamba.distill.training_data import TrainingData
from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json


def alignment_digest(
    recipe: DistillRecipe, teacher: str, data: TrainingData, device: torch.device, precision: torch.dtype
) -> str:
    """A hash of all that the results of stages 1 and 2 depend on. ``teacher``: the hash of its files."""
    return digest(
        {
            "teacher": teacher,
            "mixer": recipe.mixer,
            "init": recipe.init,
            "seed": recipe.seed,
            "data": data.identity,
            "stage1": recipe.stage1,
            "stage2": recipe.stage2,
            "places": [str(path.resolve()) for path in data.paths],  # pictures are read from beside the files
            "max_length": recipe.data.max_length,
            "max_tiles": recipe.data.max_tiles,
            "on_bad_sample": recipe.data.on_bad_sample,
            "device": device.type,
            "precision": str(precision),
            "frozen": recipe.frozen,
        }
    )


def borrow_alignment(run: RunFolder, alignment: str, picture_hashes: Mapping[str, PictureHashes]) -> None:
    """Take stages 1 and 2 from a sibling run that aligned the same teacher in the same way."""
    if run.result("stage2") is not None or run.last_step("stage1") or run.last_step("stage2"):
        return
    for manifest in sorted(run.path.resolve().parent.glob("*/manifest.json")):
        sibling = manifest.parent
        found = _lent_manifest(sibling, alignment, picture_hashes) if sibling != run.path.resolve() else None
        if found is None:
            continue
        for stage in ALIGNMENT:
            copy = functools.partial(_copy_result, sibling / "checkpoints" / stage)
            write_atomically(run.checkpoints / stage, copy, folder=True)
            run.manifest["stages"][stage] = {**found["stages"][stage], "from": str(sibling)}
        run.note(skipped={stage: found.get("skipped", {}).get(stage, []) for stage in ALIGNMENT})
        print(f"stages 1 and 2 are those of {sibling}", file=sys.stderr)
        return


def _lent_manifest(sibling: Path, alignment: str, picture_hashes: Mapping[str, PictureHashes]) -> dict[str, Any] | None:
    """The manifest of a run whose stages 1 and 2 can be taken; None of one that aligned otherwise or is damaged."""
    found = _readable(sibling / "manifest.json")
    if found.get("alignment") != alignment or not {*ALIGNMENT} <= set(found.get("stages", {})):
        return None
    kept = pictures_of(found)
    if any(now.changed(kept.get(source, "")) for source, now in picture_hashes.items()):
        return None  # it saw other pictures
    if not all(_is_whole(sibling / "checkpoints" / stage, stage) for stage in ALIGNMENT):
        return None
    return found


def _copy_result(source: Path, target: Path) -> None:
    shutil.copyfile(source / TENSORS, target / TENSORS)


def _is_whole(folder: Path, stage: str) -> bool:
    """Whether a neighbour's result is there and undamaged. If it is not, this run has nothing to report."""
    try:
        return bool(read_checked(folder, {"stage": stage}, remedy=""))
    except UserError:
        return False


def _readable(manifest: Path) -> dict[str, Any]:
    """A neighbour's manifest; empty if it is damaged, because that concerns the neighbour alone."""
    try:
        return checked_manifest(read_json(manifest, limit=MAX_DATA_BYTES), manifest)
    except UserError:
        return {}
