"""One optimisation step: passes, clipping, update; as it comes, or replayed as a CUDA graph.

A small model's step is a thousand small kernels, and the host takes longer to launch them than the GPU to run them. A
graph launches them all at once, but only with the shapes and addresses that it was captured with. So the rows are laid
into tensors that stay, with padding behind them that no loss counts, and the layout of a row is worked out on the
device (:class:`~mmmamba.ops.layout.DeviceLayout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba.data.batching import Batch
from mmmamba.data.processor import UNSCORED
from mmmamba.device import uncollected
from mmmamba.distill import processes
from mmmamba.distill.objectives import Objective
from mmmamba.distill.optimizers import Optimizers
from mmmamba.distill.recipe import TrainConfig
from mmmamba.errors import UserError
from mmmamba.ops.layout import remember_bounds, remember_lengths

PIECE = 512  # padding lies in sequences of at most this many tokens: attention over one longer row would cost more
WARM_UP = 2  # steps taken as they come before one is captured: AdamW's state and the kernels are made in them


class Step:
    """One step of an objective: backward over the rows, clip, update.

    Args:
        objective: what is trained.
        config: rates, betas, decay, clip, and whether to replay.
        device: where the rows go.
        precision: of the passes.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device, precision: torch.dtype) -> None:
        self.objective, self.clip, self.device, self.precision = objective, config.clip, device, precision
        self.optimizers = Optimizers(objective.trained, config, device)

    def __call__(self, rows: Sequence[Batch], rate: float) -> tuple[dict[str, Tensor], Tensor]:
        """Take the step at learning rate ``rate``: the objective's losses (none without rows), the gradient's norm."""
        self.optimizers.set_rate(rate)
        return self._update([move(row, self.device) for row in rows])

    def _update(self, rows: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        self.optimizers.zero_grad()
        losses = self.objective.backward(rows, self.precision) if rows or processes.count() > 1 else {}
        if processes.count() > 1:
            losses = self._sum(losses)
        norm = nn.utils.clip_grad_norm_(list(self.objective.trained.values()), self.clip)
        self.optimizers.step()
        return losses, norm

    def _sum(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients and losses over all processes; no losses where no process had rows.

        A gradient that no process has stays away, as it does in one process.
        """
        parameters = list(self.objective.trained.values())
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        used = processes.total(has).tolist()
        for parameter, users in zip(parameters, used, strict=True):
            if users:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                processes.total(parameter.grad)
        return {name: processes.total(loss) for name, loss in losses.items()} if any(used) else {}


class ReplayedStep(Step):
    """The same step, captured once for each number of rows and replayed.

    A row larger than the graph has room for makes the room larger, and the graph is captured anew: after some steps
    that no longer happens. What a step's rows do not use (the patch embedding, where no picture is shown) has a
    gradient of zero here and none there, so that AdamW's momentum and decay go on moving it.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device, precision: torch.dtype) -> None:
        super().__init__(objective, config, device, precision)
        for group in self.optimizers.groups:  # a captured step reads its rate from memory
            group["lr"] = torch.zeros((), device=device)
        self._captured: dict[int, _Captured] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def __call__(self, rows: Sequence[Batch], rate: float) -> tuple[dict[str, Tensor], Tensor]:
        if not rows:  # nothing to learn from: no update
            return {}, torch.zeros((), device=self.device)
        self.optimizers.set_rate(rate)
        captured = self._captured.get(len(rows))
        room = Room.for_rows(rows)
        if captured is None or not captured.room.holds(room):
            room = room if captured is None else captured.room.union(room)
            captured = self._captured[len(rows)] = _Captured(room, [room.empty_row(rows[0], self.device) for _ in rows])
        for row, kept in zip(rows, captured.rows, strict=True):
            lay(row, kept)
        if captured.graph is None:
            if captured.taken < WARM_UP:
                captured.taken += 1
                return self._aside(captured)
            self._capture(captured)
        assert captured.graph is not None
        captured.graph.replay()
        losses, norm = captured.results
        return {name: loss.clone() for name, loss in losses.items()}, norm

    def _padded_update(self, captured: _Captured) -> tuple[dict[str, Tensor], Tensor]:
        for row in captured.rows:  # here, so that the tables are part of what is captured
            remember_bounds(row.cu_seqlens, row.tokens, captured.room.longest)
        return self._update(captured.rows)

    def _aside(self, captured: _Captured) -> tuple[dict[str, Tensor], Tensor]:
        """The step as it comes, on a stream of its own: what autograd remembers of streams must not outlive it."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            results = self._padded_update(captured)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return results

    def _capture(self, captured: _Captured) -> None:
        self.optimizers.zero_grad()
        graph = torch.cuda.CUDAGraph()
        # The loader's threads go on pinning memory meanwhile, which only a capture of this thread alone lets them.
        with (
            uncollected(),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            captured.results = self._padded_update(captured)
        captured.graph, self._pool = graph, graph.pool()


@dataclass(frozen=True)
class Room:
    """What a padded row has room for: tokens, sequences, tokens of the longest one, tiles, scored tokens."""

    tokens: int
    sequences: int
    longest: int
    tiles: int
    scored: int

    @classmethod
    def for_rows(cls, rows: Sequence[Batch]) -> Room:
        """Room for each of ``rows``, and a little more."""
        return cls(
            tokens=_roomy(2 + max(row.tokens for row in rows)),  # a scored token has another one behind it
            sequences=_roomy(max(row.sequences for row in rows)),
            longest=max(PIECE, _roomy(max(int(row.cu_seqlens.diff().max()) for row in rows))),
            tiles=_roomy(max(row.tiles.shape[0] for row in rows)),
            scored=_roomy(max(row.scored.shape[0] for row in rows)),
        )

    def holds(self, other: Room) -> bool:
        return self.union(other) == self

    def union(self, other: Room) -> Room:
        """The larger of both in everything."""
        return Room(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def empty_row(self, like: Batch, device: torch.device) -> Batch:
        """A row of this size on ``device``, nothing real in it."""
        return Batch(
            input_ids=torch.zeros(1, self.tokens, dtype=torch.long, device=device),
            labels=torch.full((1, self.tokens), UNSCORED, dtype=torch.long, device=device),
            cu_seqlens=torch.zeros(self.sequences + -(-self.tokens // PIECE) + 1, dtype=torch.int32, device=device),
            tiles=torch.zeros(self.tiles, *like.tiles.shape[1:], dtype=torch.uint8, device=device),
            ids=[],
            scored=torch.zeros(self.scored, dtype=torch.long, device=device),
            real=torch.zeros((), dtype=torch.long, device=device),
        )


def lay(row: Batch, into: Batch) -> None:
    """Copy ``row`` (on the host) into a row that stays; padding behind it.

    Tiles behind the row's own keep what they had: no token asks for them.
    """
    into.input_ids[:, row.tokens :] = 0
    into.labels[:, row.tokens :] = UNSCORED
    into.scored[row.scored.shape[0] :] = into.tokens - 2  # padding, as is the token behind it
    assert into.real is not None
    into.real.fill_(row.tokens)
    borders = [*row.cu_seqlens.tolist(), *range(row.tokens + PIECE, into.tokens, PIECE)]
    borders += [into.tokens] * (into.cu_seqlens.shape[0] - len(borders))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    for target, source in (
        (into.input_ids[:, : row.tokens], row.input_ids),
        (into.labels[:, : row.tokens], row.labels),
        (into.scored[: row.scored.shape[0]], row.scored),
        (into.tiles[: row.tiles.shape[0]], row.tiles),
        (into.cu_seqlens, cu_seqlens),
    ):
        # From pinned memory a copy waits for nothing. What is pinned stays as it is.
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


@dataclass
class _Captured:
    """Rows that stay, and the graph of a step over them once there is one."""

    room: Room
    rows: list[Batch]
    taken: int = 0
    graph: Any = None
    results: tuple[dict[str, Tensor], Tensor] = ({}, torch.zeros(()))


def make_step(objective: Objective, config: TrainConfig, device: torch.device, precision: torch.dtype) -> Step:
    """The step of a run: replayed where the recipe asks for it and there is a GPU, else as it comes.

    Raises:
        UserError: when several processes would replay: what they wait for one another for cannot be captured.
    """
    replays = config.graph and device.type == "cuda"
    if replays and processes.count() > 1:
        several = processes.count()
        raise UserError(f"graph: true is for one process, and {several} were launched: --set STAGE.graph=false")
    kind = ReplayedStep if replays else Step
    return kind(objective, config, device, precision)


def _roomy(size: int) -> int:
    """``size`` rounded up to a multiple of a sixteenth of the power of two above it."""
    unit = max(1, (1 << max(size - 1, 0).bit_length()) // 16)
    return -(-size // unit) * unit


def move(row: Batch, device: torch.device) -> Batch:
    """The row on ``device``, its lengths remembered so that no layer asks the device for them."""
    moved = row.to(device)
    if moved.cu_seqlens is not row.cu_seqlens:
        remember_lengths(moved.cu_seqlens, row.cu_seqlens.diff().tolist())
    return moved
