"""The HoVLE layout: its ``config.json`` and its tensor names ↔ ours.

A name map and one reshape: ``wqkv`` stacks the rows of q, k and v grouped by key/value head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints.section import Section
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig, VisionConfig
from mmmamba.model.stack import RopeScaling, StackConfig

UNUSED = "language_model.model.tok_embeddings.weight"  # the published code stores it, but nothing reads it

_GLOBAL = {
    "vision.class_embedding": "embedding_model.vision_embeddings.class_embedding",
    "vision.position_embedding": "embedding_model.vision_embeddings.position_embedding",
    "vision.patch_embedding.weight": "embedding_model.vision_embeddings.patch_embedding.weight",
    "vision.patch_embedding.bias": "embedding_model.vision_embeddings.patch_embedding.bias",
    "vision.proj.0.weight": "embedding_model.pixel_shuffle_proj.0.weight",
    "vision.proj.0.bias": "embedding_model.pixel_shuffle_proj.0.bias",
    "vision.proj.2.weight": "embedding_model.pixel_shuffle_proj.2.weight",
    "vision.proj.2.bias": "embedding_model.pixel_shuffle_proj.2.bias",
    "text_embeddings.weight": "embedding_model.llm_text_embeddings.weight",
    "special_embeddings.weight": "embedding_model.special_text_embeddings.weight",
    "norm.weight": "language_model.model.norm.weight",
    "head.weight": "language_model.output.weight",
}
_LAYER = {
    "input_norm.weight": "attention_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "feed_forward.w1.weight",
    "mlp.up.weight": "feed_forward.w3.weight",
    "mlp.down.weight": "feed_forward.w2.weight",
}


# ---------------------------------------------------------------------------------------------- tensors


def write_hovle(ours: dict[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """Our tensors of a part, under HoVLE's names. Every layer must be softmax attention.

    Raises:
        UserError: naming the first layer that the layout cannot hold.
    """
    if config.new_layers:
        layer = config.new_layers[0]
        raise UserError(
            f"layer {layer} is {config.layer_map[layer]}: the HoVLE layout holds softmax attention only "
            "(write our own layout or a release instead)"
        )
    out = write_common(ours, config, part)
    return out if part is None else out | write_attention(ours, config, part)


def read_hovle(state: Mapping[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """HoVLE's tensors of a part, under our names. ``state`` has every tensor that ``config`` needs."""
    out = read_common(state, config, part)
    return out if part is None else out | read_attention(state, config, part)


def layer_prefix(config: ModelConfig, layer: int) -> str:
    """The prefix of layer ``layer`` in the published names."""
    first = config.embedding.num_layers
    return f"embedding_model.encoder.{layer}." if layer < first else f"language_model.model.layers.{layer - first}."


