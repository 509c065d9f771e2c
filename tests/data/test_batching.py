"""Packing, padding, the deterministic order, and a loader that does not depend on its workers."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.data.batching import Batch, Concatenated, Loader, Order, pack, pad, split
from mmmamba.data.processor import Encoded
from mmmamba.data.samples import BadSample
from mmmamba.errors import UserError


def make_encoded(seed: int) -> Encoded:
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 30))
    ids = random.integers(0, 300, length).astype(np.int32)
    labels = np.where(random.random(length) < 0.5, ids, -100).astype(np.int32)
    tiles = random.integers(0, 256, (int(random.integers(0, 3)), 4, 4, 3)).astype(np.uint8)
    return Encoded(ids, labels, tiles, id=f"id{seed}", where=f"file.jsonl:{seed}")


class Numbers:
    """A source of random samples, some of them bad."""

    def __init__(self, size: int, bad: tuple[int, ...] = (), broken: tuple[int, ...] = (), offset: int = 0) -> None:
        self.size, self.bad, self.broken, self.offset = size, bad, broken, offset

    def __len__(self) -> int:
        return self.size

    def encode(self, index: int) -> Encoded:
        if index in self.bad:
            raise BadSample(f"file.jsonl:{index}: 'image': no such file")
        if index in self.broken:
            raise UserError("the disk is gone")
        encoded = make_encoded(index + self.offset)
        encoded.cut = index % 2
        return encoded


def equal(a: Batch, b: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "cu_seqlens", "tiles")
    )
    return tensors and a.ids == b.ids


seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_pack_round_trip(seeds):
    samples = [make_encoded(seed) for seed in seeds]
    batch = pack(samples)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.shape == batch.labels.shape == (1, batch.tokens)
    assert (batch.tokens, batch.sequences) == (sum(len(s.input_ids) for s in samples), len(samples))
    tile = 0
    for i, sample in enumerate(samples):
        start, stop = batch.cu_seqlens[i : i + 2].tolist()
        assert batch.input_ids[0, start:stop].tolist() == sample.input_ids.tolist()
        assert batch.labels[0, start:stop].tolist() == sample.labels.tolist()
        assert (batch.tiles[tile : tile + len(sample.tiles)].numpy() == sample.tiles).all()
        tile += len(sample.tiles)
    assert tile == len(batch.tiles) and batch.tiles.dtype == torch.uint8
    assert batch.ids == [sample.id for sample in samples]


@settings(max_examples=50, deadline=None)
@given(seeds, st.sampled_from(["left", "right"]))
def test_pad_round_trip(seeds, side):
    samples = [make_encoded(seed) for seed in seeds]
    batch = pad(samples, 299, side)
    for row, sample in enumerate(samples):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == sample.input_ids.tolist()
        assert batch["labels"][row][real].tolist() == sample.labels.tolist()
        assert (batch["input_ids"][row][~real] == 299).all() and (batch["labels"][row][~real] == -100).all()
        assert real[0 if side == "right" else -1]
    assert len(batch["tiles"]) == sum(len(sample.tiles) for sample in samples)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 60))
def test_split_keeps_order_and_budget(seeds, budget):
    samples = [make_encoded(seed) for seed in seeds]
    groups = split(samples, budget)
    assert [sample for group in groups for sample in group] == samples
    for group in groups:
        assert group and (len(group) == 1 or sum(len(sample.input_ids) for sample in group) <= budget)
    # As few runs as runs filled one after another, none of which could be shorter without another run.
    assert len(groups) == len(runs(samples, budget))
    longest = max((tokens(group) for group in groups if len(group) > 1), default=0)
    assert longest <= budget and (not longest or len(runs(samples, longest - 1)) > len(groups))
    assert split(samples, None) == [samples] and split([], None) == split([], 5) == []


def tokens(group):
    return sum(len(sample.input_ids) for sample in group)


def runs(samples, budget):
    groups = []
    for sample in samples:
        if not groups or tokens([*groups[-1], sample]) > budget:
            groups.append([])
        groups[-1].append(sample)
    return groups


def test_rows_of_a_step_are_of_nearly_one_length():
    samples = [make_encoded(seed) for seed in range(40)]
    groups = split(samples, tokens(samples) * 3 // 4)
    assert len(groups) == 2
    assert abs(tokens(groups[0]) - tokens(groups[1])) <= max(len(sample.input_ids) for sample in samples)


def test_nothing_to_batch():
    for make in (pack, lambda samples: pad(samples, 0)):
        with pytest.raises(ValueError, match="nothing to"):
            make([])


def test_batch_moves():
    batch = pack([make_encoded(1), make_encoded(2)])
    assert equal(batch.to("cpu"), batch) and batch.to("meta").tiles.device.type == "meta"


# ---------------------------------------------------------------------------------------------- order


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


# ---------------------------------------------------------------------------------------------- loader


def make_loader(source=None, **options) -> Loader:
    source = source or Numbers(40)
    return Loader(source, Order(len(source), seed=5, batch_size=8), **{"end_step": 6, **options})


def test_concatenated_sources():
    both = Concatenated([Numbers(3), Numbers(0), Numbers(4, offset=100)])
    assert len(both) == 7
    assert [both.encode(i).id for i in range(7)] == ["id0", "id1", "id2", "id100", "id101", "id102", "id103"]
    assert len(Concatenated([])) == 0


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_workers_change_nothing(max_tokens):
    alone = list(make_loader(max_tokens=max_tokens))
    shared = list(make_loader(max_tokens=max_tokens, workers=2))
    assert len(alone) == len(shared) == 6
    for a, b in zip(alone, shared, strict=True):
        assert len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def test_micro_batches_hold_the_step():
    order, source = Order(40, seed=5, batch_size=8), Numbers(40)
    for step, micro in enumerate(make_loader(max_tokens=40)):
        groups = split([source.encode(index) for index in order.indices(step)], 40)
        assert len(micro) == len(groups) > 1
        assert all(equal(batch, pack(group)) for batch, group in zip(micro, groups, strict=True))
        assert all(batch.cu_seqlens[0] == 0 and batch.input_ids.is_contiguous() for batch in micro)


def test_resumes_at_any_step():
    steps = list(make_loader())
    resumed = list(make_loader(start_step=4))
    assert len(resumed) == 2 and all(equal(a[0], b[0]) for a, b in zip(steps[4:], resumed, strict=True))


def test_goes_on_for_ever():
    steps = iter(make_loader(end_step=None))
    assert sum(len(next(steps)) for _ in range(20)) == 20


def test_loading_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(make_loader())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_raises_the_sample_s_own_error(workers):
    order = Order(40, seed=5, batch_size=8)
    bad = order.indices(2)[3]
    steps = iter(make_loader(Numbers(40, bad=(bad,)), workers=workers))
    assert next(steps) and next(steps)
    with pytest.raises(BadSample) as caught:
        next(steps)
    assert str(caught.value) == f"file.jsonl:{bad}: 'image': no such file"


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_and_lists(workers):
    bad = tuple(Order(40, seed=5, batch_size=8).indices(1))
    loader = make_loader(Numbers(40, bad=bad), workers=workers, on_bad_sample="skip", end_step=10)
    steps = list(loader)
    assert steps[1] == [] and steps[0][0].sequences == 8  # the first epoch ends after step 4
    assert sum(batch.sequences for step in steps for batch in step) == 64
    assert loader.skipped == 16 and len(loader.bad_samples) == 8
    assert sorted(skipped.index for skipped in loader.bad_samples) == sorted(bad)
    first = loader.bad_samples[0]
    assert (first.where, first.reason) == (f"file.jsonl:{first.index}", "'image': no such file")
    assert loader.truncated == 2 * sum(index % 2 for index in range(40) if index not in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_never_skipped(workers):
    loader = make_loader(Numbers(40, broken=tuple(range(40))), on_bad_sample="skip", workers=workers)
    with pytest.raises(UserError, match=r"^the disk is gone$"):
        list(loader)


def test_wrong_options():
    with pytest.raises(UserError, match="'stop' or 'skip'"):
        make_loader(on_bad_sample="ignore")
    with pytest.raises(ValueError, match="order is over 5 samples, the dataset has 40"):
        Loader(Numbers(40), Order(5, batch_size=2))
