"""The delta rule's kernels against the sequential reference in float64: values, states and every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recurrences
from mmmamba.ops import gated_delta_chunked, gated_delta_reference, layout_of
from mmmamba.ops.gated_delta import tuning
from mmmamba.ops.packing import remember_bounds

launch = pytest.importorskip("mmmamba.ops.gated_delta.launch", exc_type=ImportError)
NAMES = ("y", "final state", "dv", "ddt", "dA", "dk", "dq", "dbeta", "d initial state")
WIDE = recurrences.WIDE


def inputs(lengths, g=1, r=2, p=32, n=32, packed=True, dtype=torch.float32, seed=0, alike=0.0):
    """(v, dt, A, k, q, beta), state, cu_seqlens in float64, with values that ``dtype`` holds; v, k, q are views.

    ``alike``: how much of one direction all keys share.
    """
    torch.manual_seed(seed)
    b, length, h = (1, sum(lengths), g * r) if packed else (len(lengths), lengths[0], g * r)
    keys = F.normalize(torch.randn(b, length, g, n), dim=-1)
    keys = F.normalize((1 - alike) * keys + alike * keys[:, :1], dim=-1)
    queries = F.normalize(torch.randn(b, length, h, n), dim=-1)
    vkq = torch.cat([torch.randn(b, length, g * p), keys.flatten(2), queries.flatten(2)], -1).to(dtype).to(WIDE)
    v, k, q = vkq.split([g * p, g * n, h * n], -1)
    dt, beta = torch.rand(2, b, length, h)
    A, state = -2 * torch.rand(h), torch.randn(len(lengths), h, p, n)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) if packed else None
    v, k, q = v.unflatten(-1, (g, p)), k.unflatten(-1, (g, n)), q.unflatten(-1, (h, n))
    args = (v, dt.to(WIDE), A.to(WIDE), k, q, beta.to(WIDE))
    return args, state.to(WIDE), cu


everything = partial(recurrences.everything, narrow=(0, 3, 4))  # v, k, q
errors = partial(recurrences.errors, NAMES)


def check(args, state, cu, device, dtype=torch.float32, limit=1e-5, **options):
    ours = everything(launch.gated_delta, args, state, cu, dtype, device, **options)
    found = errors([t.cpu() for t in ours], everything(gated_delta_reference, args, state, cu))
    # dA is a number a head, a sum over all tokens of terms of both signs: what cancels magnifies its error.
    limits = dict.fromkeys(found, limit) | {"dA": 10 * limit}
    assert not {name: error for name, error in found.items() if not error <= limits[name]}


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=2).filter(sum),
    g=st.integers(1, 2),
    r=st.integers(1, 2),
    p=st.sampled_from([32, 64]),
    n=st.sampled_from([32, 64]),
)
def test_packed_rows_equal_the_recurrence_with_gradients(device, lengths, g, r, p, n):
    check(*inputs(lengths, g, r, p, n), device)


def test_sequences_may_be_empty(device):
    args, state, cu = inputs([0, 17, 0, 1, 32, 33, 0], r=1)
    check(args, state, cu, device)
    _, final = launch.gated_delta(
        *(t.float().to(device) for t in args),
        initial_state=state.float().to(device),
        cu_seqlens=cu.to(device),
        return_final_state=True,
    )
    for empty in (0, 2, 6):
        assert torch.equal(final[empty].cpu(), state[empty].float())


@pytest.mark.parametrize(("segment", "lengths"), [(1, [20, 0, 165, 70]), (2, [165, 33]), (1, [140, 140])])
def test_segments_walked_at_once_equal_the_recurrence(device, segment, lengths):
    # Sequences of one segment, of two, and of more, whose last one is short.
    args, state, cu = inputs(lengths, r=2, packed=lengths[0] != lengths[-1])
    check(args, state, cu, device, segment=segment)


def test_heads_whose_columns_are_cut_equal_the_recurrence(device, monkeypatch):
    # As where p is 128, in less time.
    monkeypatch.setitem(launch.TUNED, (64, 4), launch.TUNED[64, 4]._replace(columns=32))
    args, state, cu = inputs([50, 20], r=2, p=64)
    check(args, state, cu, device)


def test_only_long_sequences_are_cut_into_segments(monkeypatch):
    monkeypatch.setattr(tuning, "PROGRAMS", 1024)
    least = tuning.LEAST
    assert tuning.segment_chunks(50 * least, least, walks=64, chunk=32) == 0
    assert tuning.segment_chunks(2 * least, 2 * least, walks=64, chunk=32) == least // 32
    assert tuning.segment_chunks(50 * least, 50 * least, walks=64, chunk=32) == 50 * least // 32 // 16
    assert tuning.segment_chunks(50 * least, 50 * least, walks=4096, chunk=32) == 0  # as many walks without


@pytest.mark.parametrize("begun", [True, False])
def test_batches_equal_the_recurrence(device, begun):
    args, state, _ = inputs([20, 20], packed=False)
    check(args, state if begun else None, None, device)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_each_dtype(device, dtype, limit):
    args, state, _ = inputs([40], g=2, r=1, p=128, n=64, packed=False, dtype=dtype)
    check(args, state, None, device, dtype, limit)


@pytest.mark.parametrize("alike", [0.5, 1.0])
def test_keys_that_are_alike(device, alike):
    """At full strength and without decay: the case in which powers of L would leave float32's digits."""
    (v, _, A, k, q, beta), state, cu = inputs([70], alike=alike)
    still = torch.full_like(beta, 1e-4)
    check((v, still, A, k, q, torch.ones_like(beta)), state, cu, device, limit=3e-5)


