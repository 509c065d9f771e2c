"""What a decoding step begins with."""

from __future__ import annotations

import pytest
import torch

from mmmamba.ops import embed_step


def test_embeds_and_counts_each_row_once():
    weight, special = torch.arange(6.0).view(3, 2), torch.tensor([[10.0, 11.0]])
    counts = torch.tensor([[5, 0, 7], [1, 2, 3]])
    x, at = embed_step(torch.tensor([2, 3, 0]), torch.tensor([2, 0, -1]), weight, counts, special=special)
    assert x.tolist() == [[4, 5], [10, 11], [0, 1]]
    assert at.tolist() == [[7, 5, 0], [3, 1, 0]]
    assert counts.tolist() == [[6, 0, 8], [2, 2, 4]]  # an idle row counts nowhere


def test_refuses_shapes_that_do_not_fit():
    one, weight = torch.zeros(1, dtype=torch.long), torch.ones(2, 3)
    with pytest.raises(ValueError, match="slots"):
        embed_step(one, one.repeat(2), weight, one[None])
    with pytest.raises(ValueError, match="counts"):
        embed_step(one, one, weight, one)
    with pytest.raises(ValueError, match="special"):
        embed_step(one, one, weight, one[None], special=torch.ones(1, 2))
    with pytest.raises(IndexError):  # no other embedding in its place
        embed_step(one + 2, one, weight, one[None])
