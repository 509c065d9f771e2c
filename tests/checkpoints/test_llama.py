"""Llama, Mistral and Qwen2 folders, as transformers writes them, against transformers' own models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmmamba.checkpoints import load, read_config
from mmmamba.checkpoints.llama import FAMILIES, config_from_llama, read_llama, write_llama
from mmmamba.distill.seeding import seed
from mmmamba.errors import UserError
from mmmamba.model import Mamba2Options, Model

GEOMETRY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-all-heads": ("Llama", {"num_key_value_heads": 4}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-bias-dynamic": (
        "Llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-wide-heads": (
        "Mistral",
        {
            "head_dim": 16,
            "sliding_window": 128,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
}


def make_folder(folder: Path, family: str, changes: dict[str, Any], **options: Any) -> transformers.PreTrainedModel:
    """A random model of transformers', also its biases and norms, saved to ``folder``."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**GEOMETRY, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    return model


@torch.no_grad()
def assert_same_logits(ours: Model, theirs: transformers.PreTrainedModel, length: int = 60) -> None:
    ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs = make_folder(tmp_path, *CASES[case])
    ours = load(tmp_path)
    assert ours.config.embedding.num_layers == 0 and ours.config.vision is None and ours.config.template == "tokenizer"
    assert_same_logits(ours, theirs, length=120)


