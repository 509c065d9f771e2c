"""The HoVLE layout: read, written, read again; and what is refused, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmmamba.checkpoints import fingerprint, load, read_config, save_hovle
from mmmamba.checkpoints.hovle import UNUSED, config_from_hovle, config_to_hovle, merge_qkv, split_qkv
from mmmamba.errors import UserError
from mmmamba.model import Model, RopeScaling, StackConfig, initialise


def test_config_is_read_field_by_field(golden_folder) -> None:
    config = read_config(golden_folder("hovle_tiny_A"))
    assert (config.hidden_size, config.vocab_size, config.text_vocab_size) == (64, 160, None)
    assert (config.embedding.num_layers, config.decoder.num_layers) == (2, 3)
    assert (config.embedding.intermediate_size, config.decoder.intermediate_size) == (96, 128)
    assert (config.embedding.rms_norm_eps, config.decoder.rms_norm_eps) == (1e-5, 1e-6)
    assert (config.embedding.num_heads, config.embedding.num_kv_heads, config.embedding.head_dim) == (4, 2, 16)
    assert config.embedding.max_position_embeddings == 512 and not config.decoder.qkv_bias
    assert config.vision is not None and config.vision.tokens_per_tile == 4
    assert config.img_context_token_id == 150 and config.layer_map == ("attention",) * 5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.template == "internlm2-chat" and config.system_message is None
    assert (config.dynamic_image_size, config.use_thumbnail) == (True, True)
    assert (config.min_dynamic_patch, config.max_dynamic_patch) == (1, 12)


def test_every_setting_survives_the_layout(tiny_config) -> None:
    config = tiny_config()
    config = replace(
        config,
        embedding=replace(config.embedding, rope_theta=5e5, rope_scaling=RopeScaling(type="dynamic", factor=2.0)),
        decoder=replace(
            config.decoder,
            qkv_bias=True,
            o_bias=True,
            max_position_embeddings=77,
            rope_scaling=RopeScaling(type="linear", factor=4.0),
        ),
        special_token_maps={"<a>": 0, "<b>": 1},
        text_vocab_size=318,
        system_message="You are a mamba.",
        bos_token_id=3,
        eos_token_id=4,
        pad_token_id=0,
        use_thumbnail=False,
        dynamic_image_size=False,
        min_dynamic_patch=2,
        max_dynamic_patch=6,
    )
    data = json.loads(json.dumps(config_to_hovle(config)))
    assert config_from_hovle(data, "config.json") == config
    assert config_from_hovle(config_to_hovle(replace(config, system_message=None)), "x").system_message is None
    assert "system_message" not in config_to_hovle(replace(config, system_message=None))


def test_absent_keys_take_the_published_classes_defaults(golden, edit_config, golden_folder) -> None:
    folder = golden_folder("hovle_tiny_A")
    keys = ["bias", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "pad_token_id"]
    edit_config(folder, {f"llm_config.{key}": ... for key in keys})
    edit_config(folder, {"embedding_config.attention_bias": ..., "use_thumbnail": ..., "max_dynamic_patch": ...})
    config = read_config(folder)
    assert config.decoder.qkv_bias and not config.embedding.qkv_bias
    assert config.decoder.max_position_embeddings == 2048 and config.pad_token_id == 0
    assert not config.use_thumbnail and config.max_dynamic_patch == 6


def test_wqkv_rows_are_grouped_by_key_value_head() -> None:
    stack = StackConfig(num_layers=1, intermediate_size=1, num_heads=6, num_kv_heads=3, head_dim=2)
    q, k, v = (torch.arange(n * 2.0)[:, None] + base for n, base in ((6, 0), (3, 100), (3, 200)))
    merged = merge_qkv(q, k, v, stack)
    assert merged[:, 0].tolist()[:8] == [0, 1, 2, 3, 100, 101, 200, 201]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(merged, stack), (q, k, v), strict=True))
    bias = merge_qkv(q[:, 0], k[:, 0], v[:, 0], stack)
    assert torch.equal(bias, merged[:, 0]) and torch.equal(split_qkv(bias, stack)[1], k[:, 0])


def test_written_and_read_again_is_the_same_model(tiny_model, tiny_processor, tmp_path: Path, same_model) -> None:
    model = tiny_model()
    folder = save_hovle(model, tiny_processor, tmp_path / "out", dtype=torch.float32)
    assert read_config(folder) == model.config
    same_model(load(folder), model)
    assert (folder / "tokenizer.json").is_file()
    half = save_hovle(model, None, tmp_path / "half")
    stored = load_file(half / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    same_model(load(half), load(save_hovle(load(half), None, tmp_path / "again")))
    assert load(half, dtype=torch.bfloat16).dtype == torch.bfloat16 and load(half).dtype == torch.float32
    assert not load(half).training


def test_names_are_the_published_ones(golden, golden_folder, tmp_path: Path) -> None:
    source = golden_folder("hovle_tiny_A")
    written = load_file(save_hovle(load(source), None, tmp_path / "out", dtype=torch.float32) / "model.safetensors")
    published = load_file(source / "model.safetensors")
    assert written.keys() == published.keys()
    for name, tensor in published.items():
        same = name if name != UNUSED else "embedding_model.llm_text_embeddings.weight"
        assert torch.equal(written[name], published[same]), name
        assert written[name].shape == tensor.shape


def test_biases_and_special_embeddings_survive(tiny_config, tmp_path: Path, same_model) -> None:
    config = tiny_config()
    biased = replace(config.decoder, qkv_bias=True, o_bias=True)
    config = replace(config, decoder=biased, special_token_maps={"<a>": 0, "<b>": 1}, text_vocab_size=318)
    model = initialise(Model(config), 3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    folder = save_hovle(model, None, tmp_path / "out", dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    assert "language_model.model.layers.2.attention.wqkv.bias" in stored and stored[UNUSED].shape == (320, 64)
    same_model(load(folder), model)


def test_a_tied_head_is_written_out(tiny_config, tmp_path: Path) -> None:
    model = initialise(Model(tiny_config(tie_word_embeddings=True)), 0).eval()
    read = load(save_hovle(model, None, tmp_path / "out", dtype=torch.float32))
    assert not read.config.tie_word_embeddings
    ids = torch.tensor([[1, 9, 12, 40]])
    assert torch.equal(read(ids).logits, model(ids).logits)


def test_loading_changes_no_byte(golden_folder) -> None:
    folder = golden_folder("hovle_tiny_A")
    before = fingerprint(folder)
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert fingerprint(folder) == before


# ---------------------------------------------------------------------------------------------- shards


def shard(folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    table: dict[str, str] = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        table |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_sharded_weights(golden_folder, same_model) -> None:
    folder = golden_folder("hovle_tiny_A")
    whole = load(folder)
    before = fingerprint(folder)
    shard(folder)
    same_model(load(folder), whole)
    assert fingerprint(folder) != before


def test_a_lost_shard_is_named(golden_folder) -> None:
    folder = golden_folder("hovle_tiny_A")
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index.json: lists the file 'model-00002-of-00002.safetensors', which is not"):
        load(folder)


def test_an_index_that_lies_is_refused(golden_folder) -> None:
    folder = golden_folder("hovle_tiny_A")
    shard(folder)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["language_model.nothing"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"1 tensors are not in the file that it names \(language_model.nothing\)"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(UserError, match=r"lists the file '../other/model.safetensors'"):
        load(folder)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(UserError, match="'weight_map' must map"):
        load(folder)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_config.use_ls": True}, r"'embedding_config.use_ls' is True: only False is supported"),
        ({"embedding_config.hidden_act": "gelu"}, r"'embedding_config.hidden_act' is 'gelu'"),
        ({"embedding_config.mlp_bias": True}, r"'embedding_config.mlp_bias' is True"),
        ({"embedding_config.pixel_shuffle_loc": "mid"}, r"'embedding_config.pixel_shuffle_loc' is 'mid'"),
        ({"normalize_encoder_output": True}, r"'normalize_encoder_output' is True"),
        ({"embedding_config.hidden_size": 32}, r"'embedding_config.hidden_size' is 32, but 'llm_config."),
        ({"embedding_config.image_size": 60}, r"force_image_size' is 56, but 'embedding_config.image_size' is 60"),
        ({"embedding_config.image_size": 57, "force_image_size": 57}, r"'embedding_config.image_size' is 57"),
        ({"downsample_ratio": 0.25}, r"'downsample_ratio' differs"),
        ({"ps_version": "v1"}, r"'ps_version' is 'v1': only 'v2' is supported"),
        ({"llm_config.tie_word_embeddings": True}, r"'llm_config.tie_word_embeddings' is True"),
        ({"llm_config.architectures": ["Qwen2ForCausalLM"]}, r"'llm_config.architectures' is \['Qwen2ForCausalLM'\]"),
        ({"llm_config.num_attention_heads": 5}, r"'llm_config.num_attention_heads' is 5, which does not divide"),
        ({"llm_config.num_hidden_layers": -1}, r"'llm_config.num_hidden_layers' must be at least 0, got -1"),
        ({"llm_config.num_attention_heads": 0}, r"'llm_config.num_attention_heads' must be at least 1"),
        ({"llm_config.num_key_value_heads": 3}, r"not a multiple of num_kv_heads"),
        ({"llm_config.rope_scaling": {"type": "yarn", "factor": 2}}, r"'llm_config.rope_scaling.type' is 'yarn'"),
        ({"llm_config.rope_scaling": {"type": "linear"}}, r"'llm_config.rope_scaling.factor' is missing"),
        ({"llm_config.rope_scaling": "linear"}, r"'llm_config.rope_scaling' must be dict"),
        ({"llm_config.vocab_size": ...}, r"'llm_config.vocab_size' is missing"),
        ({"llm_config.bias": "no"}, r"'llm_config.bias' must be bool, got 'no'"),
        ({"llm_config.hidden_size": True}, r"'llm_config.hidden_size' must be int, got True"),
        ({"llm_config": ...}, r"model_type None is not known: this is neither"),
        ({"llm_config": 3}, r"'llm_config' must be dict"),
    ],
)
def test_config_refusals_name_the_field(golden_folder, edit_config, changes, message: str) -> None:
    folder = golden_folder("hovle_tiny_A")
    edit_config(folder, changes)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_tensor_refusals_name_folder_file_and_tensor(golden_folder, edit_weights) -> None:
    folder = golden_folder("hovle_tiny_A")
    edit_weights(folder, lambda t: t.pop("language_model.model.norm.weight"))
    with pytest.raises(UserError, match=r"model.safetensors: .* 1 missing tensor \(language_model.model.norm.weight\)"):
        load(folder)
    edit_weights(folder, lambda t: [t.update({f"extra.{i}": torch.ones(2)}) for i in range(5)])
    with pytest.raises(UserError, match=r"1 missing .* 5 unexpected tensors \(extra.0, extra.1, extra.2, …\)$") as e:
        load(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_a_misshaped_tensor_shows_both_shapes(golden_folder, edit_weights) -> None:
    folder = golden_folder("hovle_tiny_A")
    name = "embedding_model.encoder.1.attention.wqkv.weight"
    edit_weights(folder, lambda t: t.update({name: t[name][:-16]}))
    with pytest.raises(UserError, match=rf"{name} is \(112, 64\), expected \(128, 64\)"):
        load(folder)


def test_only_the_unused_table_may_be_left_out_or_odd(golden_folder, edit_weights) -> None:
    folder = golden_folder("hovle_tiny_A")
    edit_weights(folder, lambda t: t.update({UNUSED: torch.ones(3)}))
    load(folder)
    edit_weights(folder, lambda t: t.pop(UNUSED))
    load(folder)


def test_bias_in_the_config_but_not_in_the_file(golden_folder, edit_config) -> None:
    folder = golden_folder("hovle_tiny_A")
    edit_config(folder, {"llm_config.bias": ...})
    with pytest.raises(UserError, match=r"missing tensors \(language_model.model.layers.0.attention.wqkv.bias"):
        load(folder)


def test_writing_refuses_what_the_layout_cannot_hold(tiny_model, tiny_config, tmp_path: Path) -> None:
    kinds = ("mamba2", "attention", "mamba2", "mamba2", "attention")
    with pytest.raises(UserError, match="layer 0 is mamba2"):
        save_hovle(tiny_model(kinds), None, tmp_path / "out")
    config = tiny_config()
    with pytest.raises(UserError, match="'vision' is null"):
        config_to_hovle(replace(config, vision=None))
    with pytest.raises(UserError, match=r"'decoder.head_dim' is 32"):
        config_to_hovle(replace(config, decoder=replace(config.decoder, head_dim=32)))
    assert not (tmp_path / "out").exists()
