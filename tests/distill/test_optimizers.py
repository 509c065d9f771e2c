"""What moves the parameters: Muon on a CPU is PyTorch's, in a format that a CPU multiplies in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmmamba.distill.optimizers import Optimizers
from mmmamba.distill.train_config import TrainConfig
from mmmamba.model.mixers import Part

CONFIG = TrainConfig(steps=10, batch_size=1, lr=0.01, optimizer="muon", weight_decay=0.1)
SHAPES = {"mlp.up.weight": (96, 32), "mlp.down.weight": (32, 96), "q_proj.weight": (48, 48)}
RULES = {name: Part(matrix=True) for name in SHAPES}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def moved(optimizer: object, trained: dict[str, nn.Parameter], steps: int = 3) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in trained.items()}
    for step in range(steps):
        for name, gradient in gradients(step).items():
            trained[name].grad = gradient.clone()
        optimizer.step()  # type: ignore[attr-defined]
    return {name: p.detach() - before[name] for name, p in trained.items()}


def test_muon_moves_as_pytorchs_does() -> None:
    ours, theirs = parameters(), parameters()
    found = moved(Optimizers(ours, RULES, CONFIG, torch.device("cpu")), ours)
    muon = torch.optim.Muon(list(theirs.values()), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for name, expected in moved(muon, theirs).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_an_update_has_equal_directions_and_the_size_of_adamws() -> None:
    trained = parameters()
    config = TrainConfig(steps=10, batch_size=1, lr=0.01, optimizer="muon", weight_decay=0.0)
    for name, update in moved(Optimizers(trained, RULES, config, torch.device("cpu")), trained, steps=1).items():
        values = torch.linalg.svdvals(update.double())
        assert float(values.max() / values.min()) < 3, name  # of random matrices: 5 and more
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.25), name


def test_what_gets_no_gradient_stays_and_what_it_remembers_comes_back() -> None:
    trained = parameters()
    optimizers = Optimizers(trained, RULES, CONFIG, torch.device("cpu"))
    still = trained["q_proj.weight"]
    before = still.detach().clone()
    for name, gradient in gradients(0).items():
        trained[name].grad = None if name == "q_proj.weight" else gradient
    optimizers.step()
    assert torch.equal(still, before)
    twin = {name: nn.Parameter(p.detach().clone()) for name, p in trained.items()}
    resumed = Optimizers(twin, RULES, CONFIG, torch.device("cpu"))
    for name in ("mlp.up.weight", "mlp.down.weight"):
        state = {key: value.clone() for key, value in optimizers.state_of(trained[name]).items()}
        resumed.restore(twin[name], state)
    found, expected = moved(resumed, twin, steps=1), moved(optimizers, trained, steps=1)
    for name, update in expected.items():
        assert torch.equal(found[name], update), name


def test_a_rule_says_what_decays_how_fast_it_moves_and_which_optimizer_moves_it() -> None:
    trained = {
        "up": nn.Parameter(torch.ones(4, 4)),
        "few": nn.Parameter(torch.ones(4, 4)),
        "free": nn.Parameter(torch.ones(4, 4)),
    }
    rules = {"up": Part(matrix=True), "few": Part(rate=0.5), "free": Part(decays=False)}
    groups = Optimizers(trained, rules, CONFIG, torch.device("cpu")).groups
    found = {name: next(g for g in groups if any(p is one for one in g["params"])) for name, p in trained.items()}
    assert [(found[name]["weight_decay"], found[name]["scale"]) for name in trained] == [
        (0.1, 1.0),
        (0.1, 0.5),
        (0.0, 1.0),
    ]
    assert "momentum" in found["up"] and not any("momentum" in found[name] for name in ("few", "free"))
