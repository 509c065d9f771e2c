"""Measure how long a call takes: the first time, and when it is repeated."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Calls before the first sample. On a GPU the first call compiles and the third captures a graph.
WARM_UP = {"cuda": 4, "cpu": 1}
MOST = 200  # samples of one timing


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of a repeated call, in milliseconds.

    Attributes:
        ms: the median of the samples.
        low, high: the quartiles around it.
        p90, p99: percentiles: one call in ten, one in a hundred takes longer.
        cold: the very first call, with the compilation, tuning and allocation that it needs.
        warm_up: all calls before the samples together, the first one included.
        samples: number of timed calls.
    """

    ms: float
    low: float
    high: float
    p90: float
    p99: float
    cold: float
    warm_up: float
    samples: int


class Clock:
    """Times calls on a device: by events on a GPU, elsewhere by wall-clock time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call, until it has finished."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            if self.device.type == "mps":
                torch.mps.synchronize()
            return (time.perf_counter() - started) * 1e3
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))

    def in_a_row(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds from the end of each call to that of the next, ``count`` of them, the last one waited for.

        On a GPU the host runs ahead as far as it can: the time to launch a call counts only where the GPU has to wait
        for it.
        """
        if self.device.type != "cuda":
            return [self.once(call) for _ in range(count)]
        with torch.cuda.device(self.device):
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            for end in ends:
                call()
                end.record()
            ends[-1].synchronize()
        return [float(one.elapsed_time(other)) for one, other in itertools.pairwise(ends)]

    def time(
        self,
        call: Callable[[], object],
        *,
        seconds: float,
        ahead: int = 1,
        warm_up: int | None = None,
        least: int = 3,
        longest: float = math.inf,
    ) -> Timing:
        """Time a call until about ``seconds`` of samples are taken: at least ``least`` of them, at most :data:`MOST`.

        Args:
            call: what to time.
            seconds: how long to sample.
            ahead: calls that are launched before one is waited for (:meth:`in_a_row`); with 1, each is waited for.
            warm_up: calls before the samples, at least 1. Default: what :data:`WARM_UP` says.
            least: fewest samples.
            longest: seconds after which no further call is begun, even if ``warm_up`` and ``least`` ask for more. If
                there is no sample by then, the warm-up calls are the samples.
        """
        if warm_up is None:
            warm_up = WARM_UP["cuda" if self.device.type == "cuda" else "cpu"]
        before: list[float] = []
        samples: list[float] = []
        spent, wanted = 0.0, MOST
        while len(before) < warm_up and spent + (before[-1] if before else 0.0) <= longest * 1e3:
            before.append(self.once(call))
            spent += before[-1]
        while len(samples) < wanted:
            expected = samples[-1] if samples else before[-1]
            if spent + expected > longest * 1e3:
                break
            more = min(ahead, wanted - len(samples)) if samples else 1
            new = [self.once(call)] if more == 1 else self.in_a_row(call, more)
            samples += new
            spent += sum(new)
            if len(samples) == 1:
                wanted = int(min(max(seconds * 1e3 / max(samples[0], 1e-3), least), MOST))
        return timing(samples or before, before)


def timing(samples: Sequence[float], before: Sequence[float]) -> Timing:
    """The figures of some samples and the calls ``before`` them (milliseconds, at least one of each)."""
    return Timing(
        ms=quantile(samples, 0.5),
        low=quantile(samples, 0.25),
        high=quantile(samples, 0.75),
        p90=quantile(samples, 0.9),
        p99=quantile(samples, 0.99),
        cold=before[0],
        warm_up=sum(before),
        samples=len(samples),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values are below, interpolated between its two neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
