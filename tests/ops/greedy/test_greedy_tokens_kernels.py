"""Greedy picking against PyTorch's argmax and log-softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmamba.ops.greedy import greedy_tokens_torch

kernels = pytest.importorskip("mmmamba.ops.greedy.kernels", exc_type=ImportError)


ROWS = 66  # more than a block of rows holds; each row costs the interpreter time
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {"turned": st.booleans(), "banned": st.booleans(), "scale": st.sampled_from([1, 30])}
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8, **SETTINGS)
@given(b=st.sampled_from([0, 1, 2, 5]), v=st.integers(1, 9000), **OPTIONS)
def test_picks_what_argmax_picks(device, dtype, b, v, turned, banned, scale):
    check_tokens(device, dtype, b, v, turned, banned, scale)


@pytest.mark.parametrize("turned", [False, True])
def test_picks_in_more_rows_than_a_block_holds(device, turned):
    check_tokens(device, torch.bfloat16, ROWS, 300, turned, True, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, **SETTINGS)
@given(b=st.sampled_from([0, 1, 2, 5, ROWS]), v=st.integers(1, 9000), **OPTIONS)
def test_picks_what_argmax_picks_in_many_rows(device, dtype, b, v, turned, banned, scale):
    check_tokens(device, dtype, b, v, turned, banned, scale)


def check_tokens(device, dtype, b, v, turned, banned, scale):
    generator = torch.Generator().manual_seed(b * 9001 + v)
    logits = (scale * torch.randn((v, b) if turned else (b, v), generator=generator)).to(device, dtype)
    logits = logits.t() if turned else logits
    out = (torch.rand(v, generator=generator) < 0.5).to(device) if banned and v > 1 else None
    if out is not None:
        out[0] = False
    tokens, logprobs = kernels.greedy_tokens(logits, out)
    truth, expected = greedy_tokens_torch(logits.double(), out)
    scores = logits.double() if out is None else logits.double().masked_fill(out, -torch.inf)
    assert tokens.dtype == torch.long
    assert torch.equal(scores.gather(1, tokens[:, None]), scores.gather(1, truth[:, None]))
    first = (scores == scores.amax(1, keepdim=True)).byte().argmax(1) if b else truth  # the first of equals
    assert torch.equal(tokens, first)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_infinities_and_nan(device):
    logits = torch.full((3, 5000), -torch.inf, device=device)
    logits[0, 4321] = 3.0
    logits[1, 17], logits[1, 4000] = 1.0, torch.nan
    logits[2, 40] = 2.0
    banned = torch.zeros(5000, dtype=torch.bool, device=device)
    banned[40] = True
    tokens, logprobs = kernels.greedy_tokens(logits, banned)
    assert tokens[0] == 4321 and logprobs[0].abs() < 1e-6
    assert logprobs[1].isnan()  # as a caller reports
    assert logprobs[2] == -torch.inf  # nothing that may be picked has any probability


def test_is_a_sound_custom_op(device):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._greedy_tokens.traced, (torch.randn(2, 50, device=device), None), test_utils=checks)


def test_refuses_what_does_not_fit(device):
    with pytest.raises(ValueError, match="logits"):
        kernels.greedy_tokens(torch.ones(3, device=device))
    with pytest.raises(ValueError, match="banned"):
        kernels.greedy_tokens(torch.ones(2, 3, device=device), torch.zeros(2, dtype=torch.bool, device=device))
