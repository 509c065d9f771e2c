"""What a stage trains by kind, what is the student's own, and that the teacher stays when more than mixers learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_losses
import torch

from mmmamba.data.packed_batch import pack
from mmmamba.distill.objectives import MatchLogits, PredictAnswers
from mmmamba.distill.optimizers import Optimizers
from mmmamba.distill.parameters import (
    AROUND_MIXERS,
    known_parts,
    mixer_parts,
    own_parameters,
    parameters_of,
    part_of,
    unshare,
)
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, initialise
from tiny import make_config

HYBRID = (MAMBA2, ATTENTION, MAMBA2, ATTENTION, MAMBA2)

cheap_pixels = test_losses.cheap_pixels
pytestmark = pytest.mark.usefixtures("cheap_pixels")


def stage(*train: str, **changes: Any) -> StageConfig:
    return StageConfig(**{"steps": 1, "batch_size": 1, "lr": 1e-3, "train": train, **changes})


def test_every_parameter_has_one_kind(tiny_model):
    student = seed(tiny_model(), HYBRID, Mamba2Options(rule="gated_delta", qk_norm=True))
    kinds = {name: part_of(name, student.config) for name, _ in student.named_parameters()}
    assert set(kinds.values()) == {*known_parts()}
    for name, kind in {
        "layers.0.mixer.conv.weight": "conv", "layers.0.mixer.o_proj.weight": "o_proj",
        "layers.1.mixer.o_proj.weight": "attention", "layers.1.mixer.q_proj.weight": "attention",
        "layers.1.mlp.up.weight": "mlp", "layers.4.mlp_norm.weight": "norms", "layers.4.input_norm.weight": "norms",
        "norm.weight": "norms", "layers.2.mixer.norm.weight": "norm", "head.weight": "head",
        "text_embeddings.weight": "embeddings", "vision.patch_embedding.weight": "embeddings",
    }.items():  # fmt: skip
        assert kinds[name] == kind
    every = [set(parameters_of(student, [kind])) for kind in known_parts()]
    assert sum(map(len, every)) == len(kinds) and set().union(*every) == set(kinds)


@pytest.mark.parametrize("kind", AROUND_MIXERS)
def test_what_is_unshared_is_a_copy_and_nothing_else_is(kind, tiny_model):
    teacher = tiny_model().to(torch.bfloat16)
    before = {name: (p, p.detach().clone()) for name, p in teacher.named_parameters()}
    student = seed(teacher, HYBRID, dtype=torch.float32)
    mixers = set(own_parameters(student, teacher))
    assert mixers == set(parameters_of(student, mixer_parts()))
    unshare(student, teacher, ["conv", kind])
    named = set(parameters_of(student, [kind]))
    own = own_parameters(student, teacher)
    assert named and set(own) == mixers | named
    for name in named:
        assert own[name].dtype == torch.float32 and torch.equal(own[name].to(torch.bfloat16), before[name][1])
    kept = dict(own)
    unshare(student, teacher, [kind])  # nothing is copied again
    assert all(kept[name] is p for name, p in own_parameters(student, teacher).items())
    assert all(p is before[name][0] for name, p in teacher.named_parameters())


def test_a_tied_head_follows_the_embeddings():
    teacher = initialise(Model(replace(make_config(), tie_word_embeddings=True)))
    student = seed(teacher)
    assert not parameters_of(student, ["head"])
    unshare(student, teacher, ["embeddings"])
    assert student.head.weight is student.text_embeddings.weight
    assert teacher.head.weight is teacher.text_embeddings.weight is not student.head.weight


@pytest.mark.parametrize("kind", AROUND_MIXERS)
def test_copies_change_no_loss(kind, tiny_model):
    teacher = tiny_model()
    found = []
    for train in (["conv"], ["conv", kind]):
        student = seed(teacher, HYBRID, Mamba2Options(rope=True))
        unshare(student, teacher, train)
        objective = MatchLogits(teacher, student, stage(*train))
        loss, gradients = test_losses.result(objective, [test_losses.SAMPLES])
        assert all(gradient is not None and gradient.any() for gradient in gradients.values())
        found.append((loss, {name: g for name, g in gradients.items() if ".conv." in name}))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_everything_moves_and_the_teacher_stays(labels, precision, tiny_model):
    teacher = tiny_model().to(precision)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = seed(teacher, HYBRID, Mamba2Options(rope=True), dtype=torch.float32)
    config = stage(*known_parts(), lr=0.01)
    unshare(student, teacher, config.train)
    objective = PredictAnswers(student, config) if labels else MatchLogits(teacher, student, config)
    assert set(objective.trained) == {name for name, _ in student.named_parameters()}
    optimizer, losses = Optimizers(objective.trained, objective.rules, config, torch.device("cpu")), []
    start = {name: p.detach().clone() for name, p in objective.trained.items()}
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(float(objective.backward([pack(test_losses.SAMPLES)], precision)["loss"]))
        optimizer.step()
    assert losses[-1] < losses[0]
    unmoved = {name for name, p in objective.trained.items() if torch.equal(p, start[name])}
    assert unmoved <= {"vision.class_embedding"}, "which nothing reads"
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_answers_are_learnt_with_what_the_stage_names(tiny_model):
    """Stage 4's loss is teaching's, its gradients those of the parameters it trains, times its scale."""
    teacher = tiny_model()
    whole = PredictAnswers(seed(teacher))
    rows = [test_losses.SAMPLES[:2], test_losses.SAMPLES[2:]]
    loss, gradients = test_losses.result(whole, rows)
    part = PredictAnswers(seed(teacher), stage("conv", "norm", loss_scale=4.0))
    ours, mine = test_losses.result(part, rows)
    assert ours == pytest.approx(4 * loss) and {name.split(".")[3] for name in mine} == {"conv", "norm"}
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, 4 * gradients[name])
