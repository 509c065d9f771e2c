"""Where softmax stays: the measurement against probabilities worked out in full, and a run that uses it."""

from __future__ import annotations

import json

import pytest
import test_losses
import torch

import small_run
from mmmamba.checkpoints import load
from mmmamba.data.batching import pack
from mmmamba.distill.distill import distill
from mmmamba.distill.objectives import inputs
from mmmamba.distill.placement import place
from mmmamba.distill.recipe import StageConfig
from mmmamba.distill.seeding import seed
from mmmamba.model import ATTENTION, MAMBA2, MixerConfig

cheap_pixels = test_losses.cheap_pixels
STAGE = StageConfig(steps=1, batch_size=4, lr=1e-3, train=("conv",))


def kl(teacher, aligned, keep, rows):
    """Per-token KL over all logits, in float64."""
    student = seed(teacher, [ATTENTION if i in keep else MAMBA2 for i in range(5)], aligned=aligned)
    total, tokens = 0.0, 0
    for row in rows:
        given = inputs(teacher, row)
        ours, theirs = (
            model(**given, cu_seqlens=row.cu_seqlens).logits.double().log_softmax(-1) for model in (student, teacher)
        )
        total += float((theirs.exp() * (theirs - ours)).sum())
        tokens += row.input_ids.numel()
    return total / tokens


@torch.no_grad()
@pytest.mark.usefixtures("cheap_pixels")
def test_each_choice_is_the_nearest_to_the_teacher(tiny_model, capsys):
    teacher = tiny_model()
    aligned = seed(teacher)
    rows = [pack(test_losses.SAMPLES[:2]), pack(test_losses.SAMPLES[2:])]
    chosen = place(teacher, aligned, MixerConfig(), 2, rows, STAGE, torch.float32)
    first = min(range(5), key=lambda i: kl(teacher, aligned, [i], rows))
    second = min(set(range(5)) - {first}, key=lambda i: kl(teacher, aligned, [first, i], rows))
    assert chosen == sorted([first, second])
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" keeps")[0] for line in said] == [f"layer {first}", f"layer {second}"]
    for line, keep in zip(said, ([first], [first, second]), strict=True):
        assert float(line.split()[-1]) == pytest.approx(kl(teacher, aligned, keep, rows), rel=2e-3, abs=2e-4)


def test_a_run_measures_once_and_remembers(teacher_folder, small_data, tmp_path):
    steps = {f"stage{i}__steps": 2 for i in (1, 2, 3)}
    plan = small_run.recipe(layers="measured:4", **steps)
    recipe, run = small_run.write_recipe(tmp_path / "small.yaml", plan), tmp_path / "run"
    go = {"teacher": str(teacher_folder), "data": (small_data,), "out": run, "device": "cpu"}
    model = distill(str(recipe), **go)
    manifest = json.loads((run / "manifest.json").read_text())
    kept = manifest["softmax_layers"]
    assert len(kept) == 2 and load(model).config.attention_layers == tuple(kept)
    # What was measured is not measured again: the manifest is believed.
    other = [i for i in range(5) if i not in kept][:2]
    (run / "manifest.json").write_text(json.dumps({**manifest, "softmax_layers": other, "stages": {
        name: manifest["stages"][name] for name in ("stage1", "stage2")
    }}))  # fmt: skip
    assert load(distill(str(recipe), resume=True, **go)).config.attention_layers == tuple(other)
