"""A step over rows that are padded to a shape that stays, and its replay on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_losses
import torch

from mmmamba.data.packed_batch import pack
from mmmamba.distill.objectives import MatchLogits, PredictAnswers
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import TrainConfig
from mmmamba.distill.training_step import PIECE, ReplayedStep, Room, Step, copy_row, make_step
from mmmamba.errors import UserError
from mmmamba.model import Model, RopeScaling, StackConfig, initialise
from mmmamba.ops.packing import remember_bounds, remember_lengths
from tiny import make_config

CPU = torch.device("cpu")
SAMPLES = test_losses.SAMPLES
cheap_pixels = test_losses.cheap_pixels
REPLAYED = {
    **{name: test_losses.OBJECTIVES[name] for name in ("align", "match", "match supervised", "answers")},
    "published": lambda teacher: MatchLogits(teacher, seed(teacher), test_losses.stage(reduction="published")),
}


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "batch_size": 4, "lr": 1e-2, "graph": True, **changes})


def padded(groups, room: Room | None = None):
    """The groups' rows, laid into rows that held something else before."""
    rows = [pack(group) for group in groups]
    room = room or Room.for_rows(rows)
    kept = []
    for row in rows:
        into = room.empty_row(row, CPU)
        copy_row(pack(SAMPLES[:2]), into)
        copy_row(row, into)
        remember_lengths(into.cu_seqlens, into.cu_seqlens.diff().tolist())
        kept.append(into)
    return kept


@pytest.mark.usefixtures("cheap_pixels")
@pytest.mark.parametrize("name", test_losses.OBJECTIVES)
def test_padding_changes_no_loss_and_no_gradient(name, tiny_model):
    objective = test_losses.OBJECTIVES[name](tiny_model().double())
    groups = [SAMPLES[:2], SAMPLES[2:]]
    truth = test_losses.result(objective, groups)
    for parameter in objective.trained.values():
        parameter.grad = None
    room = Room(tokens=PIECE + 90, sequences=5, longest=PIECE, tiles=6, scored=12)
    loss = float(objective.backward(padded(groups, room), torch.float32)["loss"])
    gradients = {n: p.grad for n, p in objective.trained.items() if p.grad is not None}
    test_losses.assert_same(truth, (loss, gradients))


def test_a_padded_row_is_the_row_and_short_sequences_of_nothing():
    row = pack(SAMPLES)
    room = Room(tokens=row.tokens + 2 * PIECE + 3, sequences=7, longest=PIECE, tiles=9, scored=40)
    (kept,) = padded([SAMPLES], room)
    n, k = row.tokens, row.scored.shape[0]
    assert torch.equal(kept.input_ids[:, :n], row.input_ids)
    assert torch.equal(kept.labels[:, :n], row.labels)
    assert bool((kept.labels[:, n:] == -100).all())
    assert torch.equal(kept.scored[:k], row.scored)
    assert bool((kept.labels[0, kept.scored[k:] + 1] == -100).all())
    assert int(kept.real) == n
    borders = kept.cu_seqlens.tolist()
    assert borders[: len(SAMPLES) + 1] == row.cu_seqlens.tolist()
    assert borders[len(SAMPLES) + 1 :][:3] == [n + PIECE, n + 2 * PIECE, n + 2 * PIECE + 3]
    assert set(borders[len(SAMPLES) + 4 :]) == {room.tokens}


def test_a_row_that_fills_its_room_needs_no_padding_for_what_is_not_scored():
    row = pack(SAMPLES)
    room = Room.for_rows([row], row.tokens)
    assert room.tokens == row.tokens
    (kept,) = padded([SAMPLES], replace(room, scored=room.scored + 3))
    assert bool((kept.labels[0, kept.scored[row.scored.shape[0] :] + 1] == -100).all())
    whole = replace(row, labels=row.input_ids.clone())
    assert Room.for_rows([whole], row.tokens).tokens == row.tokens + 2, "all is scored: what is not, needs a place"


def test_room_grows_to_hold_every_row_so_far():
    small, large = (Room.for_rows([pack(s)]) for s in (SAMPLES[:1], SAMPLES))
    both = small.union(large)
    assert both.holds(small)
    assert both.holds(large)
    assert not small.holds(large)
    assert small.holds(Room.for_rows([pack(SAMPLES[:1])]))


def test_without_a_gpu_a_step_is_taken_as_it_comes(tiny_model):
    step = make_step(PredictAnswers(tiny_model()), config(), CPU, torch.float32)
    assert type(step) is Step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_steps_train_as_others_do(name, optimizer):
    """Rows of changing sizes: the graph is captured again when one is larger. Losses and weights stay right."""
    where = torch.device("cuda")
    # Each step shows a picture.
    batches = [[SAMPLES[:2]], [SAMPLES[1:2]], [SAMPLES[1:3]], [SAMPLES], [SAMPLES[2:]], [SAMPLES[::-1]], [SAMPLES[:2]]]
    batches += [[SAMPLES[:2], SAMPLES[2:]]] * 4 + [[]] + [[SAMPLES]] * 3
    stack = StackConfig(num_layers=2, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=32)
    seen = {}
    for kind in (Step, ReplayedStep):
        geometry = make_config(embedding=stack, decoder=replace(stack, num_layers=3))
        objective = REPLAYED[name](initialise(Model(geometry)).to(where))
        step = kind(objective, config(graph=kind is ReplayedStep, optimizer=optimizer), where, torch.bfloat16)
        found = []
        for number, groups in enumerate(batches):
            losses, norm = step([pack(group) for group in groups], 1e-2 / (1 + number))
            found.append((float(losses["loss"]) if losses else 0.0, float(norm)))
        seen[kind] = found, {n: p.detach().clone() for n, p in objective.trained.items()}
    for ours, truth in zip(seen[ReplayedStep][0], seen[Step][0], strict=True):
        assert ours == pytest.approx(truth, rel=2e-2)
    for n, weight in seen[Step][1].items():
        torch.testing.assert_close(seen[ReplayedStep][1][n], weight, rtol=5e-2, atol=5e-3)


def test_a_base_that_depends_on_the_length_is_refused_where_only_the_device_knows_it():
    scaled = StackConfig(
        num_layers=1, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        rope_scaling=RopeScaling(type="dynamic", factor=2.0), max_position_embeddings=8,
    )  # fmt: skip
    model = Model(replace(make_config(), embedding=scaled, decoder=scaled, layer_map=()))
    row = pack(SAMPLES[:1])
    remember_bounds(row.cu_seqlens, row.tokens, PIECE)
    with pytest.raises(UserError, match="without graph"):
        model(row.input_ids, cu_seqlens=row.cu_seqlens)
