"""One optimisation step: a pass for each row, clipping, update; as they come, or replayed as CUDA graphs.

A pass launches some thousand kernels, and where they are small the host takes longer to launch them than the GPU to
run them. A graph launches them all at once, but only with the shapes and addresses that it was captured with. So each
row is copied into tensors that stay, followed by padding that no loss counts, and its layout is worked out on the
device (:class:`~mmmamba.ops.packing.DeviceLayout`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba.cuda_graphs import CaptureStream, Replayed
from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import UNSCORED
from mmmamba.distill import processes
from mmmamba.distill.objectives import Objective
from mmmamba.distill.optimizers import Optimizers
from mmmamba.distill.train_config import TrainConfig
from mmmamba.ops.packing import remember_bounds, remember_lengths

PIECE = 512  # padding lies in sequences of at most this many tokens: attention over one longer row would cost more


class Step:
    """One step of an objective: a pass for each row, clip, update.

    Args:
        objective: what is trained.
        config: rates, betas, decay, clip, and whether to replay.
        device: where the rows go.
        precision: of the passes.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device, precision: torch.dtype) -> None:
        self.objective, self.config, self.device, self.precision = objective, config, device, precision
        self.optimizers = Optimizers(objective.trained, objective.rules, config, device)

    def __call__(self, rows: Sequence[Batch], rate: float) -> tuple[dict[str, Tensor], Tensor]:
        """Take the step at learning rate ``rate``: the objective's losses, the gradient's norm.

        Without rows, in any process, there is nothing to learn from: no losses, and no update.
        """
        several = processes.count() > 1  # one alone must not wait for its GPU
        if not (int(processes.total(torch.tensor(len(rows), device=self.device))) if several else rows):
            return {}, torch.zeros((), device=self.device)
        self.optimizers.set_rate(rate)
        self.zero_grad()
        losses = self.passes(rows)
        if several:
            self._sum_gradients()
            losses = {name: processes.total(loss) for name, loss in losses.items()}
        return losses, self.update()

    def zero_grad(self) -> None:
        """Let the gradients of the last step go."""
        self.optimizers.zero_grad()

    def passes(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        """Add the gradients of the rows of this process; their losses."""
        return self.objective.backward([move(row, self.device) for row in rows], self.precision)

    def update(self) -> Tensor:
        """Clip the gradients and move the parameters; the gradients' norm before."""
        norm = nn.utils.clip_grad_norm_(list(self.objective.trained.values()), self.config.clip)
        self.optimizers.step()
        return norm

    def _sum_gradients(self) -> None:
        """Sum them over all processes; a gradient that no process has stays away, as it does in one process."""
        parameters = list(self.objective.trained.values())
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        for parameter, users in zip(parameters, processes.total(has).tolist(), strict=True):
            if users:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                processes.total(parameter.grad)


class ReplayedStep(Step):
    """The same step, its pass and its update captured once and replayed: the pass for each row.

    A row larger than the graph has room for makes the room larger, and the graph is captured again: after some steps
    that no longer happens. Gradients stay where they are, so that what a step's rows do not use (the patch embedding,
    where no picture is shown) has a gradient of zero here and none there, and AdamW's momentum and decay go on moving
    it.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device, precision: torch.dtype) -> None:
        super().__init__(objective, config, device, precision)
        self._stream = CaptureStream(device)
        self._pass: _PaddedPass | None = None
        self._update: Replayed[Tensor] | None = None
        if config.optimizer == "adamw":  # Muon takes its rate from the host
            for group in self.optimizers.groups:  # a captured step reads it from memory
                group["lr"] = torch.zeros((), device=device)
            self._update = Replayed(self._stream)

    def zero_grad(self) -> None:
        """Let the gradients of the last step go; they stay where the graphs know them."""
        for parameter in self.objective.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        torch._foreach_zero_([parameter.grad for parameter in self.objective.trained.values()])  # type: ignore[misc]

    def passes(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        divisors, losses = self.objective.divisors(rows), self.objective.nothing()
        for row in rows:
            room = Room.for_rows([row], self.config.micro_tokens)
            if self._pass is None or not self._pass.room.holds(room):
                room = room if self._pass is None else self._pass.room.union(room)
                self._pass = None  # first: its graph's memory is the next one's
                self._pass = _PaddedPass(room, room.empty_row(row, self.device), self._stream)
            for name, part in self._pass(row, divisors, self.objective, self.precision).items():
                losses[name] += part
        return losses

    def update(self) -> Tensor:
        return super().update() if self._update is None else self._update(super().update).clone()


class _PaddedPass:
    """An objective's pass over a row that stays, into which every row is laid."""

    def __init__(self, room: Room, row: Batch, stream: CaptureStream) -> None:
        self.room, self.row = room, row
        self._divisors: dict[str, Tensor] = {}
        self._replayed: Replayed[dict[str, Tensor]] = Replayed(stream)

    def __call__(
        self, row: Batch, divisors: dict[str, Tensor], objective: Objective, precision: torch.dtype
    ) -> dict[str, Tensor]:
        copy_row(row, self.row)
        for name, value in divisors.items():
            self._divisors.setdefault(name, torch.empty_like(value)).copy_(value)

        def run() -> dict[str, Tensor]:
            # Here, so that the tables are part of what is captured.
            remember_bounds(self.row.cu_seqlens, self.row.tokens, self.room.longest)
            return objective.pass_row(self.row, self._divisors, precision)

        return self._replayed(run)


@dataclass(frozen=True)
class Room:
    """What a padded row has room for: tokens, sequences, tokens of the longest one, tiles, scored tokens."""

    tokens: int
    sequences: int
    longest: int
    tiles: int
    scored: int

    @classmethod
    def for_rows(cls, rows: Sequence[Batch], most: int = 0) -> Room:
        """Room for each of ``rows``, and a little more; not more than ``most`` tokens where those suffice."""
        tokens = max(row.tokens + 2 * (_idle(row) is None) for row in rows)
        return cls(
            tokens=max(tokens, min(_rounded_up(tokens), most or _rounded_up(tokens))),
            sequences=_rounded_up(max(row.sequences for row in rows)),
            longest=max(PIECE, _rounded_up(max(int(row.cu_seqlens.diff().max()) for row in rows))),
            tiles=_rounded_up(max(row.tiles.shape[0] for row in rows)),
            scored=_rounded_up(max(row.scored.shape[0] for row in rows)),
        )

    def holds(self, other: Room) -> bool:
        return self.union(other) == self

    def union(self, other: Room) -> Room:
        """The larger of both in everything."""
        return Room(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def empty_row(self, like: Batch, device: torch.device) -> Batch:
        """A row of this size on ``device``, nothing real in it."""
        top: dict[str, Any] = {}
        if like.top_ids is not None and like.top_log_probs is not None:
            k = like.top_ids.shape[2]
            places = self.tokens if like.top_ids.shape[1] == like.tokens else self.scored
            # Padding counts nothing, but its loss has to be finite.
            top["top_ids"] = torch.arange(k, dtype=torch.int32, device=device).repeat(1, places, 1)
            top["top_log_probs"] = like.top_log_probs.new_full((1, places, k + 1), -math.log(k + 1), device=device)
        return Batch(
            **top,
            input_ids=torch.zeros(1, self.tokens, dtype=torch.long, device=device),
            labels=torch.full((1, self.tokens), UNSCORED, dtype=torch.long, device=device),
            cu_seqlens=torch.zeros(self.sequences + -(-self.tokens // PIECE) + 1, dtype=torch.int32, device=device),
            tiles=torch.zeros(self.tiles, *like.tiles.shape[1:], dtype=torch.uint8, device=device),
            ids=[],
            scored=torch.zeros(self.scored, dtype=torch.long, device=device),
            real=torch.zeros((), dtype=torch.long, device=device),
        )


def _idle(row: Batch) -> int | None:
    """A token whose next one is not scored; None where there is none."""
    found = (row.labels[0, 1:] == UNSCORED).nonzero()
    return int(found[0]) if len(found) else None


def copy_row(row: Batch, into: Batch) -> None:
    """Copy ``row`` (on the host) into a row that stays, and fill the rest with padding.

    Tiles after the row's own keep what they had: no token asks for them.
    """
    into.input_ids[:, row.tokens :] = 0
    into.labels[:, row.tokens :] = UNSCORED
    idle = _idle(row)
    into.scored[row.scored.shape[0] :] = into.tokens - 2 if idle is None else idle  # what is padding scores nothing
    assert into.real is not None
    into.real.fill_(row.tokens)
    borders = [*row.cu_seqlens.tolist(), *range(row.tokens + PIECE, into.tokens, PIECE)]
    borders += [into.tokens] * (into.cu_seqlens.shape[0] - len(borders))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    copies = [
        (into.input_ids[:, : row.tokens], row.input_ids),
        (into.labels[:, : row.tokens], row.labels),
        (into.scored[: row.scored.shape[0]], row.scored),
        (into.tiles[: row.tiles.shape[0]], row.tiles),
        (into.cu_seqlens, cu_seqlens),
    ]
    for kept, given in ((into.top_ids, row.top_ids), (into.top_log_probs, row.top_log_probs)):
        if kept is not None and given is not None:
            copies.append((kept[:, : given.shape[1]], given))
    for target, source in copies:
        # From pinned memory a copy waits for nothing. What is pinned stays as it is.
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def make_step(objective: Objective, config: TrainConfig, device: torch.device, precision: torch.dtype) -> Step:
    """The step of a run: replayed where the recipe asks for it and there is a GPU, else as it comes."""
    kind = ReplayedStep if config.graph and device.type == "cuda" else Step
    return kind(objective, config, device, precision)


def _rounded_up(size: int) -> int:
    """``size`` rounded up to a multiple of a sixteenth of the power of two above it."""
    unit = max(1, (1 << max(size - 1, 0).bit_length()) // 16)
    return -(-size // unit) * unit


def move(row: Batch, device: torch.device) -> Batch:
    """The row on ``device``, its lengths remembered so that no layer asks the device for them."""
    moved = row.to(device)
    if moved.cu_seqlens is not row.cu_seqlens:
        remember_lengths(moved.cu_seqlens, row.cu_seqlens.diff().tolist())
    return moved
