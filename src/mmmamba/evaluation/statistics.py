"""Intervals and ratios: how sure a score is, and how much of the teacher a student keeps.

All functions take plain arrays of per-unit scores in [0, 1]. A unit is a question (for MME, the pair of questions of an
image). The bootstrap draws the same units for both models (paired), from a seeded generator: the same input gives the
same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: float, n: int, z: float = Z95) -> Interval:
    """Wilson's interval of a proportion: sensible near 0 and 1, unlike a normal one. n = 0: all of [0, 1]."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    share = correct / n
    spread = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / spread
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / spread
    # At 0 and 1 the bound equals the share; rounding must not put it a hair inside.
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def proportion(scores: Sequence[float], seed: int = 0) -> Interval:
    """Mean score with its interval: Wilson's for right/wrong scores, the bootstrap's for soft ones (VQA)."""
    values = np.asarray(scores, dtype=float)
    if np.all((values == 0) | (values == 1)):
        return wilson(float(values.sum()), len(values))
    return _percentiles(float(values.mean()), _resampled(values, seed=seed)[0])


def retention(student: Sequence[float], teacher: Sequence[float], seed: int = 0) -> Interval | None:
    """min(student / teacher, 1) with its paired bootstrap interval; None where the teacher scores 0."""
    s, t = _paired(student, teacher)
    if len(t) == 0 or t.mean() == 0:
        return None
    drawn = _capped_ratio(*_resampled(s, t, seed=seed))
    return _percentiles(min(float(s.mean() / t.mean()), 1.0), drawn[~np.isnan(drawn)])


def mean_retention(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Interval | None:
    """Mean over abilities of the capped retention; every ability counts equally, however many questions it has.

    ``pairs``: (student, teacher) per ability. Abilities in which the teacher scores 0 are left out.
    """
    kept = [_paired(s, t) for s, t in pairs if len(t) and np.mean(t) > 0]
    if not kept:
        return None
    value = float(np.mean([min(s.mean() / t.mean(), 1.0) for s, t in kept]))
    drawn = np.stack([_capped_ratio(*_resampled(s, t, seed=seed + i)) for i, (s, t) in enumerate(kept)])
    return _percentiles(value, drawn[:, ~np.isnan(drawn).any(axis=0)].mean(axis=0))


def mean_of(parts: Sequence[Interval]) -> Interval:
    """Mean of independent values, which count equally, with the interval that their intervals give.

    Distances to each side add in squares (the MOVER rule). Unlike a bootstrap it does not claim certainty when every
    answer was right.
    """
    value = sum(part.value for part in parts) / len(parts)
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return Interval(value, max(value - below, 0.0), min(value + above, 1.0))


def chance_corrected(student: float, teacher: float, chance: float) -> float | None:
    """(student − chance) / (teacher − chance), clipped to [0, 1]; None where the teacher is no better than chance."""
    if teacher <= chance:
        return None
    return min(max((student - chance) / (teacher - chance), 0.0), 1.0)


def _paired(student: Sequence[float], teacher: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(student) != len(teacher):
        raise ValueError(f"paired scores differ in number: {len(student)} and {len(teacher)}")
    return np.asarray(student, dtype=float), np.asarray(teacher, dtype=float)


def _resampled(*columns: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Per column (n,) its bootstrap means (RESAMPLES,): the same rows are drawn for every column."""
    n = len(columns[0])
    random = np.random.default_rng(seed)
    means = np.empty((len(columns), RESAMPLES))
    chunk = max(1, 2_000_000 // n)  # resamples at a time: bounded memory for large sets
    for start in range(0, RESAMPLES, chunk):
        rows = random.integers(0, n, size=(min(chunk, RESAMPLES - start), n), dtype=np.int32)
        for column, mean in zip(columns, means, strict=True):
            mean[start : start + len(rows)] = column[rows].mean(axis=1)
    return tuple(means)


def _capped_ratio(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """min(s / t, 1), NaN where t is 0."""
    return np.minimum(np.divide(s, t, out=np.full_like(s, np.nan), where=t > 0), 1.0)


def _percentiles(value: float, drawn: np.ndarray) -> Interval:
    """Percentile interval. It always includes the point estimate, which few units can put just outside."""
    if len(drawn) == 0:
        return Interval(value, 0.0, 1.0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value))
