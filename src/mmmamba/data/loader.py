"""The steps of a run as micro-batches, prepared ahead by worker processes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, Protocol

import numpy as np

from mmmamba.data.packed_batch import Batch, pack, split
from mmmamba.data.processor import Encoded
from mmmamba.data.sample import BadSample
from mmmamba.data.sample_order import Order
from mmmamba.data.workers import ordered
from mmmamba.errors import UserError


class Source(Protocol):
    """Anything that returns encoded samples by index. A sample that cannot be used raises :class:`BadSample`."""

    def __len__(self) -> int: ...

    def encode(self, index: int) -> Encoded: ...


class Concatenated:
    """Several sources one after another, with the indices that :class:`Order` gives."""

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
    """What a worker sends back for one step. Errors are sent as values: if a worker raised them, they would lose their
    type.

    The step is sent as one batch, whatever the number of micro-batches: a few large arrays. :meth:`micro_batches`
    returns views of it.
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
                tile_counts=whole.tile_counts[first:last],
            )
            for (first, last), (first_tile, last_tile) in spans
        ]


class Loader:
    """The steps of a run, each as a list of micro-batches. They are the same for any number of workers.

    Iterating gives step ``start_step``, ``start_step`` + 1, … If all samples of a step are skipped, its list is empty.

    Args:
        dataset: where samples come from.
        order: which samples each step takes.
        start_step: the first step (a resumed run starts where it stopped).
        end_step: the step to stop before; None never stops.
        max_tokens: most tokens in a micro-batch; None puts the whole step into one.
        workers: processes that prepare steps ahead; 0 prepares them in this process, when they are asked for.
        on_bad_sample: ``stop`` raises the first bad sample's error; ``skip`` leaves the sample out of its step.
        pin_memory: put batches into page-locked memory, for copies to a GPU.
        prefetch: steps that each worker prepares ahead.

    Attributes:
        bad_samples: what was skipped so far, each sample once.
        skipped: how many samples were skipped, in the steps returned so far.
        truncated: how many samples were cut to fit, in the steps returned so far.
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
