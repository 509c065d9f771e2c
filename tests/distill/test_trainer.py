"""The training loop: what a step does, what it logs, and that a resumed run repeats an uninterrupted one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

from mmmamba.data.loader import Skipped
from mmmamba.data.packed_batch import Batch
from mmmamba.device import pick_device, pick_precision
from mmmamba.distill.parameters import rules_of
from mmmamba.distill.run_folder import RunFolder
from mmmamba.distill.train_config import TrainConfig
from mmmamba.distill.trainer import train
from mmmamba.errors import UserError
from mmmamba.model import MAMBA2
from tiny import make_config

ROW = Batch(
    input_ids=torch.ones(1, 4, dtype=torch.long),
    labels=torch.ones(1, 4, dtype=torch.long),
    cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
    tiles=torch.zeros(0, 56, 56, 3, dtype=torch.uint8),
    ids=["a"],
)


class Rows:
    """One row a step; ``empty`` steps have none. ``die`` raises at a step, as a kill would."""

    def __init__(self, steps: int, empty: Sequence[int] = (), die: int | None = None) -> None:
        self.steps, self.empty, self.die = steps, empty, die
        self.bad_samples: list[Skipped] = []

    def __call__(self, start: int) -> Iterator[Sequence[Batch]]:
        for step in range(start, self.steps):
            if step == self.die:
                raise KeyboardInterrupt
            if step in self.empty:
                self.bad_samples.append(Skipped(step, f"d.jsonl:{step}", "broken"))
            yield [] if step in self.empty else [ROW]


class Distance:
    """A loss that changes with the number of passes, so that a repeated or a lost step is seen."""

    def __init__(self, scale: float = 1.0) -> None:
        random = torch.Generator().manual_seed(0)
        self.trained = {
            "layers.0.mixer.q_proj.weight": nn.Parameter(torch.randn(3, 2, generator=random)),
            "layers.0.mixer.dt_bias": nn.Parameter(torch.randn(3, generator=random)),
            "text_embeddings.weight": nn.Parameter(torch.randn(2, 2, generator=random)),
        }
        self.rules = rules_of(self.trained, make_config((MAMBA2,) * 5))
        self.scale = scale

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, torch.Tensor]:
        loss = sum(((p - 1) ** 2).sum() for p in self.trained.values()) * self.scale
        loss.backward()
        return {"loss": loss.detach()}


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "batch_size": 1, "lr": 0.1, "checkpoint_every": 4, "log_every": 3, **changes})


def run_folder(path, resume: bool = True) -> RunFolder:
    return RunFolder(path, {"name": "x"}, {"kind": "test"}, resume=resume)


def go(path, objective: Distance | None = None, rows: Rows | None = None, **changes) -> Distance:
    objective, settings = objective or Distance(), config(**changes)
    rows = rows or Rows(settings.steps)
    train(objective, settings, rows, run_folder(path), "s", device=torch.device("cpu"), precision=torch.float32)
    return objective


def losses(path) -> list[tuple[int, float]]:
    return [(line["step"], line.get("loss")) for line in run_folder(path).metrics()]


@pytest.mark.parametrize(
    ("die", "optimizer"), [*((n, "adamw") for n in (0, 1, 3, 4, 5, 8, 9)), (5, "muon"), (9, "muon")]
)
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, die, optimizer):
    whole = go(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", rows=Rows(10, die=die), optimizer=optimizer)
    saved = run_folder(tmp_path / "cut").last_step("s")
    assert (saved[0] if saved else 0) == die // 4 * 4
    again = go(tmp_path / "cut", optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.trained.values(), again.trained.values(), strict=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == [3, 4, 6, 8, 9, 10]


def test_every_field_is_logged(tmp_path):
    go(tmp_path)
    line = run_folder(tmp_path).metrics()[0]
    assert set(line) == {"stage", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"}
    assert line["stage"] == "s" and line["tokens"] == 12
    assert [entry["lr"] for entry in run_folder(tmp_path).metrics()][-1] == pytest.approx(0.1 * config().factor(9))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_falls_on_matrices_alone_and_scales_by_name(tmp_path, optimizer):
    """With no gradient to follow, what moves is moved by the weight decay."""

    class Still(Distance):
        def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, torch.Tensor]:
            for parameter in self.trained.values():
                parameter.grad = torch.zeros_like(parameter)
            return {"loss": torch.zeros(())}

    changes = {"steps": 1, "warmup": 0, "decay": 0, "weight_decay": 0.5, "lr_scale": {"q_proj": 2.0}}
    start, end = Still(), go(tmp_path, Still(), optimizer=optimizer, **changes)
    before, after = list(start.trained.values()), list(end.trained.values())
    torch.testing.assert_close(after[0], before[0] * (1 - 0.1 * 2.0 * 0.5))
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])


def test_muon_moves_all_directions_of_a_projection_alike_and_leaves_the_rest_to_adamw(tmp_path):
    """A step's singular values are near 0.2 · √(longer side) · rate (PyTorch's scaling to AdamW's rates)."""
    once = {"steps": 1, "warmup": 0, "decay": 0, "weight_decay": 0.0}
    start = Distance().trained
    adamw, muon = (go(tmp_path / name, optimizer=name, **once).trained for name in ("adamw", "muon"))
    name = "layers.0.mixer.q_proj.weight"
    moved = torch.linalg.svdvals((muon[name] - start[name]).detach()) / (0.1 * 0.2 * 3**0.5)
    assert ((moved > 0.6) & (moved < 1.3)).all() and not torch.equal(muon[name], adamw[name])
    assert all(torch.equal(muon[other], adamw[other]) for other in start if other != name)


