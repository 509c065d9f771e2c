"""What the kernels can't serve is said in words, once, and Triton is not needed to say it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from mmmamba.ops import dispatch


@pytest.fixture
def as_if(monkeypatch):
    """``as_if(installed, interpreted)``: what this machine seems to offer."""

    def seem(installed: bool = True, interpreted: bool = True) -> None:
        monkeypatch.setattr(dispatch, "available", lambda: installed)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")

    return seem


def test_reasons_name_what_is_in_the_way(as_if):
    x = torch.zeros(2)
    as_if()
    assert dispatch.why_not(x, None, x.bfloat16(), x.int(), head_dim=64, state_dim=128, conv_kernel=2) is None
    assert "float64" in dispatch.why_not(x, x.double())
    assert "head_dim 32, 64, 128, not 48" in dispatch.why_not(x, head_dim=48)
    assert "conv_kernel 2, 3, 4, not 5" in dispatch.why_not(x, conv_kernel=5)
    assert "(cpu, meta)" in dispatch.why_not(x, x.to("meta"))
    as_if(interpreted=False)
    assert "not cpu" in dispatch.why_not(x)
    as_if(installed=False)
    assert "not installed" in dispatch.why_not(x)


def test_each_reason_warns_once():
    with pytest.warns(RuntimeWarning, match="a reason of this test"):
        dispatch.fallback("a reason of this test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.fallback("a reason of this test")
    with pytest.warns(RuntimeWarning, match="another one"):
        dispatch.fallback("another one")


def test_without_triton_all_else_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mmmamba.ops, mmmamba.ops.dispatch as dispatch\n"
        "print(dispatch.available(), dispatch.why_not(torch.zeros(1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["False", "Triton is not installed\n"]
