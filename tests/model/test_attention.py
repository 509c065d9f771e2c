"""Softmax attention in parts is attention at once: merged in any parts, behind caches that are copied or that grow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.model import Model, StackConfig, initialise
from mmmamba.model.mixers import Attention, AttentionOptions
from mmmamba.model.mixers.kv_cache import GrowingKV
from mmmamba.model.mixers.softmax import Part, attend, attend_torch, merge
from mmmamba.model.rope import rotation
from mmmamba.model.state import State
from tiny import make_config


def heads(rows: int, length: int, keys: int, h: int = 4, g: int = 2, p: int = 8, seed: int = 0):
    """q (rows, length, h, p), k and v (rows, keys, g, p) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, n, count, p, generator=generator, dtype=torch.float64)
        for n, count in ((length, h), (keys, g), (keys, g))
    ]


def whole(q, k, v, causal: bool = True) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def test_a_part_is_what_its_definition_says():
    q, k, v = heads(2, 5, 9)
    for causal, keys in ((False, 9), (True, 5)):
        part = attend_torch(q, k[:, :keys], v[:, :keys], causal=causal)
        torch.testing.assert_close(part.y, whole(q, k[:, :keys], v[:, :keys], causal), rtol=1e-12, atol=1e-12)
    scores = torch.einsum("lp,mp->lm", q[1, :, 3], k[1, :, 1]) * 8**-0.5  # head 3 reads group 1
    torch.testing.assert_close(attend_torch(q, k, v, causal=False).lse[1, 3], scores.logsumexp(-1))


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 11), max_size=5), scale=st.sampled_from([1.0, 30.0]))
def test_merged_parts_are_the_whole(cuts, scale):
    """Every chunk of queries attends to each chunk of keys before it, then causally to its own; in any order."""
    q, k, v = heads(2, 12, 12)
    q = scale * q  # at 30 nearly all weight lies on one key, in one of the parts
    spans = list(itertools.pairwise([0, *sorted(cuts), 12]))
    found = []
    for i, (start, end) in enumerate(spans):
        mine = q[:, start:end]
        parts = [attend_torch(mine, k[:, a:b], v[:, a:b], causal=False) for a, b in spans[:i]]
        merged = attend_torch(mine, k[:, start:end], v[:, start:end], causal=True)
        for part in parts:
            merged = merge(part, merged) if i % 2 else merge(merged, part)
        found.append(merged.y)
        logsumexp = attend_torch(torch.cat([q[:, :start], mine], 1), k[:, :end], v[:, :end], causal=True).lse
        torch.testing.assert_close(merged.lse, logsumexp[:, :, start:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(found, 1), whole(q, k, v), rtol=1e-12, atol=1e-12)


def test_half_precision_is_merged_in_float32():
    q, k, v = heads(1, 6, 10)
    parts = [attend_torch(q, k[:, a:b], v[:, a:b], causal=False) for a, b in ((0, 7), (7, 10))]
    merged = merge(*(Part(part.y.bfloat16(), part.lse.float()) for part in parts))
    assert merged.y.dtype == torch.bfloat16 and merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.y.double(), merge(*parts).y, rtol=2**-6, atol=2**-8)


def test_on_a_cpu_nothing_is_fused():
    q, k, v = (t.bfloat16() for t in heads(1, 4, 4))
    assert attend(q, k, v, causal=True) is None


