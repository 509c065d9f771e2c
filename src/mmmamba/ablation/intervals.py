"""Intervals of a mean over a few seeds: Student's t, which allows for how little a few runs say about their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmmamba.evaluation.statistics import Z95, Interval

# The 97.5 % quantiles of Student's t for 1, 2, … 30 degrees of freedom (any table has them).
T975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile for ``degrees`` of freedom; above 30 from a series around the normal quantile."""
    if degrees <= len(T975):
        return T975[degrees - 1]
    z, n = Z95, degrees
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)


def t_interval(values: Sequence[float]) -> Interval:
    """The mean with its 95 % t interval, mean ± t · s / √n; of a single value it is infinite."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Mean of ours − theirs over the seeds that both have, paired: a seed gives both the same samples in one order."""
    both = sorted(set(ours) & set(theirs))
    return t_interval([ours[seed] - theirs[seed] for seed in both]) if both else None


def verdict(gain: Interval | None) -> str:
    """Whether the interval of a gain confirms or contradicts that there is one."""
    if gain is None:
        return "not measured"
    if math.isinf(gain.low):
        return "undecided (one seed)"
    return "confirmed" if gain.low > 0 else "contradicted" if gain.high < 0 else "undecided"
