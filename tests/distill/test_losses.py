"""Losses are per-token means over a mask: packing, batch composition, padding and micro-batches don't matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmmamba.data.packed_batch import pack
from mmmamba.data.processor import Encoded
from mmmamba.distill import losses
from mmmamba.distill.allocated import Allocated
from mmmamba.distill.losses import answer_loss, divergence, heads_error, token_weights
from mmmamba.distill.objectives import AlignHeads, MatchLogits, Objective, PredictAnswers
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options

TRAINED = ("A_log", "dt_bias", "dt_proj", "conv", "gate_proj", "norm", "q_proj", "k_proj", "v_proj")
HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)


def encoded(length: int, scored: int, number: int, tiles: int = 0) -> Encoded:
    """A random sample whose last ``scored`` tokens are an answer; its first tokens stand for ``tiles`` pictures."""
    random = np.random.default_rng(number)
    ids = random.integers(8, 300, length).astype(np.int32)
    ids[1 : 1 + 4 * tiles] = 7  # <IMG_CONTEXT>: four tokens a tile
    labels = np.full(length, -100, np.int32)
    labels[length - scored :] = ids[length - scored :]
    return Encoded(ids, labels, random.integers(0, 256, (tiles, 56, 56, 3), np.uint8), id=str(number))


SAMPLES = [encoded(9, 3, 0), encoded(14, 1, 1, tiles=1), encoded(5, 4, 2), encoded(21, 6, 3, tiles=3)]


def stage(**changes) -> StageConfig:
    return StageConfig(steps=1, batch_size=1, lr=1e-3, train=TRAINED, **changes)


OBJECTIVES = {
    "align": lambda teacher: AlignHeads(teacher, seed(teacher), stage(loss_scale=10.0)),
    "align answers": lambda teacher: AlignHeads(teacher, seed(teacher), stage(prompt_weight=0.0)),
    "align rope": lambda teacher: AlignHeads(teacher, seed(teacher, mixer=Mamba2Options(rope=True)), stage()),
    "match": lambda teacher: MatchLogits(teacher, seed(teacher), stage()),
    "match hybrid": lambda teacher: MatchLogits(teacher, seed(teacher, HYBRID), stage(prompt_weight=0.3)),
    "match supervised": lambda teacher: MatchLogits(teacher, seed(teacher), stage(supervised=0.5, temperature=2.0)),
    "answers": PredictAnswers,
}


@pytest.fixture(params=OBJECTIVES)
def objective(request, tiny_model) -> Objective:
    """float64, where equal means equal."""
    return OBJECTIVES[request.param](tiny_model().double())


def result(objective: Objective, groups: Sequence[Sequence[Encoded]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, split into rows as ``groups`` says."""
    for parameter in objective.trained.values():
        parameter.grad = None
    loss = objective.backward([pack(group) for group in groups], torch.float32)["loss"]
    unused = [name for name, p in objective.trained.items() if p.grad is None and not name.startswith("vision.")]
    assert not unused, f"no gradient reaches {unused}"
    return float(loss), {name: p.grad.clone() for name, p in objective.trained.items() if p.grad is not None}


