"""What a pass gives beside logits: hidden states, attention weights, image features; and the model without its head."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from wrapped import row, wrap

import mmmamba
from mmmamba.errors import UserError
from mmmamba.hf import MMMambaConfig, MMMambaForConditionalGeneration, MMMambaModel
from mmmamba.hf.state_cache import CACHE
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, VisionConfig
from tiny import make_config

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)


@pytest.fixture
def tiny(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(HYBRID, Mamba2Options(rope=True)).double()


@torch.no_grad()
def test_hidden_states(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    out = model(**prompt, output_hidden_states=True)
    assert len(out.hidden_states) == 6 and "hidden_states" not in model(**prompt)
    embedded = tiny.embed(prompt["input_ids"], prompt["pixel_values"]) * prompt["attention_mask"][..., None]
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.equal(model.head(out.hidden_states[-1]), out.logits)
    picked = model(**prompt, output_hidden_states=[0, -2]).hidden_states
    assert [one is None for one in picked] == [False, True, True, True, False, True]
    assert torch.equal(picked[4], out.hidden_states[4])
    model.config.output_hidden_states = True
    assert len(model(**prompt).hidden_states) == 6
    model.config.return_dict = False
    plain = model(**prompt)
    assert isinstance(plain, tuple) and torch.equal(plain[0], out.logits)
    assert model(**prompt, return_dict=True).logits is not None


@torch.no_grad()
def test_attention_weights_of_a_teacher(
    tiny_model: Callable[..., Model], tiny: Model, prompt: dict[str, torch.Tensor]
) -> None:
    teacher = tiny_model().double()
    model, mask = wrap(teacher), prompt["attention_mask"]
    weights = model(**prompt, output_attentions=True).attentions
    assert [tuple(one.shape) for one in weights] == [(3, 4, 14, 14)] * 5
    assert torch.allclose(weights[2].sum(-1), mask[:, None].double().expand(3, 4, 14))
    assert not weights[2].triu(1).any() and not (weights[2] * (1 - mask)[:, None, None]).any()
    # What they weigh is what the layer's heads are.
    seen = {}
    alone = row(prompt, 2)
    teacher(**alone, observe=lambda index, u, heads, rotation: seen.setdefault(index, (u, heads)))
    u, heads = seen[3]
    values = teacher.mixer(3).v_proj(u).unflatten(-1, (2, 16)).repeat_interleave(2, 2)
    mine = model(**alone, output_attentions=True).attentions[3]
    assert torch.allclose(torch.einsum("bhlm,bmhp->blhp", mine, values), heads)
    start = {**alone, "input_ids": alone["input_ids"][:, :-2]}
    past = model(**start)[CACHE]
    rest = model(alone["input_ids"][:, -2:], **{CACHE: past}, output_attentions=True).attentions[3]
    assert torch.allclose(rest, mine[:, :, -2:])
    with pytest.raises(UserError, match="layer 1 is a state space layer"):
        wrap(tiny)(**prompt, output_attentions=True)
    with pytest.raises(UserError, match="padded rows that continue from a cache"):
        model(alone["input_ids"][:, :1].expand(3, 1), **{CACHE: model(**prompt)[CACHE]}, output_attentions=True)


@torch.no_grad()
def test_image_features_are_what_goes_over_the_marks(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    found = model.get_image_features(prompt["pixel_values"])
    assert found.last_hidden_state.shape == (3, 16, 64) and found.pooler_output.shape == (3, 4, 64)
    embedded = tiny.embed(prompt["input_ids"], prompt["pixel_values"])
    assert torch.equal(embedded[prompt["input_ids"] == 7], found.pooler_output.flatten(0, 1))
    assert isinstance(model.get_image_features(prompt["pixel_values"], return_dict=False), tuple)
    with pytest.raises(UserError, match="get_image_features has no argument 'image_sizes'"):
        model.get_image_features(prompt["pixel_values"], image_sizes=[(1, 2)])
    with pytest.raises(UserError, match="reads no pictures"):
        wrap(Model(make_config(vision=None))).get_image_features(prompt["pixel_values"])
    post = VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc="post")
    with pytest.raises(UserError, match="become tokens after the embedding stack"):
        wrap(Model(make_config(vision=post))).get_image_features(prompt["pixel_values"])


@torch.no_grad()
def test_the_base_model_is_all_but_the_head(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    base = model.base_model
    assert isinstance(base, MMMambaModel) and base is model.base_model
    hidden = base(**prompt).last_hidden_state
    assert torch.equal(model.head(hidden), model(**prompt).logits)
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in base.named_parameters()} == {
        "head.weight"
    }
    assert len(list(model.modules())) == len(set(model.modules())) and base not in list(model.modules())
    copied = copy.deepcopy(model)
    copied.text_embeddings.weight.zero_()
    assert not torch.equal(copied.base_model(**prompt).last_hidden_state, hidden)
    assert torch.equal(model.base_model(**prompt).last_hidden_state, hidden)
    model.text_embeddings = torch.nn.Embedding(320, 64).double()
    assert model.base_model.text_embeddings is model.text_embeddings


def test_the_base_model_of_a_folder(folder_of, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 20, 30]])
    whole, base = (auto.from_pretrained(folder_of("pico-linear")) for auto in (AutoModelForCausalLM, AutoModel))
    assert isinstance(base, MMMambaModel) and "head.weight" not in base.state_dict()
    with torch.no_grad():
        assert torch.equal(whole.head(base(ids).last_hidden_state), whole(ids).logits)
    delta = AutoModel.from_pretrained(mmmamba.checkpoints.resolve("pico-linear"))
    assert torch.equal(delta.text_embeddings.weight, base.text_embeddings.weight)
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MMMambaModel"]
    assert torch.equal(AutoModel.from_pretrained(tmp_path).layers[0].mlp.up.weight, base.layers[0].mlp.up.weight)
    with pytest.raises(UserError, match=r"1 missing tensors \(head.weight\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    if hasattr(modeling_auto, "AutoModelForMultimodalLM"):
        found = modeling_auto.AutoModelForMultimodalLM.from_pretrained(folder_of("pico-linear"))
        assert isinstance(found, MMMambaForConditionalGeneration)


def test_what_a_loader_needs_of_a_config_and_a_folder(folder_of, tmp_path: Path) -> None:
    config = MMMambaConfig(make_config())
    assert config.auto_map == {} and config.architectures == ["MMMambaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "students").mkdir()
    (tmp_path / "students" / "delta").symlink_to(mmmamba.checkpoints.resolve("pico-linear"))
    (tmp_path / "students" / "whole").symlink_to(folder_of("pico-linear"))
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "students", subfolder=name) for name in ("delta", "whole")
    ]
    assert torch.equal(loaded[0].head.weight, loaded[1].head.weight)
    for options in (
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"device_map": {"": "cpu"}},
    ):
        other = AutoModelForCausalLM.from_pretrained(folder_of("pico-linear"), dtype=torch.bfloat16, **options)
        assert other.head.weight.dtype == torch.bfloat16 and other.device.type == "cpu"


def test_post_init_keeps_weights(folder_of) -> None:
    for model in (
        AutoModelForCausalLM.from_pretrained(folder_of("pico-linear")),
        AutoModelForCausalLM.from_config(MMMambaConfig(make_config(HYBRID))),
        AutoModel.from_config(MMMambaConfig(make_config(HYBRID))),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.post_init()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"1 mismatched tensors \(head.weight\)"):
        config = MMMambaConfig.from_pretrained(folder_of("pico-linear"))
        config.vocab_size += 1
        config.model = {**config.model, "text_vocab_size": config.model["vocab_size"] - 1}
        MMMambaForConditionalGeneration.from_pretrained(
            folder_of("pico-linear"), config=config, ignore_mismatched_sizes=True
        )
