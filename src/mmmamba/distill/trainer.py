"""The training loop of every stage and of teaching: AdamW, schedule, checkpoints, metrics, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mmmamba.data.loader import Skipped
from mmmamba.data.packed_batch import Batch
from mmmamba.distill import processes
from mmmamba.distill.checked_tensors import restore
from mmmamba.distill.objectives import Objective
from mmmamba.distill.optimizers import KEPT, Optimizers
from mmmamba.distill.run_folder import RunFolder
from mmmamba.distill.train_config import TrainConfig
from mmmamba.distill.training_step import make_step
from mmmamba.errors import UserError
from mmmamba.progress import Progress


class Rows(Protocol):
    """``rows(start_step)`` yields the rows of each step from there on; ``bad_samples``: what it left out so far."""

    bad_samples: list[Skipped]

    def __call__(self, start: int) -> Iterator[Sequence[Batch]]: ...


def train(
    objective: Objective,
    config: TrainConfig,
    rows: Rows,
    run: RunFolder,
    stage: str,
    *,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Run ``stage`` to its last step, from its last checkpoint if ``run`` has one.

    Every step's rows, learning rate and update are functions of the step and the weights, so a resumed run repeats an
    uninterrupted one (bit for bit on a CPU). Of several processes each calls this with its share of the rows.

    Raises:
        UserError: when the loss stops being finite, naming stage and step.
    """
    take = make_step(objective, config, device, precision)
    start = _restore(run, stage, objective.trained, take.optimizers)
    run.cut_metrics(stage, start)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    recent: list[dict[str, Tensor]] = []
    tokens, since, taken = 0, time.monotonic(), 0
    with Progress(stage, total=config.steps, start=start, console=processes.console()) as bar:
        for step, batch in zip(range(start, config.steps), rows(start), strict=False):
            rate = config.lr * config.factor(step)
            losses, norm = take(batch, rate)
            if losses:  # none when every sample of the step was skipped as bad
                recent.append(losses)
                taken += 1
            count = sum(row.tokens for row in batch)
            tokens += count
            done = step + 1
            saves = done % config.checkpoint_every == 0 and done < config.steps
            # Also where a checkpoint is due: a resumed run then logs the same means over the same steps.
            if done % config.log_every == 0 or done == config.steps or saves:
                means = _means(recent, norm, stage, done)
                learnt = float(norm) if losses else None  # a step without samples has no gradient
                tokens = int(processes.total(torch.tensor(tokens, device=device)))
                now = time.monotonic()
                run.log(
                    {
                        "stage": stage,
                        "step": done,
                        **means,
                        "lr": rate,
                        "grad_norm": learnt,
                        "tokens": tokens,
                        "tokens_per_s": round(tokens / (now - since), 1) if now > since else None,
                    }
                )
                bar.update(done, tokens=tokens, lr=rate, **means)
                recent, tokens, since = [], 0, now
            if saves:  # all go on from here: the others wait for the main process at their next sum
                run.skip(stage, processes.gather(rows.bad_samples))
                run.save_step(stage, done, _snapshot(objective.trained, take.optimizers))
    bad = processes.gather(rows.bad_samples)
    run.skip(stage, bad)
    if config.steps and not taken and start == 0:
        one = f"; one of the bad: {bad[0].where}: {bad[0].reason}" if bad else ""
        raise UserError(f"{stage}: none of its {config.steps:,} steps had a good sample, so nothing was trained{one}")


def _means(recent: Sequence[dict[str, Tensor]], norm: Tensor, stage: str, step: int) -> dict[str, float]:
    if not recent:
        return {}
    means = {key: float(torch.stack([entry[key] for entry in recent]).mean()) for key in recent[-1]}
    # The last step's gradients too: they have spoilt the weights, which no checkpoint may take over.
    for name, value in {**means, "gradient's norm": float(norm)}.items():
        if not math.isfinite(value):
            raise UserError(f"{stage}, step {step}: the {name} is {value}; lower the learning rate or the clip norm")
    return means


def _snapshot(trained: dict[str, nn.Parameter], optimizers: Optimizers) -> dict[str, Tensor]:
    """Everything that the next step depends on, by name."""
    tensors = {}
    for name, parameter in trained.items():
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizers.state_of(parameter).items():
            tensors[f"{key}/{name}"] = value
    return tensors


@torch.no_grad()
def _restore(run: RunFolder, stage: str, trained: dict[str, nn.Parameter], optimizers: Optimizers) -> int:
    """Lay the stage's last checkpoint over weights and optimizers; the step to go on from."""
    found = run.last_step(stage)
    if found is None:
        return 0
    step, tensors = found
    restore(trained, tensors, run.step_folder(stage, step), "weight/")
    for name, parameter in trained.items():
        optimizers.restore(parameter, {key: tensors[f"{key}/{name}"] for key in KEPT if f"{key}/{name}" in tensors})
    return step