@pytest.mark.parametrize("case", ["llama", "smollm2"])
def test_shards(case, tmp_path):
    theirs = make_folder(tmp_path, *CASES[case], max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(load(tmp_path), theirs)


def test_the_form_of_transformers_4(tmp_path, edit_config):
    theirs = make_folder(tmp_path, "Llama", {"rope_parameters": LLAMA3})
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit_config(tmp_path, {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": scaling})
    assert_same_logits(load(tmp_path), theirs)
    old = {"type": "linear", "factor": 2}
    edit_config(tmp_path, {"rope_scaling": old})
    linear = read_config(tmp_path).decoder
    assert linear.rope_scaling.type == "linear" and linear.rope_theta == 5e5
    edit_config(tmp_path, {"rope_scaling": ..., "rope_theta": ...})
    assert read_config(tmp_path).decoder.rope_scaling is None and read_config(tmp_path).decoder.rope_theta == 1e4


@pytest.mark.parametrize("case", CASES)
def test_written_again_nothing_is_lost(case, tmp_path):
    make_folder(tmp_path, *CASES[case])
    config, stored = read_config(tmp_path), load_file(tmp_path / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for part in (None, *range(config.num_layers)):
        ours = read_llama(stored, config, part)
        written |= write_llama(ours, config, part)
        assert not ours
    assert written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)


def test_absent_keys_have_the_defaults_of_the_classes():
    least = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    for model_type, name in {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}.items():
        heads = {"num_attention_heads": 32}
        stack = config_from_llama({"model_type": model_type, **least, **heads}, "x").decoder
        theirs = getattr(transformers, f"{name}Config")(**least, **heads)
        assert stack.num_kv_heads == theirs.num_key_value_heads and stack.rms_norm_eps == theirs.rms_norm_eps
        window = getattr(theirs, "sliding_window", None) or theirs.max_position_embeddings
        assert stack.max_position_embeddings == min(window, theirs.max_position_embeddings)
        assert stack.rope_theta == theirs.rope_parameters["rope_theta"]
    assert set(FAMILIES) == {"llama", "mistral", "qwen2"}


def test_end_of_text_tokens_come_from_both_files(tmp_path, edit_config):
    make_folder(tmp_path, "Llama", {})
    edit_config(tmp_path, {"eos_token_id": [7, 2]})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    config = read_config(tmp_path)
    assert (config.eos_token_id, config.stop_token_ids, config.pad_token_id) == (7, (2, 9), 7)
    edit_config(tmp_path, {"eos_token_id": None, "bos_token_id": None})
    (tmp_path / "generation_config.json").unlink()
    config = read_config(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.stop_token_ids) == (-1, -1, ())


@pytest.mark.parametrize("family, changes, length", [
    ("Mistral", {"sliding_window": 40}, 40),
    ("Mistral", {"sliding_window": 128}, 128),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}, 40),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 3}, 128),
    ("Qwen2", {"use_sliding_window": False, "sliding_window": 40, "max_window_layers": 0}, 128),
])  # fmt: skip
def test_a_sliding_window_bounds_the_length(family, changes, length, tmp_path, caplog):
    theirs = make_folder(tmp_path, family, changes)
    with caplog.at_level(logging.WARNING, "mmmamba"):
        ours = load(tmp_path)
        read_config(tmp_path)
    warnings = [record.message for record in caplog.records if "window of 40 tokens" in record.message]
    assert len(warnings) == (length == 40)
    assert ours.config.decoder.max_position_embeddings == length
    assert_same_logits(ours, theirs, length)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu': only 'silu'"),
    ("Llama", {"mlp_bias": True}, "'mlp_bias' is True"),
    ("Llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ("Llama", {"rope_parameters.partial_rotary_factor": 0.5}, "'rope_parameters.partial_rotary_factor' is 0.5"),
    ("Llama", {"rope_parameters.rope_type": "yarn"}, "'rope_parameters.rope_type' is 'yarn'"),
    ("Llama", {"rope_parameters.rope_type": "linear"}, "'rope_parameters.factor' is missing"),
    ("Llama", {"rope_parameters.factor": 2.0}, "'rope_parameters.factor' is 2.0: it has no meaning"),
    ("Llama", {"rope_theta": 5.0}, "'rope_parameters.rope_theta' is 10000.0, but 'rope_theta' is 5.0"),
    ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' is set beside 'rope_parameters'"),
    ("Llama", {"qk_norm": True}, "'qk_norm' is True"),
    ("Llama", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
    ("Llama", {"residual_multiplier": 0.2}, "'residual_multiplier' is 0.2"),
    ("Llama", {"num_local_experts": 8}, "'num_local_experts' is 8"),
    ("Llama", {"quantization_config": {"bits": 4}}, "'quantization_config' is set"),
    ("Llama", {"auto_map": {"AutoModel": "x.Y"}}, "'auto_map' names code"),
    ("Llama", {"architectures": ["LlamaForSequenceClassification"]}, "'architectures' is"),
    ("Llama", {"layer_types": ["sliding_attention"] * 3}, "'layer_types' has 'sliding_attention'"),
    ("Llama", {"num_attention_heads": 5, "head_dim": None}, "'num_attention_heads' is 5, which does not divide"),
    ("Llama", {"num_key_value_heads": 3}, "not a multiple of num_kv_heads"),
    ("Llama", {"hidden_size": ...}, "'hidden_size' is missing"),
    ("Llama", {"eos_token_id": "x"}, "'eos_token_id' must be an int or a list"),
    ("Mistral", {"sliding_window": 0}, "'sliding_window' must be at least 1"),
    ("Mistral", {"sliding_window": 9, "rope_parameters.rope_type": "dynamic", "rope_parameters.factor": 2.0},
     "'sliding_window' is 9: with dynamic"),
    ("Qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "'layer_types' has 'chunked"),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """config.json of one folder of each family."""
    folder = tmp_path_factory.mktemp("saved")
    for family in ("Llama", "Mistral", "Qwen2"):
        make_folder(folder / family, family, {})
    return {family: (folder / family / "config.json").read_text() for family in ("Llama", "Mistral", "Qwen2")}


@pytest.mark.parametrize("family, changes, reason", REFUSED, ids=[next(iter(case[1])) for case in REFUSED])
def test_another_network_is_refused_by_the_name_of_its_field(family, changes, reason, saved, tmp_path, edit_config):
    (tmp_path / "config.json").write_text(saved[family])
    edit_config(tmp_path, changes)
    with pytest.raises(UserError, match=reason) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_tensors_that_nothing_reads_may_be_there(tmp_path, edit_weights):
    theirs = make_folder(tmp_path, *CASES["smollm2"])
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, lambda state: state.update({**angles, "lm_head.weight": head}))
    assert_same_logits(load(tmp_path), theirs)
    edit_weights(tmp_path, lambda state: state["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from the embeddings"):
        load(tmp_path)


def test_wrong_tensors_are_refused_by_name(tmp_path):
    make_folder(tmp_path, "Qwen2", {})
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing tensor \(lm_head.weight\)"):
        load(tmp_path)
    extra = {**state, "model.layers.0.self_attn.q_norm.weight": torch.ones(12)}
    save_file(extra, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected tensor \(model.layers.0.self_attn.q_norm.weight\)"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [False, True])
def test_a_seeded_student_runs_and_may_keep_the_biases(keep, tmp_path):
    make_folder(tmp_path, "Qwen2", {})
    teacher = load(tmp_path)
    student = seed(teacher, mixer=Mamba2Options(qkv_bias=keep, rope=True))
    mixer, attention = student.mixer(1), teacher.mixer(1)
    assert (mixer.q_proj.bias is not None) == keep and mixer.o_proj is attention.o_proj and mixer.o_proj.bias is None
    assert not keep or torch.equal(mixer.k_proj.bias, attention.k_proj.bias)
    ids = torch.randint(0, 96, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = student(ids).logits
        first = student(ids[:, :11], return_state=True)
        rest = student(ids[:, 11:], state=first.state).logits
    assert torch.allclose(torch.cat([first.logits, rest], 1), whole, atol=1e-4 * float(whole.abs().max()), rtol=0)