def softmax_model() -> Model:
    layer_map = ("attention", "mamba2", "attention", "attention", "mamba2")
    return initialise(Model(make_config(layer_map)), 2).double().eval()


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(10, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def grown(model: Model, text: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, State]:
    """Logits of all tokens and the state, read in pieces whose caches grow in place."""
    logits, state = [], None
    for start, end in itertools.pairwise([0, *cuts, text.shape[1]]):
        state = None if state is None else state.growing(text.shape[1] - start)
        out = model(text[:, start:end], state=state, return_state=True)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1), state.settled()


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [7, 8, 15], list(range(1, 20))])
def test_caches_that_grow_in_place_change_nothing(cuts):
    model, text = softmax_model(), ids(2, 20)
    expected = model(text, return_state=True)
    logits, state = grown(model, text, cuts)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-9, atol=1e-9)
    for ours, truth in zip(state.layers, expected.state.layers, strict=True):
        assert type(ours) is type(truth)
        for name, tensor in vars(truth).items():
            torch.testing.assert_close(getattr(ours, name), tensor, rtol=1e-9, atol=1e-9)
    follow = model(text[:, :3], state=expected.state).logits
    torch.testing.assert_close(model(text[:, :3], state=state).logits, follow, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_only_what_was_made_to_grow_is_changed():
    model, text = softmax_model(), ids(1, 9)
    state = model(text, return_state=True).state
    before = [t.clone() for layer in state.layers for t in vars(layer).values()]
    first, second = state.growing(9), state.growing(9)
    answers = [model(text, state=one, return_state=True) for one in (first, state, second)]
    for answer in answers[1:]:
        torch.testing.assert_close(answer.logits, answers[0].logits, rtol=1e-9, atol=1e-9)
    after = [t for layer in state.layers for t in vars(layer).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="19 tokens do not fit into a cache with room for 18"):
        model(text[:, :1], state=answers[0].state)


@torch.no_grad()
def test_rows_with_gaps_and_linear_states_do_not_grow():
    model = softmax_model()
    padded = model(ids(2, 6), attention_mask=torch.tensor([[1] * 6, [0] * 2 + [1] * 4]), return_state=True).state
    assert padded.growing(5) is padded and padded.select(torch.tensor([1])).growing(5).layers[0].k.shape[1] == 6
    one = padded.select(torch.tensor([0])).growing(5)
    assert [isinstance(layer, GrowingKV) for layer in one.layers] == [True, False, True, True, False]
    assert one.settled().growing(0).layers[0].k.shape[1] == 6
    linear = initialise(Model(make_config(("mamba2",) * 5))).eval()
    state = linear(ids(1, 4), return_state=True).state
    assert state.growing(3) is state


@pytest.fixture
def layer() -> Attention:
    """16 heads in 8 groups of 128, as at 2.6 billion parameters."""
    torch.manual_seed(0)
    stack = StackConfig(num_layers=1, intermediate_size=8, num_heads=16, num_kv_heads=8, head_dim=128)
    return Attention(256, stack, AttentionOptions()).requires_grad_(False)


def in_pieces(layer: Attention, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    stack = StackConfig(num_layers=1, intermediate_size=8, num_heads=16, num_kv_heads=8, head_dim=128)
    positions = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[:2])
    turn = rotation(stack, positions, x.shape[1], x.dtype)
    start, cache, found = 0, None, []
    for size in sizes:
        part = replace(turn, cos=turn.cos[:, start : start + size], sin=turn.sin[:, start : start + size])
        y, cache = layer(x[:, start : start + size], cache, rotation=part, keep_state=True)
        if start == 0 and len(sizes) > 1:
            state = State((cache,), positions[:, 0], 0).growing(x.shape[1] - size)
            cache = state.layers[0]
        start += size
        found.append(y)
    return torch.cat(found, 1)


def sizes_of(length: int, chunk: int) -> list[int]:
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def test_a_layer_in_pieces_is_the_layer_at_once(layer):
    x = torch.randn(2, 40, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = in_pieces(layer.double(), x, [40])
    for chunk in (1, 7, 39):
        torch.testing.assert_close(in_pieces(layer, x, sizes_of(40, chunk)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("rows", "length", "chunk"), [(1, 2000, 300), (3, 700, 128), (1, 700, 699), (1, 20_000, 8192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_pieces_are_as_near_the_truth_as_the_whole(layer, rows, length, chunk, dtype):
    """The last of these lengths is one that cuDNN attends, where there is one that does."""
    x = torch.randn(rows, length, 256, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    layer = layer.to("cuda", dtype)
    once, parts = (in_pieces(layer, x, sizes).float() for sizes in ([length], sizes_of(length, chunk)))
    truth = torch.cat([in_pieces(layer.float(), row[None].float(), sizes_of(length, 2048)) for row in x])
    error, ours = ((y - truth).norm() / truth.norm() for y in (once, parts))
    assert error < 2e-2 and ours <= 1.5 * error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("queries", "keys", "causal"), [(600, 600, True), (70, 900, False), (1, 500, False),
                                                         (8200, 8200, True), (8192, 8300, False)])  # fmt: skip
def test_on_a_gpu_a_fused_part_is_its_definition(queries, keys, causal):
    q, k, v = (t.to("cuda", torch.bfloat16) for t in heads(1, queries, keys, h=4, g=2, p=128))
    ours = attend(q, k, v, causal=causal)
    assert ours is not None, "no fused attention on this GPU"
    truth = attend_torch(q.float(), k.float(), v.float(), causal=causal)
    assert ours.y.shape == truth.y.shape and ours.lse.shape == truth.lse.shape
    assert (ours.y.float() - truth.y).norm() < 1e-2 * truth.y.norm()
    torch.testing.assert_close(ours.lse.float(), truth.lse, rtol=1e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [1000, 9000])
def test_on_a_gpu_whole_rows_have_gradients(layer, length):
    """9,000 tokens are attended by cuDNN, where there is one that does."""
    x = torch.randn(1, length, 256, generator=torch.Generator().manual_seed(1)).to("cuda")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        y = in_pieces(layer.to("cuda", dtype), leaf, [length])
        y.float().square().sum().backward()
        found.append(leaf.grad.float())
    assert (found[1] - found[0]).norm() < 5e-2 * found[0].norm()
