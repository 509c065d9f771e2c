"""The greatest batch of a GPU, with a memory that is made up: what is reported is what was measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmmamba.benchmark import measure
from mmmamba.benchmark.measure import Measured, greatest_batch
from mmmamba.benchmark.timing import timing
from mmmamba.model import MAMBA2
from mmmamba.model.state import state_bytes


@pytest.mark.parametrize(("room", "overhead"), [(0.5, 0), (1, 0), (7, 0), (100, 3), (5000, 40), (9000, 40), (9e6, 0)])
def test_found_by_measuring(tiny_config, monkeypatch, room, overhead):
    config = tiny_config(layer_map=(MAMBA2,) * 5)
    model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cuda"))
    each = state_bytes(config, torch.float32).at(1024 + measure.STEPS)
    tried = []

    def decode(model, *, context, batch, state_dtype, seconds):
        tried.append(batch)
        if batch + overhead > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Measured(
            timing=timing([1.0], [1.0]), tokens_per_s=batch * 1e3, batch=batch, state_bytes=each, resident_bytes=0,
            peak_bytes=0, bytes=1.0, flops=1.0,
        )  # fmt: skip

    monkeypatch.setattr(measure, "decode", decode)
    monkeypatch.setattr(measure.memory, "release", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(room * each), 0))
    found = greatest_batch(model, context=1024)
    best = min(int(room) - overhead, measure.MOST_SEQUENCES["cuda"])
    if best < 1:
        assert found is None and not tried
        return
    assert found is not None and found.batch in tried and len(tried) <= 3
    assert 15 / 16 * best - 1 <= found.batch <= best
    assert ("not by memory" in found.note) == (found.batch == measure.MOST_SEQUENCES["cuda"])
