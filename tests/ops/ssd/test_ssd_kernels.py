"""The recurrence's kernels against the sequential reference in float64: values, states and every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recurrences
from mmmamba.ops import layout_of, ssd_chunked, ssd_reference

launch = pytest.importorskip("mmmamba.ops.ssd.launch", exc_type=ImportError)
NAMES = ("y", "final state", "dx", "ddt", "dA", "dB", "dC", "d initial state")
WIDE = recurrences.WIDE


def inputs(lengths, g=1, r=2, p=32, n=32, packed=True, dtype=torch.float32, seed=0):
    """(x, dt, A, B, C), state, cu_seqlens in float64, with values that ``dtype`` holds; x, B, C views of one tensor."""
    torch.manual_seed(seed)
    b, length, h = (1, sum(lengths), g * r) if packed else (len(lengths), lengths[0], g * r)
    xBC = torch.randn(b, length, g * p + g * n + h * n).to(dtype).to(WIDE)
    x, B, C = xBC.split([g * p, g * n, h * n], -1)
    dt, A, state = torch.rand(b, length, h), -2 * torch.rand(h), torch.randn(len(lengths), h, p, n)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) if packed else None
    args = (x.unflatten(-1, (g, p)), dt.to(WIDE), A.to(WIDE), B.unflatten(-1, (g, n)), C.unflatten(-1, (h, n)))
    return args, state.to(WIDE), cu


everything = partial(recurrences.everything, narrow=(0, 3, 4))  # x, B, C
errors = partial(recurrences.errors, NAMES)


def check(args, state, cu, device, dtype=torch.float32, limit=1e-5, **options):
    ours = everything(launch.ssd, args, state, cu, dtype, device, **options)
    found = errors([t.cpu() for t in ours], everything(ssd_reference, args, state, cu))
    # dA is a number a head, a sum over all tokens of terms of both signs: what cancels magnifies its error.
    limits = dict.fromkeys(found, limit) | ({"dA": 10 * limit} if "dA" in found else {})
    assert not {name: error for name, error in found.items() if not error <= limits[name]}


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(sum),
    g=st.sampled_from([1, 2]),
    r=st.integers(1, 2),
    p=st.sampled_from([32, 64]),
    n=st.sampled_from([32, 64]),
    chunk=st.sampled_from([16, 32]),
    segments=st.integers(1, 4),
)
def test_packed_rows_equal_the_recurrence_with_gradients(device, lengths, g, r, p, n, chunk, segments):
    check(*inputs(lengths, g, r, p, n), device, chunk=chunk, segments=segments)


@pytest.mark.parametrize("segments", [3, 9])
def test_sequences_and_segments_may_begin_anywhere(device, segments):
    args, state, cu = inputs([0, 17, 0, 1, 32, 20, 0], r=1)
    check(args, state, cu, device, chunk=16, segments=segments)
    _, final = launch.ssd(
        *(t.float().to(device) for t in args),
        initial_state=state.float().to(device),
        cu_seqlens=cu.to(device),
        return_final_state=True,
        chunk=16,
        segments=segments,
    )
    for empty in (0, 2, 6):
        assert torch.equal(final[empty].cpu(), state[empty].float())


@pytest.mark.parametrize("segments", [1, 3])
def test_batches_equal_the_recurrence(device, segments):
    args, state, _ = inputs([20, 20], packed=False)
    check(args, state if segments == 3 else None, None, device, chunk=16, segments=segments)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_each_dtype_with_tuned_tiles(device, dtype, limit):
    args, state, _ = inputs([40], g=2, r=1, p=128, n=64, packed=False, dtype=dtype)
    check(args, state, None, device, dtype, limit, segments=2)


@pytest.mark.parametrize("slowest", [1e-6, 1.0])
def test_extreme_decays(device, slowest):
    (x, dt, _, B, C), state, cu = inputs([50, 9], g=1, r=2)
    span = torch.rand_like(dt)
    A = torch.tensor([-1.0, -3.0], dtype=WIDE)
    dt = (slowest ** (1 - span) * 30**span).float().to(WIDE) / -A  # up to 30 a step
    check((x, dt, A, B, C), state, cu, device, limit=2e-5, chunk=16, segments=2)


def test_float16_holds_states_that_float16_could_not(device):
    (x, dt, A, B, C), state, _ = inputs([20], packed=False, dtype=torch.float16)
    C, state = C.half().to(WIDE) / 2**10, state * 1e6
    truth, _ = ssd_reference(x, dt, A, B, C, initial_state=state)
    half = [t.to(device, torch.float16) for t in (x, B, C)]
    y, _ = launch.ssd(
        half[0], dt.float().to(device), A.float().to(device), *half[1:], initial_state=state.float().to(device)
    )
    assert (y.cpu() - truth).norm() <= 1e-3 * truth.norm()


def test_either_result_alone_may_be_differentiated(device):
    args, state, _ = inputs([20], packed=False)
    for only in (0, 1):
        results = []
        for function, dtype, where in ((launch.ssd, torch.float32, device), (ssd_reference, WIDE, "cpu")):
            leaves = [t.to(where, dtype).requires_grad_() for t in (*args, state)]
            out = function(*leaves[:5], initial_state=leaves[5], return_final_state=True)[only]
            results.append(torch.autograd.grad(out.sum(), leaves, allow_unused=True))
        for ours, truth in zip(*results, strict=True):
            truth = torch.zeros_like(ours) if truth is None else truth
            torch.testing.assert_close(ours.cpu(), truth.cpu().float(), rtol=1e-4, atol=1e-4)


def test_two_runs_give_the_same_bits(device):
    args, state, cu = inputs([20, 9], r=1)
    first, second = (everything(launch.ssd, args, state, cu, torch.bfloat16, device, chunk=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operator_keeps_to_its_registration(device):
    args, state, cu = inputs([5, 6])
    leaves = [t.detach().to(device, torch.float32).requires_grad_() for t in (*args, state)]
    table = layout_of(cu.to(device)).cuts(16)
    torch.library.opcheck(torch.ops.mmmamba.ssd.default, (*leaves, table, 2, 16, 2))


def test_what_the_kernels_cannot_serve_is_named(device):
    args, state, _ = inputs([5], packed=False)
    args = [t.float().to(device) for t in args]
    with pytest.raises(ValueError, match="state_dim"):
        launch.ssd(*args[:3], args[3][..., :24], args[4][..., :24])
    with pytest.raises(ValueError, match="float64"):
        launch.ssd(*(t.double() for t in args))
    with pytest.raises(ValueError, match="initial_state"):
        launch.ssd(*args, initial_state=state[:, :1].to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [8192], [200_000], [3, 0, 5000, 1, 0, 20_000]])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_long_rows_of_the_published_shape(lengths, dtype, limit):
    args, state, cu = inputs(lengths, g=1, r=2, p=128, n=128, dtype=dtype)
    truth = everything(ssd_chunked, args, state, cu, device="cuda")
    found = errors(everything(launch.ssd, args, state, cu, dtype, "cuda"), truth)
    assert not {name: error for name, error in found.items() if not error <= limit}


@pytest.mark.gpu
def test_compiled_and_captured_calls_equal_eager_ones():
    args, state, _ = inputs([300], g=2, r=2, p=64, n=64, packed=False, dtype=torch.bfloat16)
    eager = everything(launch.ssd, args, state, None, torch.bfloat16, "cuda")
    compiled = everything(torch.compile(launch.ssd), args, state, None, torch.bfloat16, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    x, dt, A, B, C = (t.to("cuda", torch.bfloat16 if t.ndim == 4 else torch.float32) for t in args)
    state = state.to("cuda", torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = launch.ssd(x, dt, A, B, C, initial_state=state)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, eager[0])