def assert_same(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    # 1e-5: the KL's logits are float32 by design
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    for name, gradient in a[1].items():
        worst = float((gradient - b[1][name]).abs().max())
        assert worst <= 1e-5 * max(float(gradient.abs().max()), 1e-9), name


@pytest.mark.usefixtures("cheap_pixels")
def test_micro_batches_order_and_packing_change_nothing(objective):
    a, b, c, d = SAMPLES
    whole = result(objective, [SAMPLES])
    for groups in ([[a], [b], [c], [d]], [[a, b], [c, d]], [[d, c, b, a]], [[a, b, c], [d]]):
        assert_same(whole, result(objective, groups))


@pytest.fixture
def cheap_pixels(monkeypatch):
    """Pixels in float64, as the models of these tests."""
    from mmmamba.data.tiling import normalise
    from mmmamba.distill import objectives

    monkeypatch.setattr(objectives, "normalise", lambda tiles: normalise(tiles).double())


@pytest.mark.usefixtures("cheap_pixels")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_the_mean_of_its_tokens(name, tiny_model):
    """The loss of a step is the token-weighted mean of its samples' own losses: long ones are not favoured."""
    teacher = tiny_model().double()
    objective = OBJECTIVES[name](teacher)
    weights, losses = [], []
    for sample in SAMPLES:
        row = pack([sample])
        losses.append(result(objective, [[sample]])[0])
        if name == "answers":
            weights.append(float((row.labels[:, 1:] != -100).sum()))
        else:
            weights.append(float(token_weights(row.labels, objective.stage.prompt_weight).sum()))
    if name == "match supervised":  # two means over two masks: each is checked by the others
        return
    expected = float(np.average(losses, weights=weights))
    assert result(objective, [SAMPLES])[0] == pytest.approx(expected, rel=1e-6)


def test_published_reduction_divides_by_samples(tiny_model):
    teacher = tiny_model()
    student = seed(teacher)
    rows = [pack(SAMPLES[:1]), pack(SAMPLES[2:3])]
    tokens = sum(row.tokens for row in rows)
    mean = float(MatchLogits(teacher, student, stage()).backward(rows, torch.float32)["loss"])
    published = MatchLogits(teacher, student, stage(reduction="published")).backward(rows, torch.float32)["loss"]
    assert float(published) == pytest.approx(mean * tokens / 2, rel=1e-4)


# ---------------------------------------------------------------------------------------------- the pieces


def as_head(weight: torch.Tensor) -> torch.nn.Linear:
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return head


def test_weights_fall_on_the_positions_that_predict_an_answer():
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100, 7]])
    assert token_weights(labels, 0.0).tolist() == [[0, 1, 1, 0, 0, 1, 0]]
    assert token_weights(labels, 1.0).tolist() == [[1] * 7]
    torch.testing.assert_close(token_weights(labels, 0.25), torch.tensor([[0.25, 1, 1, 0.25, 0.25, 1, 0.25]]))


def test_a_token_without_weight_counts_for_nothing():
    random = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(1, 6, 4, 16, generator=random) for _ in range(2))
    hidden, other = (torch.randn(1, 6, 8, generator=random) for _ in range(2))
    head = as_head(torch.randn(11, 8, generator=random))
    weights = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    kept = weights[0].bool()
    ones = torch.ones(1, 3)
    torch.testing.assert_close(
        heads_error(predicted, target, weights), heads_error(predicted[:, kept], target[:, kept], ones)
    )
    torch.testing.assert_close(
        divergence(hidden, head, other, head, weights), divergence(hidden[:, kept], head, other[:, kept], head, ones)
    )


def test_answer_loss_is_cross_entropy_of_the_scored_tokens():
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(1, 10, 8, generator=random), torch.randn(11, 8, generator=random)
    labels = torch.tensor([[-100, 3, -100, 10, -100, -100, -100, -100, -100, 0]])
    logits = hidden @ head.T
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    head = as_head(head)
    torch.testing.assert_close(answer_loss(hidden, head, labels, torch.tensor([0, 2, 8])), expected)
    with_padding = torch.tensor([0, 2, 8, 5, 5])
    torch.testing.assert_close(answer_loss(hidden, head, labels, with_padding), expected)


def test_logits_of_many_answers_are_never_alive_at_once(monkeypatch):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 400, 8, generator=random, requires_grad=True)
    head, labels = torch.randn(3000, 8, generator=random), torch.randint(0, 3000, (1, 400), generator=random)
    found, peaks = [], []
    for chunk in (4096, 40):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        with Allocated(torch.device("cpu")) as allocated:
            loss = answer_loss(hidden, as_head(head), labels, torch.arange(399))
            (gradient,) = torch.autograd.grad(loss, hidden)
            peaks.append(allocated.peak)
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[1], found[0])
    assert peaks[1] < peaks[0] / 5


def test_a_student_that_is_its_teacher_has_no_divergence(tiny_model):
    teacher = tiny_model()
    rows = [pack(SAMPLES[:1])]
    loss = MatchLogits(teacher, seed(teacher), stage()).backward(rows, torch.float32)["loss"]
    assert float(loss) > 0
    hidden = torch.randn(1, 4, 64)
    head = teacher.head
    assert float(divergence(hidden, head, hidden, head, torch.ones(1, 4)).detach()) == pytest.approx(0, abs=1e-5)
