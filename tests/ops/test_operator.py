"""An operator is a plain function until somebody traces it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmmamba.ops.dispatch import operator

CALLS: list[str] = []


@operator("cube_for_tests")
def cube(x: Tensor) -> Tensor:
    CALLS.append(type(x).__name__)
    return x.pow(3)


@cube.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _slope(ctx, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return 3 * x.square() * gradient


cube.register_autograd(_slope, setup_context=_keep)


def test_is_called_as_it_is_and_has_its_gradient_once():
    CALLS.clear()
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = cube(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert y.tolist() == [1.0, -8.0] and gradient.tolist() == [3.0, 12.0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient.sum(), x)
    with torch.no_grad():
        assert not cube(x).requires_grad
    assert CALLS == ["Tensor", "Tensor"]


def test_who_traces_sees_one_operator():
    CALLS.clear()
    with FakeTensorMode():
        assert cube(torch.ones(2, 3)).shape == (2, 3)
    assert not CALLS, "a fake tensor has nothing to launch a kernel on"
    graph = torch.fx.experimental.proxy_tensor.make_fx(cube, tracing_mode="fake")(torch.ones(2))
    assert torch.ops.mmmamba.cube_for_tests.default in [node.target for node in graph.graph.nodes]
