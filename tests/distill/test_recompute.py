"""What is computed again in the backward pass: the same gradients to the bit, and less memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_losses
import torch

from mmmamba.data.packed_batch import pack
from mmmamba.distill.allocated import Allocated
from mmmamba.distill.objectives import MatchLogits
from mmmamba.distill.seeding import seed
from mmmamba.model import Mamba2Options

cheap_pixels = test_losses.cheap_pixels
ROWS = [test_losses.SAMPLES[:2], test_losses.SAMPLES[2:]]


def matched(teacher, recompute: str, layers=None, **changes) -> MatchLogits:
    student = seed(teacher, layers, Mamba2Options(rope=True), seed=1)
    return MatchLogits(teacher, student, replace(test_losses.stage(**changes), recompute=recompute))


@pytest.mark.usefixtures("cheap_pixels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [None, test_losses.HYBRID])
@pytest.mark.parametrize("recompute", ["mlp", "layer"])
def test_gradients_are_the_same_to_the_bit(recompute, layers, dtype, tiny_model):
    teacher = tiny_model().to(dtype)
    whole = test_losses.result(matched(teacher, "none", layers, supervised=0.5), ROWS)
    again = test_losses.result(matched(teacher, recompute, layers, supervised=0.5), ROWS)
    assert whole[0] == again[0]
    assert whole[1].keys() == again[1].keys()
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in whole[1].items())


def test_in_bfloat16_passes_too(tiny_model):
    found = []
    for recompute in ("none", "mlp", "layer"):
        objective = matched(tiny_model(), recompute)
        loss = objective.backward([pack(test_losses.SAMPLES)], torch.bfloat16)["loss"]
        found.append([loss, *(p.grad for p in objective.trained.values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_less_is_alive(tiny_model):
    teacher, row = tiny_model(), pack([test_losses.encoded(600, 5, 0)])
    peaks = []
    for recompute in ("none", "mlp", "layer"):
        objective = matched(teacher, recompute)
        with Allocated(torch.device("cpu")) as allocated:
            objective.backward([row], torch.float32)
            peaks.append(allocated.peak)
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_teacher_is_left_as_it_was(tiny_model):
    teacher = tiny_model()
    before = [layer.finish for layer in teacher.layers]
    for recompute in ("mlp", "layer"):
        matched(teacher, recompute)
    assert [layer.finish for layer in teacher.layers] == before
    assert not any("forward" in vars(layer) for layer in teacher.layers)
