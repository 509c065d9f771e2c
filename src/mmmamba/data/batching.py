"""Encoded samples to batches: which samples a step takes, how they are packed, and the workers that prepare them."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mmmamba.data.processor import UNSCORED, Encoded
from mmmamba.data.samples import BadSample
from mmmamba.data.workers import ordered
from mmmamba.errors import UserError

# The first number of a random stream's seed says what the stream is for, so that no two uses share one.
_PERMUTATION, _SHUFFLE = 1, 2

#: Weights are rounded to this many slots, over which the sources alternate evenly.
_PERIOD = 1 << 16


# ---------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Several sequences in one row.

    Attributes:
        input_ids: int64 (1, total)
        labels: int64 (1, total), unshifted, -100 where unscored.
        cu_seqlens: int32 (s+1,), where each sequence starts and the last one ends.
        tiles: uint8 (t, H, W, 3) of all sequences, in order.
        ids: the samples' ids (s).
        scored: int64 (k,), the tokens whose next one is scored; found in the labels when absent, on the host before a
            row moves, so that no pass has to wait for a device's count.
        real: int64 (), how many of the row's tokens are real, where padding stands behind them (None: all).
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    tiles: Tensor
    ids: list[str]
    scored: Tensor = None  # type: ignore[assignment]  # found below
    real: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scored is None:
            self.scored = (self.labels[0, 1:] != UNSCORED).nonzero()[:, 0]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def sequences(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        """As arrays: PyTorch would pickle a tensor as a name in shared memory, of which there may be too little."""
        return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            self.__dict__[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            tiles=self.tiles.to(device, non_blocking=non_blocking),
            scored=self.scored.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Page-locked copies, from which a GPU reads without waiting."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
            tiles=self.tiles.pin_memory(),
            scored=self.scored.pin_memory(),
        )


def pack(samples: Sequence[Encoded]) -> Batch:
    """One row of all samples, nothing padded."""
    if not samples:
        raise ValueError("nothing to pack")
    starts = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum([len(sample.input_ids) for sample in samples], out=starts[1:])
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([s.input_ids for s in samples], dtype=np.int64)[None]),
        labels=torch.from_numpy(np.concatenate([s.labels for s in samples], dtype=np.int64)[None]),
        cu_seqlens=torch.from_numpy(starts),
        tiles=torch.from_numpy(np.concatenate([s.tiles for s in samples])),
        ids=[sample.id for sample in samples],
    )


def pad(samples: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """The samples as rows of equal length.

    Returns:
        input_ids int64 (b,l), attention_mask int64 (b,l) with 1 on real tokens, labels int64 (b,l),
        tiles uint8 (t,H,W,3)
    """
    if not samples:
        raise ValueError("nothing to pad")
    shape = len(samples), max(len(sample.input_ids) for sample in samples)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, UNSCORED, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        span = slice(0, length) if side == "right" else slice(shape[1] - length, shape[1])
        ids[row, span], labels[row, span], mask[row, span] = sample.input_ids, sample.labels, 1
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "tiles": torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
    }


def split(samples: Sequence[Encoded], max_tokens: int | None) -> list[list[Encoded]]:
    """Runs of samples, in order, of at most ``max_tokens`` tokens each (a longer sample stands alone).

    There are as few runs as that allows, and they are of nearly one length: a replayed row is padded to the longest.
    """
    if max_tokens is None:
        return [list(samples)] if samples else []
    groups = _runs(samples, max_tokens)
    low, high = 1, max_tokens  # the least room that needs no more runs lies in (low - 1, high]
    while low < high:
        middle = (low + high) // 2
        if len(_runs(samples, middle)) > len(groups):
            low = middle + 1
        else:
            high = middle
    return _runs(samples, high)


def _runs(samples: Sequence[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """Runs of samples, in order, each as long as ``max_tokens`` allows."""
    groups: list[list[Encoded]] = []
    room = -1
    for sample in samples:
        length = len(sample.input_ids)
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(sample)
        room -= length
    return groups


# ---------------------------------------------------------------------------------------------- order


class Order:
    """Which samples each step takes: a pure function of the step, so that resuming needs the step alone.

    Each source is walked in epochs, in a fresh permutation each time: no sample comes again before every other one of
    its source has come. Sources alternate evenly by weight (fixed to 1 part in 65,536), and the samples of a step are
    shuffled. Indices count through the sources one after another, as :class:`Concatenated` does.

    Args:
        sources: the number of samples, or one (number of samples, weight) for each source. A weight is the source's
            share of all draws, relative to the other weights; None stands for its number of samples.
        seed: another seed, another order.
        batch_size: samples a step.
    """

    def __init__(self, sources: int | Sequence[tuple[int, float | None]], *, seed: int = 0, batch_size: int) -> None:
        pairs = [(sources, None)] if isinstance(sources, int) else list(sources)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        weights = [float(size if weight is None else weight) for size, weight in pairs]
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            raise UserError(f"source weights must be non-negative and not all zero, got {weights}")
        empty = [i for i, (size, _) in enumerate(pairs) if size < 1 and (weights[i] > 0)]
        if empty:
            raise UserError(f"source {empty[0]} has no samples")
        self.sizes = tuple(size for size, _ in pairs)
        self.seed = seed
        self.batch_size = batch_size
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])[:-1]
        #: (P,) source of each slot of a period, and how often it has come before in the period; (S,) slots a period.
        self._source, self._rank, self._share = _alternation(weights)
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def indices(self, step: int) -> list[int]:
        """The ``batch_size`` samples of ``step`` (0-based)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        period, slot = np.divmod(step * self.batch_size + np.arange(self.batch_size), len(self._source))
        source = self._source[slot]
        drawn = period * self._share[source] + self._rank[slot]  # how often each slot's source was drawn before it
        result = np.empty(self.batch_size, dtype=np.int64)
        for s in np.unique(source):
            mine = np.flatnonzero(source == s)
            epoch, position = np.divmod(drawn[mine], self.sizes[s])
            for e in np.unique(epoch):
                now = epoch == e
                result[mine[now]] = self._permutation(int(s), int(e))[position[now]] + self._first[s]
        if len(self.sizes) > 1:
            result = self._random(_SHUFFLE, step).permutation(result)
        return result.tolist()

    def epochs(self, step: int) -> list[float]:
        """How many times each source has been gone through before ``step``."""
        period, slot = divmod(step * self.batch_size, len(self._source))
        now = np.bincount(self._source[:slot], minlength=len(self.sizes))
        return [
            float(period * share + part) / max(n, 1)
            for share, part, n in zip(self._share, now, self.sizes, strict=True)
        ]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_permutations": OrderedDict()}

    def _random(self, *stream: int) -> np.random.Generator:
        kind, *rest = stream
        return np.random.Generator(np.random.PCG64([kind, self.seed, *rest]))

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        key = source, epoch
        if key not in self._permutations:
            self._permutations[key] = self._random(_PERMUTATION, source, epoch).permutation(self.sizes[source])
            if len(self._permutations) > 2 * len(self.sizes):  # a step can straddle two epochs of each source
                self._permutations.popitem(last=False)
        self._permutations.move_to_end(key)
        return self._permutations[key]


