"""Losses and gradients of the three stages against the published code's values."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad as pad_tensor

from mmmamba.checkpoints.hovle import config_from_hovle, read_hovle
from mmmamba.checkpoints.layouts import parts
from mmmamba.checkpoints.release import read_release
from mmmamba.data.packed_batch import Batch
from mmmamba.distill import objectives
from mmmamba.distill.losses import divergence
from mmmamba.distill.objectives import AlignHeads, MatchLogits
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.model import MAMBA2, Model

STAGE1 = ("A_log", "dt_bias", "dt_proj", "conv", "gate_proj", "norm")
STAGE2 = (*STAGE1, "q_proj", "k_proj", "v_proj")
STAGE3 = tuple(name for name in STAGE2 if name not in ("A_log", "dt_bias"))


def published(name: str) -> str:
    """A published parameter name in our model."""
    stack, rest = (
        ("embedding_model.encoder.", 0) if name.startswith("embedding") else ("language_model.model.layers.", 2)
    )
    index, _, inner = name.removeprefix(stack).partition(".attention.")
    inner = inner.replace("A_log_bias", "A_log").replace("in_proj", "dt_proj").replace("g_norm", "norm")
    inner = inner.replace("g_proj", "gate_proj").replace("conv1d", "conv")
    return f"layers.{int(index) + rest}.mixer.{inner}"


def prefixed(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def whole(read, state, config):
    """Our state dict, of all parts."""
    return {name: tensor for part in parts(config) for name, tensor in read(state, config, part).items()}


def models(tensors, config, teacher_prefix):
    """The golden student with a teacher that holds the original attention."""
    teacher_config = config_from_hovle(config, "golden")
    teacher = Model(teacher_config)
    teacher.load_state_dict(whole(read_hovle, prefixed(tensors, teacher_prefix), teacher_config))
    student = seed(teacher)
    weights = {k: v for k, v in prefixed(tensors, "w.").items() if "_shadow" not in k}
    student.load_state_dict(whole(read_release, weights, student.config))
    return teacher, student


def golden_row(tensors, prefix, monkeypatch) -> list[Batch]:
    """The golden batch as packed rows of uint8-free pixels (normalisation is bypassed: the pixels are given)."""
    pixel_values, ids = tensors[f"{prefix}pixel_values"], tensors[f"{prefix}input_ids"]
    mask = tensors[f"{prefix}attention_mask"].bool()
    lengths = mask.sum(1)
    monkeypatch.setattr(objectives, "normalise", lambda tiles: tiles)
    return [
        Batch(
            input_ids=ids[mask][None],
            labels=torch.full((1, int(lengths.sum())), -100),
            cu_seqlens=pad_tensor(lengths.cumsum(0), (1, 0)).int(),
            tiles=pixel_values,
            ids=["a", "b"],
        )
    ]


def stage_config(train, **changes) -> StageConfig:
    return StageConfig(steps=1, batch_size=2, lr=1e-3, train=train, **changes)


def assert_gradients(objective, expected, tolerance=3e-4):
    assert set(objective.trained) == {published(name) for name in expected}
    for name, gradient in expected.items():
        ours = objective.trained[published(name)].grad
        shape = ours.shape
        worst = float((ours - gradient.view(shape)).abs().max())
        assert worst <= tolerance * max(float(gradient.abs().max()), 1e-6), name


def attention_weights(tensors):
    """The teacher of a stage file: the student's frozen weights, with wqkv put together from q, k, v."""
    weights = prefixed(tensors, "w.")
    out = {k: v for k, v in weights.items() if ".attention." not in k}
    for key in [k for k in weights if k.endswith("attention.q_proj.weight")]:
        base = key.removesuffix("q_proj.weight")
        pick = "_proj_shadow.weight" if f"{base}q_proj_shadow.weight" in weights else "_proj.weight"
        q, k, v = (weights[f"{base}{n}{pick}"] for n in "qkv")
        groups = 2
        parts = [t.view(groups, -1, t.shape[-1]) for t in (q, k, v)]
        out[f"{base}wqkv.weight"] = torch.cat(parts, dim=1).flatten(0, 1)
        out[f"{base}wo.weight"] = weights[f"{base}o_proj.weight"]
    return {f"teacher.{k}": v for k, v in out.items()}


@pytest.mark.parametrize(("name", "train"), [("stage1_A", STAGE1), ("stage2_A", STAGE2)])
def test_layer_local_stages_give_the_published_loss_and_gradients(name, train, golden, monkeypatch):
    tensors, info = golden(name)
    teacher, student = models({**tensors, **attention_weights(tensors)}, info["config"], "teacher.")
    objective = AlignHeads(teacher, student, stage_config(train, loss_scale=1000.0))
    loss = objective.backward(golden_row(tensors, "in.", monkeypatch), torch.float32)["loss"]
    torch.testing.assert_close(loss, tensors["out.loss"], rtol=1e-5, atol=1e-3)
    assert_gradients(objective, prefixed(tensors, "grad."))


@pytest.mark.parametrize("suffix", ["", "_pad"])
def test_stage_three_gives_the_published_loss_and_gradients(suffix, golden, monkeypatch):
    tensors, info = golden("stage3_loss")
    teacher, student = models(tensors, info["config"], "teacher.")
    objective = MatchLogits(teacher, student, stage_config(STAGE3, reduction="published"))
    rows = golden_row(tensors, f"in{suffix}.", monkeypatch)
    loss = objective.backward(rows, torch.float32)["loss"]
    if suffix:
        # The published loss also counts the padded positions and lets padding into the state; only ours is clean there.
        mask = tensors["in_pad.attention_mask"].bool()
        student_log = tensors["out.student_logits_pad"].log_softmax(-1)
        teacher_log = tensors["out.teacher_logits_pad"].log_softmax(-1)
        per_token = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
        torch.testing.assert_close(loss, (per_token * mask).sum() / 2, rtol=3e-4, atol=3e-4)
        torch.testing.assert_close(per_token.sum() / 2, tensors["out.loss_pad"], rtol=3e-4, atol=3e-4)
    else:
        torch.testing.assert_close(loss, tensors["out.loss"], rtol=3e-4, atol=3e-4)
        assert_gradients(objective, prefixed(tensors, "grad."))


def test_stage_three_trains_what_the_published_stage_trains(golden):
    import json
    from pathlib import Path

    names = json.loads((Path(__file__).parents[1] / "golden" / "trainable_names.json").read_text())
    assert {published(n).split(".")[3] for n in names["stage1"]} == set(STAGE1)
    assert {published(n).split(".")[3] for n in names["stage2"]} == set(STAGE2)
    assert {published(n).split(".")[3] for n in names["stage3"]} == set(STAGE3)
    _, info = golden("stage3_loss")
    assert set(info["trainable"]) == set(names["stage3"])


def test_divergence_is_the_published_kl(golden):
    tensors, info = golden("endtoend_kl")
    student, teacher = tensors["in.student_logits"], tensors["in.teacher_logits"]
    eye = torch.nn.Linear(student.shape[-1], student.shape[-1], bias=False)
    torch.nn.init.eye_(eye.weight)
    kl = divergence(student, eye, teacher, eye, torch.ones(student.shape[:2])) / student.shape[0]
    torch.testing.assert_close(kl, tensors["out.kl_T1"])
    assert MAMBA2 == "mamba2" and info["kl_T1"] == pytest.approx(float(kl.detach()), rel=1e-6)
