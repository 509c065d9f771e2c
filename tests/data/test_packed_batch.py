"""Packing and padding lose nothing, and rows keep to their token budget."""

from __future__ import annotations

import pytest
import torch
from encoded_samples import equal, make_encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.data.packed_batch import pack, pad, split

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
