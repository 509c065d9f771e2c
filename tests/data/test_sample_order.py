"""The order of samples: fixed by seed and step, every sample once an epoch, sources by their weights."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.data.sample_order import Order
from mmmamba.errors import UserError


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60), batch=st.integers(1, 80), seed=st.integers(0, 2**40))
def test_every_sample_once_an_epoch(size, batch, seed):
    order = Order(size, seed=seed, batch_size=batch)
    steps = 3 * size // batch + 1
    drawn = [index for step in range(steps) for index in order.indices(step)]
    for epoch in range(len(drawn) // size):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([None, 0.0, 0.01, 1, 2.5, 100])), min_size=2, max_size=5
    ),
    batch=st.integers(1, 40),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_mixtures(sources, batch, seed):
    """Shares are as asked at any point, each source is walked in epochs, and a step depends on nothing before it."""
    weights = np.array([size if weight is None else weight for size, weight in sources], dtype=float)
    if weights.sum() == 0:
        sources[0], weights[0] = (sources[0][0], 1.0), 1.0
    order = Order(sources, seed=seed, batch_size=batch)
    steps = [order.indices(step) for step in range(12)]
    firsts = np.cumsum([0, *(size for size, _ in sources)])
    drawn = np.zeros(len(sources), int)
    history: list[list[int]] = [[] for _ in sources]
    for step in steps:
        assert len(step) == batch
        for index in step:
            source = int(np.searchsorted(firsts, index, side="right")) - 1
            history[source].append(index - firsts[source])
            drawn[source] += 1
        assert np.abs(drawn - drawn.sum() * weights / weights.sum()).max() <= len(sources)
    for rows, (size, _) in zip(history, sources, strict=True):
        counts = Counter(rows)
        assert not rows or max(counts.values()) - min(counts.get(row, 0) for row in range(size)) <= 1
    fresh = Order(sources, seed=seed, batch_size=batch)
    for step in (11, 3, 7, 0):
        assert fresh.indices(step) == steps[step]
    assert order.epochs(12) == pytest.approx([n / size for n, (size, _) in zip(drawn, sources, strict=True)])


def test_order_is_stable():
    """A resumed run must find the order it began with: these values may not change."""
    assert Order(10, seed=0, batch_size=4).indices(0) == [8, 4, 7, 0]
    assert Order([(5, 1), (7, 3)], seed=3, batch_size=6).indices(5) == [11, 0, 10, 6, 9, 7]


def test_other_seed_other_order():
    assert Order(100, seed=0, batch_size=50).indices(0) != Order(100, seed=1, batch_size=50).indices(0)
    order = Order(100, seed=0, batch_size=100)
    assert order.indices(0) != order.indices(1)


def test_order_far_out_and_pickled():
    order = Order([(1000, 1), (10, 1)], seed=1, batch_size=64)
    assert len(order.indices(10**7)) == 64
    assert pickle.loads(pickle.dumps(order)).indices(9) == order.indices(9)


@pytest.mark.parametrize("sources, options, reason", [
    (0, {}, "not all zero"), ([(5, 0)], {}, "not all zero"), ([(5, -1), (5, 2)], {}, "non-negative"),
    ([(5, float("nan"))], {}, "non-negative"), ([], {}, "not all zero"), ([(5, 1), (0, 1)], {}, "source 1 has no"),
    (5, {"batch_size": 0}, "batch_size must be at least 1"), (5, {"seed": -1}, "seed must not be negative"),
])  # fmt: skip
def test_impossible_orders(sources, options, reason):
    with pytest.raises(UserError, match=reason):
        Order(sources, **{"batch_size": 2, **options})


def test_negative_step():
    with pytest.raises(ValueError, match="negative"):
        Order(5, batch_size=2).indices(-1)