def test_the_gradient_is_clipped(tmp_path):
    objective = go(tmp_path, Distance(1e6), steps=1, clip=1e-3)
    norm = torch.cat([p.grad.flatten() for p in objective.trained.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert run_folder(tmp_path).metrics()[0]["grad_norm"] > 1e3


def test_a_step_whose_samples_are_all_bad_changes_nothing_and_is_listed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "a", rows=Rows(10, empty=[0, 1, 2, 6], die=9))
    assert [e["where"] for e in run_folder(tmp_path / "a").manifest["skipped"]["s"]] == [
        f"d.jsonl:{i}" for i in (0, 1, 2, 6)
    ]
    go(tmp_path / "a", rows=Rows(10, empty=[0, 1, 2, 6]))
    go(tmp_path / "b", rows=Rows(10, empty=[0, 1, 2, 6]))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "b")[0] == (3, None)
    assert run_folder(tmp_path / "a").skipped() == run_folder(tmp_path / "b").skipped() != {}
    still = Distance()
    with pytest.raises(UserError, match=r"^s: none of its 10 steps had a good sample, so nothing was trained"):
        go(tmp_path / "c", still, rows=Rows(10, empty=range(10)))
    assert all(torch.equal(a, b) for a, b in zip(still.trained.values(), Distance().trained.values(), strict=True))
    lines = run_folder(tmp_path / "c").metrics()
    assert lines and all("loss" not in line and line["grad_norm"] is None for line in lines)
    assert len(run_folder(tmp_path / "c").manifest["skipped"]["s"]) == 10


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e38])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path, scale):
    with pytest.raises(
        UserError, match=r"^s, step 3: the (loss|gradient's norm) is (nan|inf); lower the learning rate"
    ):
        go(tmp_path, Distance(scale))
    assert run_folder(tmp_path).last_step("s") is None


def test_gradients_that_are_not_finite_spoil_no_checkpoint(tmp_path):
    class Spoilt(Distance):
        calls = 0

        def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, torch.Tensor]:
            result = super().backward(rows, precision)
            self.calls += 1
            if self.calls == 8:  # a checkpoint is due after this step, whose loss is fine
                self.trained["layers.0.mixer.dt_bias"].grad[0] = math.nan
            return result

    with pytest.raises(UserError, match=r"s, step 8: the gradient's norm is nan"):
        go(tmp_path, Spoilt())
    step, tensors = run_folder(tmp_path).last_step("s")
    assert step == 4 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_no_steps_are_no_steps(tmp_path):
    objective = go(tmp_path, steps=0)
    assert all(torch.equal(a, b) for a, b in zip(objective.trained.values(), Distance().trained.values(), strict=True))
    assert run_folder(tmp_path).metrics() == []


def test_device_and_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"--device {device}: PyTorch sees no CUDA GPU here"):
            pick_device(device)
    with pytest.raises(UserError, match="--device gpu: must be auto, cpu, cuda, cuda:N or mps"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_precision("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_precision("auto", torch.device("cpu")) == torch.float32
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
