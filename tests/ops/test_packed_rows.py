"""The tables of a packed row, from lengths of the host and from borders that only a device knows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.ops.packing import DeviceLayout, Layout

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)


def both(lengths: list[int]) -> tuple[Layout, DeviceLayout]:
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return Layout(lengths, borders.device), DeviceLayout(borders, sum(lengths), max(lengths))


@given(LENGTHS)
def test_a_device_finds_the_same_tables(lengths):
    host, device = both(lengths)
    assert (host.total, host.longest, host.sequences) == (device.total, device.longest, device.sequences)
    with pytest.raises(ValueError, match="without graph"):
        device.chunks(16)
    for name in ("sizes", "starts", "sequence", "offset", "last", "padded_slot"):
        assert torch.equal(getattr(host, name), getattr(device, name)), name


@given(LENGTHS, st.sampled_from([4, 16]))
def test_chunks_of_a_device_are_those_of_the_host_and_empty_ones(lengths, size):
    host, device = (layout.cuts(size) for layout in both(lengths))
    assert device.dtype == host.dtype
    assert torch.equal(device[: len(host)], host)
    spare = device[len(host) :]
    row, first, _, length = spare.T
    assert not length.any()
    assert bool((row >= len(lengths)).all())  # rows that no state has
    assert torch.equal(first, torch.arange(len(host), len(device), dtype=torch.int32))  # each its sequence's first


@pytest.mark.parametrize("segment", [0, 1, 2, 3])
def test_segments_begin_with_every_sequence_and_every_so_many_of_its_chunks(segment):
    lengths, size = [0, 5, 40, 1, 0, 33], 8
    expected, chunk = [], 0
    for length in lengths:
        chunks = max(-(-length // size), 1)
        expected += range(chunk, chunk + chunks, segment or chunks)
        chunk += chunks
    for known in both(lengths):
        found = known.begins(size, segment).tolist()
        assert [one for one in found if 0 <= one < chunk] == expected
        assert found[: len(expected)] == expected
