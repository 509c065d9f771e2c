"""Which samples each training step takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mmmamba.errors import UserError

# The first number of a random stream's seed says what the stream is for, so that no two uses share one.
_PERMUTATION, _SHUFFLE = 1, 2

#: Weights are rounded to this many slots, over which the sources alternate evenly.
_PERIOD = 1 << 16


class Order:
    """Which samples each step takes. This is a pure function of the step, so a resumed run needs only the step.

    Each source is read in epochs, each in a new permutation: no sample is repeated before all others of its source were
    used. Sources alternate evenly by weight (exact to 1 part in 65,536), and the samples of a step are shuffled.
    Indices run through the sources one after another, as in :class:`mmmamba.data.loader.Concatenated`.

    Args:
        sources: the number of samples, or (number of samples, weight) for each source. A weight is the source's share
            of all draws, relative to the other weights. None means its number of samples.
        seed: decides the order.
        batch_size: samples in a step.
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
        #: (P,) the source of each slot of a period, and how often it came before in the period; (S,) slots of each
        #: source.
        self._source, self._rank, self._share = _alternation(weights)
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def indices(self, step: int) -> list[int]:
        """The ``batch_size`` samples of ``step`` (0-based)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        period, slot = np.divmod(step * self.batch_size + np.arange(self.batch_size), len(self._source))
        source = self._source[slot]
        drawn = period * self._share[source] + self._rank[slot]  # how often the slot's source was drawn before
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
        """How many times each source has been read before ``step``, as fractions of epochs."""
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
    """How sources take turns: slot -> source, slot -> earlier turns of that source; turns of each source."""
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    wanted = np.array(weights) / sum(weights) * _PERIOD
    share = np.floor(wanted).astype(np.int64)
    share[(share == 0) & (wanted > 0)] = 1
    by_remainder = np.argsort(share - wanted, kind="stable")
    missing = _PERIOD - int(share.sum())
    if missing >= 0:
        share[by_remainder[:missing]] += 1
    else:  # take the turns of very rare sources from the most frequent one
        share[np.argmax(share)] += missing
    # Source s takes its j-th turn at (j + 1/2) / share[s] of the period.
    source = np.repeat(np.arange(len(weights)), share)
    rank = np.concatenate([np.arange(n) for n in share])
    order = np.argsort((rank + 0.5) / share[source], kind="stable")
    return source[order], rank[order], share
