"""The tables of a packed row, from lengths of the host and from borders that only a device knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.ops.causal_conv.launch import causal_conv
from mmmamba.ops.gated_delta.launch import gated_delta
from mmmamba.ops.packing import DeviceLayout, Layout, remember_bounds
from mmmamba.ops.ssd.launch import ssd

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
    assert bool((row == len(lengths) - 1).all())
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


@pytest.mark.parametrize("length", [1, 37, 64, 96])
@pytest.mark.parametrize("operator", ["ssd", "gated_delta", "causal_conv"])
def test_states_of_borders_that_only_the_device_knows(operator, length, device):
    """The last sequence is empty: what pads the tables has its row."""
    total, h, g, p = 96, 2, 1, 32
    generator = torch.Generator().manual_seed(0)
    kernel: Any
    if operator == "causal_conv":
        kernel, state = causal_conv, torch.randn(3, 1, 2 * p, generator=generator)
        inputs = [torch.randn(1, total, 2 * p, generator=generator)]
        rest: list[Any] = [torch.randn(2 * p, 2, generator=generator), None]
    else:
        kernel, state = (ssd if operator == "ssd" else gated_delta), torch.randn(3, h, p, p, generator=generator)
        v, k = (torch.randn(1, total, g, p, generator=generator) for _ in range(2))
        q, dt = torch.randn(1, total, h, p, generator=generator), torch.rand(1, total, h, generator=generator) / 9
        inputs, rest = [v, dt, F.normalize(k, dim=-1), F.normalize(q, dim=-1)], [-torch.rand(h, generator=generator)]
        inputs += [torch.rand(1, total, h, generator=generator)] if operator == "gated_delta" else []

    def run(end: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cut = [tensor[:, :end] for tensor in inputs]
        given = [*cut, *rest] if operator == "causal_conv" else [*cut[:2], *rest, *cut[2:]]
        moved = [None if tensor is None else tensor.to(device) for tensor in given]
        return kernel(*moved, return_final_state=True, **options)

    borders, state = torch.tensor([0, length, total, total], dtype=torch.int32, device=device), state.to(device)
    remember_bounds(borders, total, total)
    y, final = run(total, initial_state=state, cu_seqlens=borders)
    alone, its_final = run(length, initial_state=state[:1])
    torch.testing.assert_close(y[:, :length], alone)
    torch.testing.assert_close(final[:1], its_final)
    assert torch.equal(final[2], state[2])
