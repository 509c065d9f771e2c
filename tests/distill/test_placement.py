"""Where softmax stays: the measurement against probabilities worked out in full, and a run that uses it."""

from __future__ import annotations

import json

import pytest
import test_losses
import torch

import small_run
from mmmamba.checkpoints import load
from mmmamba.data.packed_batch import pack
from mmmamba.distill.distill import distill
from mmmamba.distill.objectives import inputs
from mmmamba.distill.placement import place
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.errors import UserError
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options

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
    chosen = place(teacher, aligned, Mamba2Options(), 2, rows, STAGE, torch.float32)
    first = min(range(5), key=lambda i: kl(teacher, aligned, [i], rows))
    second = min(set(range(5)) - {first}, key=lambda i: kl(teacher, aligned, [first, i], rows))
    assert chosen == sorted([first, second])
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" keeps")[0] for line in said] == [f"layer {first}", f"layer {second}"]
    for line, keep in zip(said, ([first], [first, second]), strict=True):
        assert float(line.split()[-1]) == pytest.approx(kl(teacher, aligned, keep, rows), rel=2e-3, abs=2e-4)


@torch.no_grad()
@pytest.mark.usefixtures("cheap_pixels")
def test_nothing_is_chosen_by_nothing_or_by_what_is_no_number(tiny_model, capsys):
    teacher = tiny_model()
    aligned = seed(teacher)
    with pytest.raises(UserError, match="no token that counts"):
        place(teacher, aligned, Mamba2Options(), 2, [], STAGE, torch.float32)
    aligned.mixer(3).dt_bias.fill_(float("nan"))
    rows = [pack(test_losses.SAMPLES[:2])]
    with pytest.raises(UserError, match="the KL is nan where no layer keeps softmax: no layer can be chosen by it"):
        place(teacher, aligned, Mamba2Options(), 2, rows, STAGE, torch.float32)
    assert "keeps softmax" not in capsys.readouterr().err


@pytest.mark.parametrize("first", ["good", "bad"])
def test_a_batch_of_bad_samples_is_not_measured_on(teacher_folder, small_data, tmp_path, capsys, first):
    """Whichever sample the order begins with; twice two steps of one sample also train on batches of none."""
    good = small_data.read_text().splitlines()[0]
    data = small_data.parent / f"{first}.jsonl"
    data.write_text("\n".join([good, "broken"] if first == "good" else ["broken", good]) + "\n")
    steps = {f"stage{i}__steps": 4 for i in (1, 2, 3)} | {f"stage{i}__batch_size": 1 for i in (1, 2, 3)}
    recipe = small_run.write_recipe(tmp_path / "small.yaml", small_run.recipe(layers="measured:2", **steps))
    go = {"teacher": str(teacher_folder), "data": (data,), "device": "cpu", "on_bad_sample": "skip"}
    for run_seed in (1, 2):
        distill(str(recipe), **go, out=tmp_path / str(run_seed), set=(f"seed={run_seed}",))
        said = [line for line in capsys.readouterr().err.splitlines() if "keeps softmax" in line]
        assert len(said) == 3 and not any("nan" in line for line in said)
        lines = [json.loads(line) for line in (tmp_path / str(run_seed) / "metrics.jsonl").read_text().splitlines()]
        assert all((line["grad_norm"] is None) == (line["tokens"] == 0) for line in lines if "loss" not in line)
    data.write_text("broken\nbroken\n")
    with pytest.raises(UserError, match="stage1: none of its 4 steps had a good sample, so nothing was trained"):
        distill(str(recipe), **go, out=tmp_path / "none")


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