def write_common(ours: dict[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """Everything of a part except the mixer, moved out of ``ours``, under the published names."""
    if part is not None:
        prefix = layer_prefix(config, part)
        return {f"{prefix}{theirs}": ours.pop(f"layers.{part}.{name}") for name, theirs in _LAYER.items()}
    text, special = ours["text_embeddings.weight"], ours.get("special_embeddings.weight")
    out = {theirs: ours.pop(name) for name, theirs in _GLOBAL.items() if name in ours}
    out.setdefault(_GLOBAL["head.weight"], text)  # tied
    out[UNUSED] = text if special is None else torch.cat([text, special])
    return out


def read_common(state: Mapping[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """Everything of a part except the mixer, under our names."""
    if part is None:
        return {ours: state[theirs] for ours, theirs in _GLOBAL.items() if theirs in state}
    prefix = layer_prefix(config, part)
    return {f"layers.{part}.{ours}": state[f"{prefix}{theirs}"] for ours, theirs in _LAYER.items()}


def write_attention(ours: dict[str, Tensor], config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The softmax mixer of ``layer`` as ``wqkv`` and ``wo``, moved out of ``ours``."""
    mixer, theirs, stack = f"layers.{layer}.mixer.", f"{layer_prefix(config, layer)}attention.", config.stack_of(layer)
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        if f"{mixer}q_proj.{kind}" in ours:
            q, k, v = (ours.pop(f"{mixer}{name}_proj.{kind}") for name in "qkv")
            out[f"{theirs}wqkv.{kind}"] = merge_qkv(q, k, v, stack)
        if f"{mixer}o_proj.{kind}" in ours:
            out[f"{theirs}wo.{kind}"] = ours.pop(f"{mixer}o_proj.{kind}")
    return out


def read_attention(state: Mapping[str, Tensor], config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The softmax mixer of ``layer`` under our names."""
    mixer, theirs, stack = f"layers.{layer}.mixer.", f"{layer_prefix(config, layer)}attention.", config.stack_of(layer)
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        if f"{theirs}wqkv.{kind}" in state:
            parts = split_qkv(state[f"{theirs}wqkv.{kind}"], stack)
            out |= {f"{mixer}{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        if f"{theirs}wo.{kind}" in state:
            out[f"{mixer}o_proj.{kind}"] = state[f"{theirs}wo.{kind}"]
    return out


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, stack: StackConfig) -> Tensor:
    """q (h·p, …), k (g·p, …), v (g·p, …) → wqkv ((h+2g)·p, …), grouped by key/value head as (its q heads | k | v)."""
    g, p = stack.num_kv_heads, stack.head_dim
    groups = [part.reshape(g, -1, p, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(groups, dim=1).reshape(-1, *q.shape[1:])


def split_qkv(wqkv: Tensor, stack: StackConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`merge_qkv`."""
    g, p, rest = stack.num_kv_heads, stack.head_dim, wqkv.shape[1:]
    groups = wqkv.reshape(g, -1, p, *rest)  # (g, h/g + 2, p, …)
    q, k, v = groups[:, :-2], groups[:, -2], groups[:, -1]
    return q.reshape(-1, *rest).contiguous(), k.reshape(-1, *rest).contiguous(), v.reshape(-1, *rest).contiguous()


# ---------------------------------------------------------------------------------------------- config


def config_from_hovle(data: Mapping[str, Any], where: str | Path, layer_map: tuple[str, ...] = ()) -> ModelConfig:
    """Our config for a HoVLE ``config.json``. A missing key takes the default of the published class."""
    top = Section(data, where)
    embedding, llm = top.section("embedding_config"), top.section("llm_config")
    _refuse_unsupported(top, embedding, llm)

    hidden = llm.size("hidden_size")
    for key in ("hidden_size", "llm_hidden_size"):
        if embedding.size(key, hidden) != hidden:
            raise embedding.error(key, f"is {embedding.data[key]}, but 'llm_config.hidden_size' is {hidden}")
    vocab = llm.size("vocab_size")
    text_vocab = embedding.size("llm_vocab_size", vocab)
    specials = embedding.get("special_token_maps", dict, {})
    bias = embedding.get("attention_bias", bool, False)
    try:
        return ModelConfig(
            hidden_size=hidden,
            vocab_size=vocab,
            text_vocab_size=None if text_vocab == vocab else text_vocab,
            embedding=_stack(embedding, hidden, bias=bias, eps=1e-5, length=4096),
            decoder=_stack(llm, hidden, bias=llm.get("bias", bool, True), eps=1e-6, length=2048),
            vision=_vision(top, embedding),
            layer_map=layer_map,
            img_context_token_id=embedding.get("img_context_token_id", int, 92546),
            special_token_maps=dict(specials),
            bos_token_id=llm.get("bos_token_id", int, 1),
            eos_token_id=llm.get("eos_token_id", int, 2),
            pad_token_id=llm.get("pad_token_id", int, 0),
            template=top.get("template", str, "internlm2-chat"),
            system_message=None if data.get("system_message") is None else top.get("system_message", str),
            dynamic_image_size=top.get("dynamic_image_size", bool, False),
            use_thumbnail=top.get("use_thumbnail", bool, False),
            min_dynamic_patch=top.size("min_dynamic_patch", 1),
            max_dynamic_patch=top.size("max_dynamic_patch", 6),
        )
    except UserError:
        raise
    except ValueError as refusal:
        raise UserError(f"{where}: {refusal}") from refusal


def _refuse_unsupported(top: Section, embedding: Section, llm: Section) -> None:
    """Refuse fields that mean another network than the one we build."""
    top.require("ps_version", ("v2",))
    top.require("pad2square", (False,))
    top.require("normalize_encoder_output", (False,))
    embedding.require("use_ls", (False,))
    embedding.require("mlp_bias", (False,))
    embedding.require("num_channels", (3,))
    embedding.require("pixel_shuffle_loc", ("pre", "post", "none"))
    embedding.require("hidden_act", ("silu",))
    llm.require("hidden_act", ("silu",))
    llm.require("tie_word_embeddings", (False,))
    known = ("InternLM2ForCausalLM", "mmMambaForCausalLM")
    llm.require("architectures", (*known, *([name] for name in known)))


def _stack(section: Section, hidden: int, *, bias: bool, eps: float, length: int) -> StackConfig:
    heads = section.size("num_attention_heads")
    if hidden % heads:
        raise section.error("num_attention_heads", f"is {heads}, which does not divide the hidden size {hidden}")
    return StackConfig(
        num_layers=section.size("num_hidden_layers", least=0),
        intermediate_size=section.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=section.size("num_key_value_heads", heads),
        head_dim=hidden // heads,
        rms_norm_eps=section.get("rms_norm_eps", float, eps),
        rope_theta=section.get("rope_theta", float, 10000.0),
        rope_scaling=_rope_scaling(section),
        max_position_embeddings=section.size("max_position_embeddings", length),
        qkv_bias=bias,
        o_bias=bias,
    )


def _rope_scaling(section: Section) -> RopeScaling | None:
    if section.data.get("rope_scaling") is None:
        return None
    rope = section.section("rope_scaling")
    key = "type" if "type" in rope.data else "rope_type"
    kind = rope.get(key, str)
    if kind == "linear":
        return RopeScaling(type="linear", factor=rope.get("factor", float))
    if kind == "dynamic":
        return RopeScaling(type="dynamic", factor=rope.get("factor", float))
    raise rope.error(key, f"is {kind!r}: only 'linear' and 'dynamic' are supported")


def _vision(top: Section, embedding: Section) -> VisionConfig:
    size, patch = embedding.size("image_size"), embedding.size("patch_size", 14)
    tile = top.size("force_image_size", size)
    if tile != size:
        raise top.error("force_image_size", f"is {tile}, but 'embedding_config.image_size' is {size}")
    ratio = embedding.get("downsample_ratio", float, 0.5)
    if top.get("downsample_ratio", float, ratio) != ratio:
        raise top.error("downsample_ratio", f"differs from 'embedding_config.downsample_ratio' ({ratio})")
    if not 0 < ratio <= 1 or size % patch or (size // patch) % round(1 / ratio):
        raise embedding.error("image_size", f"is {size}, which {patch}-px patches and a ratio of {ratio} do not divide")
    where: Any = embedding.get("pixel_shuffle_loc", str, "pre")
    return VisionConfig(
        image_size=size,
        patch_size=patch,
        downsample_ratio=ratio,
        pixel_shuffle_loc=where,
        use_pixel_shuffle_proj=embedding.get("use_pixel_shuffle_proj", bool, True),
    )


def config_to_hovle(config: ModelConfig) -> dict[str, Any]:
    """Our config as a HoVLE ``config.json``. ``system_message`` is our extension, written only if it is set.

    Raises:
        UserError: naming a setting that the layout can't express.
    """
    vision = config.vision
    if vision is None:
        raise UserError("'vision' is null: the HoVLE layout has no text-only model")
    for name, stack in (("embedding", config.embedding), ("decoder", config.decoder)):
        if stack.head_dim * stack.num_heads != config.hidden_size:
            raise UserError(
                f"'{name}.head_dim' is {stack.head_dim}: the HoVLE layout asks for hidden_size / num_heads "
                f"({config.hidden_size} / {stack.num_heads})"
            )
        if stack.o_bias != stack.qkv_bias:
            raise UserError(
                f"'{name}.o_bias' is {stack.o_bias}: the HoVLE layout asks for that of 'qkv_bias' ({stack.qkv_bias})"
            )
        if stack.rope_scaling is not None and stack.rope_scaling.type == "llama3":
            raise UserError(f"'{name}.rope_scaling' is llama3: the HoVLE layout has linear and dynamic scaling only")
    text_vocab = config.vocab_size if config.text_vocab_size is None else config.text_vocab_size
    data: dict[str, Any] = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "embedding_config": {
            "model_type": "holistic_embedding",
            **_stack_to_hovle(config.embedding, config),
            "attention_bias": config.embedding.qkv_bias,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "downsample_ratio": vision.downsample_ratio,
            "pixel_shuffle_loc": vision.pixel_shuffle_loc,
            "use_pixel_shuffle_proj": vision.use_pixel_shuffle_proj,
            "use_ls": False,
            "img_context_token_id": config.img_context_token_id,
            "llm_hidden_size": config.hidden_size,
            "llm_vocab_size": text_vocab,
            "special_token_maps": dict(config.special_token_maps),
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            **_stack_to_hovle(config.decoder, config),
            "bias": config.decoder.qkv_bias,
            "vocab_size": config.vocab_size,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "tie_word_embeddings": False,
        },
        "force_image_size": vision.image_size,
        "downsample_ratio": vision.downsample_ratio,
        "ps_version": "v2",
        "template": config.template,
        "dynamic_image_size": config.dynamic_image_size,
        "use_thumbnail": config.use_thumbnail,
        "min_dynamic_patch": config.min_dynamic_patch,
        "max_dynamic_patch": config.max_dynamic_patch,
    }
    if config.system_message is not None:
        data["system_message"] = config.system_message
    return data


def _stack_to_hovle(stack: StackConfig, config: ModelConfig) -> dict[str, Any]:
    scaling = stack.rope_scaling
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": stack.num_layers,
        "intermediate_size": stack.intermediate_size,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "rms_norm_eps": stack.rms_norm_eps,
        "rope_theta": stack.rope_theta,
        "rope_scaling": None if scaling is None else {"type": scaling.type, "factor": scaling.factor},
        "max_position_embeddings": stack.max_position_embeddings,
        "hidden_act": "silu",
    }
