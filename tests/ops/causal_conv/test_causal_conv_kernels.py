"""The convolution's kernels against the twin in float64: values, states, every gradient, twice the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba import ops as twin

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(*args, **options):
    from mmmamba.ops.causal_conv.launch import causal_conv

    return causal_conv(*args, **options)


def reference(x, *args, rotation=None, rotate_from=0, **options):
    """The twin, with the rotation that it leaves to the mixer."""
    y, final = twin.causal_conv(x, *args, **options)
    if rotation is not None:
        cos, sin = (t[:, :, None] for t in rotation)
        heads = y[..., rotate_from:].unflatten(-1, (-1, 2 * cos.shape[-1]))
        first, second = heads.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        y = torch.cat([y[..., :rotate_from], turned.flatten(-2)], -1)
    return y, final


def draw(b, length, c, k, dtype=torch.float64, rows=None, head=None, seed=0, device=DEVICE):
    """x, weight, bias, state (None without rows), rotation (None without head), the gradients of y and final state."""
    torch.manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    state = make(rows, k - 1, c) if rows is not None else None
    angle = make(b, length, head // 2).double() if head else None
    rotation = (angle.cos().to(dtype), angle.sin().to(dtype)) if head else None
    dfinal = make(rows if rows is not None else b, k - 1, c)
    return make(b, length, c), make(c, k), make(c), state, rotation, make(b, length, c), dfinal


def run(function, x, weight, bias, state, rotation, dy, dfinal, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, state)]
    x, weight, bias, state = leaves
    y, final = function(
        x, weight, bias, initial_state=state, rotation=rotation, return_final_state=dfinal is not None, **options
    )
    pairs = [(y, dy)] + ([] if dfinal is None else [(final, dfinal)])
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad([a for a, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True)]
    return [a.detach() for a, _ in pairs] + gradients


def compare(tensors, dtype=torch.float64, **options):
    def wide(t):
        return None if t is None else tuple(map(wide, t)) if isinstance(t, tuple) else t.double()

    ours = run(kernel, *tensors, **options)
    truths = run(reference, *map(wide, tensors), **options)
    for value, truth in zip(ours, truths, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape
        assert (value.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_equals_the_twin_in_float64(k, activation, dtype, device):
    compare(draw(2, 35, 48, k, dtype, rows=2, head=16, device=device), dtype, activation=activation, rotate_from=16)
    compare(draw(1, 140, 20, k, dtype, device=device), dtype, activation=activation)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40]), min_size=1, max_size=9).filter(sum),
    k=st.integers(2, 4),
    stateful=st.booleans(),
    biased=st.booleans(),
    kept=st.booleans(),
    head=st.sampled_from([None, 2, 6]),
    silu=st.booleans(),
)
def test_packed_rows_with_states_and_gradients(lengths, k, stateful, biased, kept, head, silu):
    rows, total = len(lengths), sum(lengths)
    x, weight, bias, state, rotation, dy, dfinal = draw(1, total, 12, k, rows=rows, head=head, seed=total)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    compare(
        (x, weight, bias if biased else None, state if stateful else None, rotation, dy, dfinal if kept else None),
        cu_seqlens=cu, activation="silu" if silu else "none", rotate_from=6 if head == 6 else 2 if head else 0,
    )  # fmt: skip


BORDERS = [(k, head, activation) for k in (2, 4) for head in (None, 48) for activation in ("silu", "none")]
QUICK = [(2, None, "none"), (4, 48, "silu")]  # each choice once in make test, all together in make test-all


@pytest.mark.parametrize(
    ("k", "head", "activation"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in BORDERS],
)
def test_borders_around_those_of_runs_and_tiles(k, head, activation, device):
    from mmmamba.ops.causal_conv.launch import BACKWARD_CHANNELS, RUN, RUNS

    tile, c = RUNS * RUN, 144
    assert BACKWARD_CHANNELS % 48 and BACKWARD_CHANNELS < c  # a head lies in two columns of programs
    borders = [0, 1, RUN - 1, RUN, RUN + 1, RUN + 1, 2 * RUN, tile - 1, tile, tile, tile + 1, tile + 3, 2 * tile - 2]
    cu = torch.tensor([*borders, 2 * tile, 2 * tile + 1], dtype=torch.int32, device=device)
    x, weight, bias, _, rotation, dy, _ = draw(1, int(cu[-1]), c, k, head=head, device=device)
    rotate_from = 48 if head else 0
    compare((x, weight, bias, None, rotation, dy, None), cu_seqlens=cu, activation=activation, rotate_from=rotate_from)
    compare((x, weight, None, None, rotation, dy, None), cu_seqlens=cu.long(), activation=activation)


@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)), 127, 128, 129])
def test_rows_of_one_length_across_tiles(length, device):
    compare(draw(max(260 // length, 2), length, 8, 3, rows=None, device=device))
    compare((*draw(2, length, 8, 3, device=device)[:6], None), activation="none")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_shorter_than_the_kernel(length, device):
    compare(draw(3, length, 8, 4, rows=3, device=device))


def test_a_slice_of_a_wider_projection_and_an_angle_a_head(device):
    x, weight, bias, _, rotation, *_ = draw(2, 9, 24, 3, head=8, device=device)
    wide = torch.cat([x, x + 1, x], -1)
    angles = tuple(t[:, :, None] for t in rotation)
    ours, _ = kernel(wide[..., 24:48], weight, bias, rotation=angles, rotate_from=8)
    torch.testing.assert_close(ours, reference(x + 1, weight, bias, rotation=rotation, rotate_from=8)[0])


def test_two_runs_have_the_same_bits(device):
    tensors = draw(1, 300, 64, 2, torch.float32, rows=1, device=device)
    first, second = run(kernel, *tensors), run(kernel, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_at_all(device):
    x, weight, bias, state, *_ = draw(2, 0, 8, 3, rows=2, device=device)
    y, final = kernel(x, weight, bias, initial_state=state, return_final_state=True)
    assert y.shape == (2, 0, 8) and torch.equal(final, state)


def test_is_a_sound_custom_op(device):
    from mmmamba.ops.causal_conv.launch import _forward

    x, weight, bias, state, rotation, *_ = draw(1, 7, 8, 3, torch.float32, rows=2, head=4, device=device)
    cu = torch.tensor([0, 3, 7], device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    torch.library.opcheck(_forward.traced, (*leaves, cu, *rotation, 4, True, True))
    torch.library.opcheck(_forward.traced, (*leaves[:2], None, None, cu, None, None, 0, False, False))


def test_refuses_what_does_not_fit(device):
    x, weight, bias, state, rotation, *_ = draw(2, 4, 12, 3, rows=2, head=4, device=device)
    with pytest.raises(ValueError, match="initial_state"):
        kernel(x, weight, bias, initial_state=state[:1])
    with pytest.raises(ValueError, match="activation"):
        kernel(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match="weight"):
        kernel(x, weight[:, :1], bias)
    with pytest.raises(ValueError, match="bias"):
        kernel(x, weight, bias[:2])
    with pytest.raises(ValueError, match="one row"):
        kernel(x, weight, bias, cu_seqlens=torch.tensor([0, 4], device=device))
    with pytest.raises(ValueError, match="whole heads"):
        kernel(x, weight, bias, rotation=rotation, rotate_from=3)
    with pytest.raises(ValueError, match="rotation"):
        kernel(x, weight, bias, rotation=(rotation[0][:1], rotation[1][:1]))
