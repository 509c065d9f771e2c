"""The linear map of few tokens against the twin in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmamba.ops.linear import linear_step, linear_step_torch, quantize_rows

kernels = pytest.importorskip("mmmamba.ops.linear.kernels", exc_type=ImportError)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 1e-3}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 8),
    k=st.one_of(st.integers(1, 600), st.sampled_from([2048, 5000])),
    n=st.integers(3, 40),
    biased=st.booleans(),
    normed=st.booleans(),
    after=st.sampled_from(["nothing", "residual", "swiglu"]),
    int8=st.booleans(),
    dtype=st.sampled_from(list(LIMITS)),
)
def test_equals_the_twin(device, tokens, k, n, biased, normed, after, int8, dtype):
    n += n % 2 if after == "swiglu" else 0
    generator = torch.Generator().manual_seed(k * 97 + n)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight = draw(tokens, k), draw(n, k)
    options = {
        "bias": draw(n) if biased else None,
        "norm": draw(k) if normed else None,
        "residual": draw(tokens, n) if after == "residual" else None,
    }
    if int8:
        weight, options["scale"] = quantize_rows(weight)
    wide = {name: None if t is None else t.double() for name, t in options.items()}
    truth = linear_step_torch(x.double(), weight.double(), **wide, eps=1e-5, swiglu=after == "swiglu")
    ours = kernels.linear_step(x, weight, **options, eps=1e-5, swiglu=after == "swiglu")
    assert ours.dtype == dtype
    assert after != "residual" or ours is options["residual"]
    assert (ours.double() - truth).norm() <= LIMITS[dtype] * truth.norm() + 1e-6


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "p", "parts"), [(4, 32, 4), (3, 16, 1), (1, 64, 2)])
def test_heads_that_are_still_to_be_normalised(heads, p, parts, int8, device):
    torch.manual_seed(heads)
    x, weight = torch.randn(2, heads * p, device=device), torch.randn(9, heads * p, device=device)
    squares, residual = torch.rand(2, heads, parts, device=device), torch.randn(2, 9, device=device)
    weight, scale = quantize_rows(weight) if int8 else (weight, None)
    plain = linear_step_torch(
        (x.view(2, heads, p) / (squares.sum(-1, keepdim=True) / p + 1e-5).sqrt()).view(2, -1), weight, scale=scale
    )
    for function in (linear_step_torch, kernels.linear_step):
        ours = function(x, weight, scale=scale, squares=squares, eps=1e-5, residual=residual.clone())
        torch.testing.assert_close(ours, plain + residual, rtol=1e-5, atol=1e-5)


def test_is_a_sound_custom_op(device):
    tensors = torch.randn(1, 40, device=device), torch.randn(6, 40, device=device), None, None, None, None
    checks = ("test_schema", "test_faketensor")
    arguments = (*tensors, torch.empty(1, 3, device=device), 1e-5, False, True, False)
    torch.library.opcheck(kernels._linear.traced, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
def test_a_chain_of_launches_gives_what_single_ones_give(device, int8):
    """Each kernel's weights are asked for while the one in front still runs; what it wrote is waited for."""
    torch.manual_seed(0)
    size, layers = 1024, 24
    maps = [torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5 for _ in range(layers)
            for n, k in ((2 * size, size), (size, 2 * size), (4 * size, size), (size, 2 * size))]  # fmt: skip
    scaled = [quantize_rows(weight) if int8 else (weight, None) for weight in maps]
    x = torch.randn(1, size, device=device, dtype=torch.bfloat16)

    def run(chained):
        y = x.clone()
        for i in range(0, len(maps), 4):
            for j, residual in ((i, False), (i + 2, True)):
                (wide, wide_scale), (back, back_scale) = scaled[j], scaled[j + 1]
                inner = linear_step(
                    y, wide, scale=wide_scale, norm=torch.ones_like(y[0]), swiglu=residual, chained=chained and j > 0
                )
                y = linear_step(inner, back, scale=back_scale, residual=y, chained=chained)
        return y

    alone = run(False)
    with torch.cuda.stream(torch.cuda.Stream()):
        run(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(True)
    assert alone.isfinite().all()
    for _ in range(20):
        assert torch.equal(run(True), alone)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, alone)


def test_refuses_what_does_not_fit():
    x, weight = torch.randn(1, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="norm"):
        linear_step(x, weight, norm=torch.ones(3))
    with pytest.raises(ValueError, match="even"):
        linear_step(x, weight, swiglu=True)
    with pytest.raises(ValueError, match="squares has shape"):
        linear_step(x, weight, squares=torch.ones(1, 3, 1), residual=torch.ones(1, 3))
    with pytest.raises(ValueError, match="replace the norm"):
        linear_step(x, weight, squares=torch.ones(1, 2, 1))
    with pytest.raises(ValueError, match="powers of two"):
        kernels.linear_step(x, weight, squares=torch.ones(1, 2, 3), residual=torch.ones(1, 3))
    with pytest.raises(ValueError, match="int8"):
        linear_step(x, weight.to(torch.int8))
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        kernels.linear_step(x.repeat(9, 1), weight)
