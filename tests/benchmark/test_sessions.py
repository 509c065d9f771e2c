"""What saving and resuming takes is measured of a conversation that is the same afterwards."""

from __future__ import annotations

import pytest

from mmmamba.benchmark.sessions import time_session
from mmmamba.model.state import State


@pytest.mark.parametrize("layer_map", [("mamba2",) * 5, ("attention", "mamba2", "mamba2", "attention", "mamba2")])
def test_a_session_is_timed(tiny_model, layer_map, tmp_path):
    found = time_session(tiny_model(layer_map), length=40, chunk=16, repeats=2, folder=tmp_path)
    assert found["same"] == 1 and found["file_bytes"] > 40 * 4
    assert all(found[f"{name}_ms"] > 0 for name in ("save", "resume", "fingerprint"))
    assert not list(tmp_path.iterdir())


def test_a_state_that_came_back_changed_is_seen(tiny_model, monkeypatch):
    moved = State.to
    monkeypatch.setattr(State, "to", lambda self, device: moved(self.map(lambda t: t * 2), device))
    assert time_session(tiny_model(("mamba2",) * 5), length=20, repeats=1)["same"] == 0
