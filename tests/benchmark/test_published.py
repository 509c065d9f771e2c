"""The published way of decoding computes what the model does."""

from __future__ import annotations

import pytest
import torch

from mmmamba.benchmark.published import PublishedDecoder
from mmmamba.model import MAMBA2, Model


@pytest.mark.parametrize("mask", [False, True])
def test_steps_are_passes_of_the_model(tiny_model, mask):
    model: Model = tiny_model().double().requires_grad_(False)
    ids = torch.randint(8, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    state = model(ids[:, :8], return_state=True).state
    decoder = PublishedDecoder(model, 8, mask=mask)
    decoder.cache = [(layer.k.transpose(1, 2), layer.v.transpose(1, 2)) for layer in state.layers]
    for i in range(8, 12):
        torch.testing.assert_close(decoder.step(ids[0, i : i + 1])[0], whole[0, i], rtol=1e-9, atol=1e-9)
    assert decoder.length == 12
    assert all(k.shape[2] == v.shape[2] == 12 for k, v in decoder.cache)


def test_a_student_is_refused(tiny_model):
    with pytest.raises(ValueError, match="every layer must be attention"):
        PublishedDecoder(tiny_model((MAMBA2,) * 5), 8)