def test_extreme_decays(device):
    (v, dt, _, k, q, beta), state, cu = inputs([50, 9], g=1, r=2)
    A = torch.tensor([-1.0, -3.0], dtype=WIDE)
    dt = (1e-6 ** (1 - dt) * 30**dt).float().to(WIDE) / -A  # up to 30 a step
    check((v, dt, A, k, q, beta), state, cu, device, limit=2e-5)


def test_borders_that_only_the_device_knows(device):
    """As in a training step's graph: the table is padded with empty sequences, which change nothing."""
    args, _, cu = inputs([20, 0, 45, 3], r=1)
    narrow = [t.float().to(device).requires_grad_() for t in args]
    known, hidden = cu.to(device), cu.to(device)
    remember_bounds(hidden, 68, 68)
    results = []
    for borders in (known, hidden):
        y, _ = launch.gated_delta(*narrow, cu_seqlens=borders)
        results.append([y, *torch.autograd.grad(y.square().sum(), narrow)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)


def test_either_result_alone_may_be_differentiated(device):
    args, state, _ = inputs([20], packed=False)
    for only in (0, 1):
        results = []
        for function, dtype, where in (
            (launch.gated_delta, torch.float32, device), (gated_delta_reference, WIDE, "cpu"),
        ):  # fmt: skip
            leaves = [t.to(where, dtype).requires_grad_() for t in (*args, state)]
            out = function(*leaves[:6], initial_state=leaves[6], return_final_state=True)[only]
            results.append(torch.autograd.grad(out.sum(), leaves, allow_unused=True))
        for ours, truth in zip(*results, strict=True):
            truth = torch.zeros_like(ours) if truth is None else truth
            torch.testing.assert_close(ours.cpu(), truth.cpu().float(), rtol=1e-4, atol=1e-4)


def test_two_runs_give_the_same_bits(device):
    args, state, cu = inputs([20, 9], r=2)
    run = (everything(launch.gated_delta, args, state, cu, torch.bfloat16, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(*run, strict=True))


def test_the_operator_keeps_to_its_registration(device):
    args, state, cu = inputs([5], r=1)
    leaves = [t.detach().to(device, torch.float32).requires_grad_() for t in (*args, state)]
    layout, chunk = layout_of(cu.to(device)), launch.TUNED[32, 4].chunk
    table, begins = layout.cuts(chunk), layout.begins(chunk, 0)
    torch.library.opcheck(torch.ops.mmmamba.gated_delta.default, (*leaves, table, begins, 1, 0))


def test_what_the_kernels_cannot_serve_is_named(device):
    args, state, _ = inputs([5], packed=False)
    v, dt, A, k, q, beta = (t.float().to(device) for t in args)
    with pytest.raises(ValueError, match="state_dim"):
        launch.gated_delta(v, dt, A, k[..., :24], q[..., :24], beta)
    with pytest.raises(ValueError, match="float64"):
        launch.gated_delta(*(t.double() for t in (v, dt, A, k, q, beta)))
    with pytest.raises(ValueError, match="initial_state"):
        launch.gated_delta(v, dt, A, k, q, beta, initial_state=state[:, :1].to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [33], [8192], [3, 0, 5000, 1, 0, 20_000], [150] * 128])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("g", "r", "size"), [(4, 2, 32), (2, 1, 64), (1, 2, 128)])
@pytest.mark.parametrize("alike", [0.0, 0.9], ids=["random keys", "keys alike"])
def test_long_rows(lengths, dtype, limit, g, r, size, alike):
    args, state, cu = inputs(lengths, g, r, size, size, dtype=dtype, alike=alike)
    truth = everything(gated_delta_chunked, args, state, cu, device="cuda")
    found = errors(everything(launch.gated_delta, args, state, cu, dtype, "cuda"), truth)
    limits = dict.fromkeys(found, limit) | {"dA": 10 * limit}
    assert not {name: error for name, error in found.items() if not error <= limits[name]}


@pytest.mark.gpu
def test_compiled_and_captured_calls_equal_eager_ones():
    args, state, _ = inputs([300], g=2, r=2, packed=False, dtype=torch.bfloat16)
    eager = everything(launch.gated_delta, args, state, None, torch.bfloat16, "cuda")
    compiled = everything(torch.compile(launch.gated_delta), args, state, None, torch.bfloat16, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.gpu
def test_a_captured_step_follows_borders_that_change():
    """Forward and backward in one graph, replayed for other sequences in the same row."""
    args, _, _ = inputs([512], g=4, r=2, dtype=torch.bfloat16)
    kinds = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    leaves = [t.to("cuda", kind).requires_grad_() for t, kind in zip(args, kinds, strict=True)]
    borders = torch.tensor([0, 100, 100, 512], dtype=torch.int32, device="cuda")
    other = torch.tensor([0, 3, 400, 512], dtype=torch.int32, device="cuda")

    def step(cu):
        y, _ = launch.gated_delta(*leaves, cu_seqlens=cu)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    truth = [[t.detach().clone() for t in step(cu.clone())] for cu in (borders, other)]
    static = borders.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm = static.clone()
        remember_bounds(warm, 512, 512)
        step(warm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        remember_bounds(static, 512, 512)
        results = step(static)
    for cu, expected in zip((borders, other), truth, strict=True):
        static.copy_(cu)
        graph.replay()
        for ours, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
