"""A prompt that a graph reads gives what a pass gives: the logits and the state, at first, later and in pieces."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mmmamba.inference import prefill_graphs
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.prefill_graphs import SIZES, replayed_pass
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, State, initialise
from mmmamba.model.mixers.kv_cache import KVState
from tiny import make_config

ROTATED = Mamba2Options(rope=True, qk_norm=True)
CASES = {
    "teacher": ((ATTENTION,) * 5, Mamba2Options()),
    "linear": ((MAMBA2,) * 5, Mamba2Options()),
    "delta rule": ((MAMBA2,) * 5, replace(ROTATED, rule="gated_delta")),
    "hybrid": ((ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2), ROTATED),
}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def build(name: str, device: str) -> Model:
    config = make_config(*CASES[name])
    wide = {name: replace(getattr(config, name), head_dim=32) for name in ("embedding", "decoder")}  # as kernels need
    model = initialise(Model(replace(config, **wide)), 4).requires_grad_(False).eval()
    return model.to(device, torch.bfloat16)


def embeddings(model: Model, length: int) -> torch.Tensor:
    ids = torch.randint(8, 300, (1, length), generator=torch.Generator().manual_seed(length)).to(model.device)
    return model.embed(ids)


def close(ours: torch.Tensor, truth: torch.Tensor) -> None:
    assert ours.shape == truth.shape and ours.dtype == truth.dtype
    error = (ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-6)
    assert float(error) < 2e-2


def test_a_cpu_has_no_graphs():
    model = build("linear", "cpu")
    with torch.no_grad():
        assert replayed_pass(model, embeddings(model, 5), None, 9) is None


def test_a_trimmed_cache_holds_the_tokens_read():
    k, v = torch.randn(2, 1, 7, 2, 4).unbind()
    cache = KVState(k, v, torch.arange(7)[None] < 5).trimmed(5)
    assert torch.equal(cache.k, k[:, :5]) and torch.equal(cache.v, v[:, :5]) and bool(cache.filled.all())


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in CASES])
@torch.no_grad()
def test_a_graph_is_a_pass(name):
    model = build(name, "cuda")
    kept: list[tuple[torch.Tensor, State]] = []
    for length in (1, 40, 64, 70, 70, 41, 33, 96, 65):  # rows of three sizes, each captured at the third of them
        x = embeddings(model, length)
        ours = replayed_pass(model, x, None, 100)
        truth = model(inputs_embeds=x, logits="last", return_state=True, max_length=100)
        assert ours.state.max_length == truth.state.max_length
        kept.append((ours.logits, ours.state))
        close(ours.logits, truth.logits)
        for one, other in zip(ours.state.tensors(), truth.state.tensors(), strict=True):
            close(one, other)
    graphs = prefill_graphs._GRAPHS[model]._rows
    assert sorted(graphs) == [32, 64, 96] and graphs[64]._replayed._captured and graphs[96]._replayed._captured
    x = embeddings(model, 40)
    again = replayed_pass(model, x, None, 100)
    close(again.logits, kept[1][0])
    for one, other in zip(again.state.tensors(), kept[1][1].tensors(), strict=True):  # no replay overwrote them
        close(one, other)
    decoder = Decoder(model, 1, 200, max_length=100)
    decoder.admit(torch.zeros(1, dtype=torch.long, device="cuda"), again.state)
    close(
        decoder.step(torch.tensor([9], device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")),
        model(torch.tensor([[9]], device="cuda"), state=again.state, logits="last").logits,
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in ("linear", "delta rule")])
@torch.no_grad()
def test_a_graph_goes_on_from_a_state(name):
    model = build(name, "cuda")
    x = embeddings(model, 90)
    truth = model(inputs_embeds=x, logits="last", return_state=True)
    for _ in range(4):
        state = replayed_pass(model, x[:, :50], None, 90).state
        ours = replayed_pass(model, x[:, 50:], state, 90)
        close(ours.logits, truth.logits)
        for one, other in zip(ours.state.tensors(), truth.state.tensors(), strict=True):
            close(one, other)
        assert int(ours.state.positions) == 90


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_graph_goes_when_its_weights_move():
    model = build("linear", "cuda")
    x = embeddings(model, 20)
    for _ in range(4):
        replayed_pass(model, x, None, 20)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    close(replayed_pass(model, x, None, 20).logits, model(inputs_embeds=x, logits="last").logits)


def test_sizes_waste_little():
    assert all(b <= 2 * a for a, b in itertools.pairwise(SIZES))
