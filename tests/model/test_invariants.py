"""Chunking, padding, packing and batching never change what the model says (float64 to 1e-9)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.model import Mamba2Options, Model, ModelConfig, RopeScaling, StackConfig, initialise
from mmmamba.ops import layout_of

LINEAR, HYBRID = ("mamba2",) * 5, ("attention", "mamba2", "mamba2", "mamba2", "attention")
ROTATED = Mamba2Options(rope=True, conv_activation="none", qk_norm=True, gate_bias=True, decay="spread", conv_kernel=3)
KINDS = {
    "teacher": ((), None),
    "linear": (LINEAR, None),
    "hybrid": (HYBRID, None),
    "rotated": (HYBRID, ROTATED),
    "delta": (LINEAR, replace(ROTATED, rule="gated_delta")),
}


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    from tiny import make_config

    layer_map, mixer = KINDS[request.param]
    model = initialise(Model(make_config(layer_map, mixer)), 3).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.requires_grad_(False)


def ids(length, rows=1, seed=0):
    return torch.randint(10, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(sequences):
    lengths = torch.tensor([s.shape[1] for s in sequences])
    return torch.cat(sequences, 1), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 29), max_size=4))
def test_any_chunking_of_the_prefill_gives_the_same(model, cuts):
    text = ids(30)
    whole = model(text).logits
    borders, state, parts = [0, *sorted(cuts), 30], None, []
    for a, b in itertools.pairwise(borders):
        out = model(text[:, a:b], state=state, return_state=True)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    assert state.positions.tolist() == [30]


def test_token_by_token_equals_the_whole(model):
    text, state = ids(12, rows=2), None
    for t in range(12):
        out = model(text[:, t : t + 1], state=state, logits="last", return_state=True)
        state = out.state
    torch.testing.assert_close(out.logits, model(text).logits[:, -1], rtol=1e-9, atol=1e-9)
    assert state.sequences == 2 and state.nbytes > 0
    one = state.select(torch.tensor([False, True])).to("cpu")
    follow = model(text[:, :1], state=state, logits="last").logits
    torch.testing.assert_close(model(text[1:, :1], state=one, logits="last").logits, follow[1:], rtol=1e-9, atol=1e-9)


def test_padding_on_either_side_and_packing_change_nothing(model):
    sequences = [ids(n, seed=n) for n in (7, 19, 2)]
    alone = [model(s).logits[0] for s in sequences]
    row, cu = packed(sequences)
    out = model(row, cu_seqlens=cu)
    torch.testing.assert_close(out.logits[0], torch.cat(alone), rtol=1e-9, atol=1e-9)
    last = model(row, cu_seqlens=cu, logits="last").logits
    torch.testing.assert_close(last, torch.stack([a[-1] for a in alone]), rtol=1e-9, atol=1e-9)
    for side in ("left", "right"):
        batch, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19)
        for i, s in enumerate(sequences):
            where = slice(19 - s.shape[1], 19) if side == "left" else slice(0, s.shape[1])
            batch[i, where], mask[i, where] = s[0], 1
        padded = model(batch, attention_mask=mask)
        for i, truth in enumerate(alone):
            torch.testing.assert_close(padded.logits[i][mask[i].bool()], truth, rtol=1e-9, atol=1e-9)
            assert float(padded.logits[i][~mask[i].bool()].abs().sum()) == 0


def test_packed_continuation_equals_whole_sequences(model):
    firsts, seconds = [ids(n, seed=n) for n in (5, 9, 3)], [ids(n, seed=10 + n) for n in (4, 1, 6)]
    row, cu = packed(firsts)
    state = model(row, cu_seqlens=cu, return_state=True).state
    row, cu = packed(seconds)
    ours = model(row, cu_seqlens=cu, state=state, return_state=True)
    truth = [model(torch.cat(pair, 1)).logits[0, pair[0].shape[1] :] for pair in zip(firsts, seconds, strict=True)]
    torch.testing.assert_close(ours.logits[0], torch.cat(truth), rtol=1e-9, atol=1e-9)
    assert ours.state.positions.tolist() == [9, 10, 9]


def test_uneven_rows_are_attended_one_by_one(model):
    sequences = [ids(n, seed=n) for n in (40, 1, 1, 1, 1)]
    row, cu = packed(sequences)
    assert layout_of(cu).longest * layout_of(cu).sequences > 2 * layout_of(cu).total
    torch.testing.assert_close(
        model(row, cu_seqlens=cu).logits[0], torch.cat([model(s).logits[0] for s in sequences]), rtol=1e-9, atol=1e-9
    )


def test_a_linear_state_does_not_grow(tiny_model):
    model = tiny_model(LINEAR)
    sizes = [model(ids(n), return_state=True).state.nbytes for n in (3, 60)]
    assert sizes[0] == sizes[1]


def test_images_must_match_their_positions(tiny_model):
    model = tiny_model()
    text = ids(20)
    text[0, 3:7] = model.config.img_context_token_id
    pixels = torch.randn(1, 3, 56, 56)
    assert model(text, pixels).logits.shape == (1, 20, 320)
    with pytest.raises(ValueError, match="4 <IMG_CONTEXT> positions for 8 image tokens"):
        model(text, torch.randn(2, 3, 56, 56))


def test_scaled_rotary_bases(caplog):
    from tiny import make_config

    config = make_config()
    stretched = replace(config.decoder, rope_scaling=RopeScaling(type="dynamic", factor=2.0), max_position_embeddings=8)
    model = Model(replace(config, decoder=stretched)).eval()
    text = ids(20)
    whole = model(text, max_length=20).logits
    state = model(text[:, :6], max_length=20, return_state=True).state
    torch.testing.assert_close(model(text[:, 6:], state=state).logits, whole[:, 6:], rtol=1e-4, atol=1e-5)
    state = model(text[:, :6], return_state=True).state
    model(text[:, 6:], state=state)
    assert "grew to" in caplog.text
    linear = replace(config.decoder, rope_scaling=RopeScaling(type="linear", factor=2.0))
    slow = Model(replace(config, decoder=linear)).eval()
    slow.load_state_dict(model.state_dict())
    assert float((slow(text).logits - whole).detach().abs().max()) > 1e-4


def test_special_embeddings_extend_the_text_table():
    from tiny import make_config

    model = Model(make_config(text_vocab_size=300, special_token_maps={"<a>": 300, "<b>": 301}))
    x = model.embed(torch.tensor([[5, 301]]))
    torch.testing.assert_close(x[0, 0], model.text_embeddings.weight[5])
    torch.testing.assert_close(x[0, 1], model.special_embeddings.weight[1])


def test_bad_geometry_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        StackConfig(num_layers=1, intermediate_size=8, num_heads=3, num_kv_heads=2, head_dim=4)
    stack = StackConfig(num_layers=1, intermediate_size=8, num_heads=2, num_kv_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="3 entries for 2 layers"):
        ModelConfig(hidden_size=8, vocab_size=9, embedding=stack, decoder=stack, layer_map=("attention",) * 3)
    with pytest.raises(ValueError, match="must be"):
        ModelConfig(hidden_size=8, vocab_size=9, embedding=stack, decoder=stack, layer_map=("attention", "rwkv"))


@pytest.mark.parametrize(
    "wrong", [{"rule": "delta"}, {"conv_kernel": 1}, {"dt_min": 0.0}, {"dt_min": 0.2}, {"norm_eps": 0.0}]
)
def test_impossible_mixers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Mamba2Options(**wrong)


def test_the_delta_rule_needs_keys_of_unit_length():
    with pytest.raises(ValueError, match="set qk_norm to true"):
        Mamba2Options(rule="gated_delta")