def _alternation(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order in which sources take turns: slot -> source, slot -> earlier turns of that source, turns a period."""
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    wanted = np.array(weights) / sum(weights) * _PERIOD
    share = np.floor(wanted).astype(np.int64)
    share[(share == 0) & (wanted > 0)] = 1
    by_remainder = np.argsort(share - wanted, kind="stable")
    missing = _PERIOD - int(share.sum())
    if missing >= 0:
        share[by_remainder[:missing]] += 1
    else:  # the turns given to very rare sources are taken from the commonest one
        share[np.argmax(share)] += missing
    # Source s takes its j-th turn at (j + 1/2) / share[s] of the period.
    source = np.repeat(np.arange(len(weights)), share)
    rank = np.concatenate([np.arange(n) for n in share])
    order = np.argsort((rank + 0.5) / share[source], kind="stable")
    return source[order], rank[order], share


# ---------------------------------------------------------------------------------------------- loading


class Source(Protocol):
    """Anything that gives encoded samples by index; an unusable one raises :class:`BadSample`."""

    def __len__(self) -> int: ...

    def encode(self, index: int) -> Encoded: ...


class Concatenated:
    """Several sources one after another, as :class:`Order` counts them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def encode(self, index: int) -> Encoded:
        which = bisect_right(self._ends, index)
        return self.sources[which].encode(index - (self._ends[which - 1] if which else 0))


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, and why."""

    index: int
    where: str
    reason: str


@dataclass
class _Step:
    """What a worker sends back for one step. Errors travel as values: raised in a worker they would lose their type.

    The step is one batch whatever the number of micro-batches: a few large arrays, of which
    :meth:`micro_batches` are views.
    """

    batch: Batch | None
    sequences: list[int] = field(default_factory=list)  # where each micro-batch starts, and the end
    tiles: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    cut: int = 0
    error: UserError | None = None

    def pin_memory(self) -> _Step:
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())

    def micro_batches(self) -> list[Batch]:
        if self.batch is None:
            return []
        whole, starts = self.batch, self.batch.cu_seqlens.tolist()
        spans = zip(pairwise(self.sequences), pairwise(self.tiles), strict=True)
        return [
            Batch(
                input_ids=whole.input_ids[:, starts[first] : starts[last]],
                labels=whole.labels[:, starts[first] : starts[last]],
                cu_seqlens=whole.cu_seqlens[first : last + 1] - starts[first],
                tiles=whole.tiles[first_tile:last_tile],
                ids=whole.ids[first:last],
            )
            for (first, last), (first_tile, last_tile) in spans
        ]


class Loader:
    """The steps of a run, each as a list of micro-batches; the same ones for any number of workers.

    Iterating gives step ``start_step``, ``start_step`` + 1, … A step whose samples are all skipped is an empty list.

    Args:
        dataset: where samples come from.
        order: which samples each step takes.
        start_step: the first step (a resumed run starts where it stopped).
        end_step: the step to stop before; None goes on for ever.
        max_tokens: token budget of a micro-batch; None puts the whole step into one.
        workers: processes that prepare steps ahead; 0 prepares them in this one, when asked.
        on_bad_sample: ``stop`` raises the first bad sample's error; ``skip`` leaves it out of its step.
        pin_memory: page-locked batches, for copies to a GPU.
        prefetch: steps that each worker prepares ahead.

    Attributes:
        bad_samples: what was skipped so far, each sample once.
        skipped: how many samples of the steps given out were skipped.
        truncated: how many samples of the steps given out were cut to fit.
    """

    def __init__(
        self,
        dataset: Source,
        order: Order,
        *,
        start_step: int = 0,
        end_step: int | None = None,
        max_tokens: int | None = None,
        workers: int = 0,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise UserError(f"on_bad_sample must be 'stop' or 'skip', got '{on_bad_sample}'")
        if sum(order.sizes) != len(dataset):
            raise ValueError(f"the order is over {sum(order.sizes)} samples, the dataset has {len(dataset)}")
        self._steps = _Steps(dataset, order, max_tokens, on_bad_sample)
        self.start_step = start_step
        self.end_step = end_step
        self.workers = workers
        self.pin_memory = pin_memory
        self.prefetch = prefetch
        self.skipped = 0
        self.truncated = 0
        self._bad: dict[int, Skipped] = {}

    @property
    def bad_samples(self) -> list[Skipped]:
        return list(self._bad.values())

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = ordered(
            self._steps.__getitem__,
            self.start_step,
            self.end_step,
            workers=self.workers,
            ahead=self.prefetch,
            receive=_Step.pin_memory if self.pin_memory else None,
        )
        with closing(steps):
            for step in steps:
                if step.error is not None:
                    raise step.error
                self.skipped += len(step.skipped)
                self.truncated += step.cut
                self._bad.update((bad.index, bad) for bad in step.skipped)
                yield step.micro_batches()


class _Steps:
    """Step number -> the step's micro-batches."""

    def __init__(self, source: Source, order: Order, max_tokens: int | None, on_bad_sample: str) -> None:
        self.source = source
        self.order = order
        self.max_tokens = max_tokens
        self.skip = on_bad_sample == "skip"

    def __getitem__(self, step: int) -> _Step:
        samples: list[Encoded] = []
        skipped: list[Skipped] = []
        for index in self.order.indices(step):
            try:
                samples.append(self.source.encode(index))
            except BadSample as error:
                if not self.skip:
                    return _Step(None, error=error)
                where, _, reason = str(error).partition(": ")
                skipped.append(Skipped(index, where, reason))
            except UserError as error:
                return _Step(None, error=error)
        if not samples:
            return _Step(None, skipped=skipped)
        groups = split(samples, self.max_tokens)
        return _Step(
            batch=pack(samples),
            sequences=list(accumulate((len(group) for group in groups), initial=0)),
            tiles=list(accumulate((sum(len(sample.tiles) for sample in group) for group in groups), initial=0)),
            skipped=skipped,
            cut=sum(sample.cut > 0 for sample in samples),
        )
