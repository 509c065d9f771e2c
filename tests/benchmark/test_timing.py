"""Samples become figures, and a call that takes long is not repeated. No test asks how fast anything is."""

from __future__ import annotations

import pytest
import torch

from mmmamba.benchmark.timing import MOST, Clock, quantile, timing


class Counted(Clock):
    """A clock on which the calls take what a list says, the last one again and again."""

    def __init__(self, *milliseconds: float) -> None:
        super().__init__(torch.device("cpu"))
        self.milliseconds, self.calls = list(milliseconds), 0

    def once(self, call):
        call()
        self.calls += 1
        return self.milliseconds.pop(0) if len(self.milliseconds) > 1 else self.milliseconds[0]


def test_quantiles_lie_between_their_neighbours():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([5.0], 0.99) == 5.0
    assert quantile(list(range(101)), 0.9) == pytest.approx(90)


def test_figures_of_samples():
    found = timing([4.0, 1.0, 3.0, 2.0, 5.0], [9.0, 6.0])
    assert (found.low, found.ms, found.high) == (2.0, 3.0, 4.0)
    assert (found.cold, found.warm_up, found.samples) == (9.0, 15.0, 5)
    assert found.high <= found.p90 <= found.p99 <= 5.0


def test_the_first_calls_do_not_count():
    clock = Counted(500.0, 100.0, 10.0)
    found = clock.time(lambda: None, seconds=0.1, warm_up=2)
    assert (found.cold, found.ms, found.samples) == (500.0, 10.0, 10)
    assert clock.calls == 12


def test_a_fast_call_is_sampled_often_enough_and_not_for_ever():
    assert Counted(1e-6).time(lambda: None, seconds=1.0).samples == MOST
    assert Counted(900.0).time(lambda: None, seconds=0.1, least=3).samples == 3


def test_a_slow_call_is_made_once():
    clock = Counted(8_000.0)
    found = clock.time(lambda: None, seconds=1.0, warm_up=4, longest=10.0)
    assert clock.calls == 1
    assert (found.ms, found.cold, found.samples) == (8_000.0, 8_000.0, 1)


def test_calls_in_a_row_are_as_many_as_are_wanted():
    class InRows(Counted):
        def __init__(self, *milliseconds: float) -> None:
            super().__init__(*milliseconds)
            self.rows: list[int] = []

        def in_a_row(self, call, count):
            self.rows.append(count)
            return super().in_a_row(call, count)

    clock = InRows(10.0)
    assert clock.time(lambda: None, seconds=0.4, ahead=16, warm_up=2).samples == 40
    assert clock.rows == [16, 16, 7] and clock.calls == 42


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_is_ahead():
    """What the host takes to launch a call is not part of it where the GPU has other work meanwhile."""
    clock, x = Clock(torch.device("cuda")), torch.ones(8192, 8192, device="cuda")
    waited = clock.time(lambda: x @ x, seconds=1.0)
    ahead = clock.time(lambda: x @ x, seconds=1.0, ahead=8)
    assert ahead.samples > 1 and waited.samples > 1
    assert 0 < ahead.low < 1.2 * waited.low  # the best of each: other tests may share the GPU


def test_a_clock_runs_what_it_times():
    seen = []
    found = Clock(torch.device("cpu")).time(lambda: seen.append(1), seconds=0.0, warm_up=1, least=3)
    assert len(seen) == 4 and found.samples == 3 and found.ms >= 0
