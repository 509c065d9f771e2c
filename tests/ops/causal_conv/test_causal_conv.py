"""The causal convolution: against torch's own, across packed borders, in any chunking."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.ops import causal_conv, causal_conv_step


def inputs(length, k=2, c=3, rows=1):
    torch.manual_seed(length + 10 * k)

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    return make(rows, length, c), make(c, k), make(c)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_equals_torchs_convolution(k):
    x, weight, bias = inputs(11, k)
    truth = F.conv1d(F.pad(x.transpose(1, 2), (k - 1, 0)), weight[:, None], bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(causal_conv(x, weight, bias, activation="none")[0], truth)
    torch.testing.assert_close(causal_conv(x, weight, bias)[0], F.silu(truth))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum), k=st.integers(2, 4), stateful=st.booleans()
)
def test_packed_equals_one_at_a_time_with_states_and_gradients(lengths, k, stateful):
    x, weight, bias = inputs(sum(lengths), k)
    state = torch.randn(len(lengths), k - 1, 3, dtype=torch.float64).requires_grad_() if stateful else None
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed, final = causal_conv(x, weight, bias, initial_state=state, cu_seqlens=cu, return_final_state=True)
    ys, finals = [], []
    for row, part in enumerate(x.split(lengths, 1)):
        y, last = causal_conv(
            part, weight, bias, initial_state=None if state is None else state[row : row + 1], return_final_state=True
        )
        ys.append(y)
        finals.append(last)
    truth, last = torch.cat(ys, 1), torch.cat(finals)
    torch.testing.assert_close(packed, truth)
    torch.testing.assert_close(final, last)
    wanted = [x, weight, bias, *([state] if stateful else [])]
    for ours, other in zip(
        torch.autograd.grad(packed.square().sum() + final.sum(), wanted),
        torch.autograd.grad(truth.square().sum() + last.sum(), wanted),
        strict=False,
    ):
        torch.testing.assert_close(ours, other)


def test_steps_equal_the_whole():
    x, weight, bias = inputs(6, 3, rows=2)
    truth, final = causal_conv(x, weight, bias, return_final_state=True)
    state = x.new_zeros(2, 2, 3)
    for t in range(6):
        y, state = causal_conv_step(x[:, t], weight, bias, state)
        torch.testing.assert_close(y, truth[:, t])
    torch.testing.assert_close(state, final)


def test_refuses_a_state_of_another_shape_and_an_unknown_activation():
    x, weight, bias = inputs(4)
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv(x, weight, bias, initial_state=x.new_zeros(1, 2, 3))
    with pytest.raises(ValueError, match="activation"):
        causal_conv(x, weight, bias, activation="relu")
