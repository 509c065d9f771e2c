"""The Llama family of text decoders: their ``config.json`` and tensor names ↔ ours.

One network with small differences, which :data:`FAMILIES` lists; the names are those of transformers. Whatever would
make another network than the one we build is refused by the name of its field.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmmamba.checkpoints.section import Section
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.model.config import ModelConfig
from mmmamba.model.stack import RopeScaling, StackConfig

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is special about one ``model_type``. The values are the defaults of transformers' classes for missing keys.

    Attributes:
        bias: which projections have biases: ``field`` as ``attention_bias`` says (q, k, v and o), ``qkv`` always those
            three, ``none``.
        max_position_embeddings: longest text.
        num_kv_heads: key/value heads; None for as many as there are heads.
        window: where a sliding window is written: ``none``, ``always`` (``sliding_window``, which may be null), or
            ``switched`` (only where ``use_sliding_window`` says so, and in layers from ``max_window_layers`` on).
    """

    bias: Literal["field", "qkv", "none"]
    max_position_embeddings: int
    num_kv_heads: int | None
    window: Literal["none", "always", "switched"]


FAMILIES = {
    "llama": Family(bias="field", max_position_embeddings=2048, num_kv_heads=None, window="none"),
    "mistral": Family(bias="none", max_position_embeddings=131072, num_kv_heads=8, window="always"),
    "qwen2": Family(bias="qkv", max_position_embeddings=32768, num_kv_heads=32, window="switched"),
}
_WINDOW = 4096  # of Mistral and Qwen2, if the key is missing

_OUTSIDE = {"text_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_HEAD = "lm_head.weight"
_LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    **{f"mixer.{name}_proj.{kind}": f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")},
}


# ---------------------------------------------------------------------------------------------- tensors


def read_llama(state: Mapping[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """The tensors of a part, under our names. ``state`` has every tensor that ``config`` needs.

    Raises:
        UserError: the config ties the head, but the file has another matrix for it.
    """
    if part is not None:
        names = {f"layers.{part}.{ours}": f"model.layers.{part}.{theirs}" for ours, theirs in _LAYER.items()}
        return {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    out = {ours: state[theirs] for ours, theirs in _OUTSIDE.items()}
    if not config.tie_word_embeddings:
        out["head.weight"] = state[_HEAD]
    elif _HEAD in state and not torch.equal(state[_HEAD], out["text_embeddings.weight"]):
        raise UserError(f"'{_HEAD}' differs from the embeddings, but 'tie_word_embeddings' is true")
    return out


def write_llama(ours: dict[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """Our tensors of a part, moved out of ``ours``, under transformers' names. A tied head is not written."""
    if part is not None:
        names = {f"layers.{part}.{name}": f"model.layers.{part}.{theirs}" for name, theirs in _LAYER.items()}
    else:
        names = {**_OUTSIDE, "head.weight": _HEAD}
    return {theirs: ours.pop(name) for name, theirs in names.items() if name in ours}


def unused(name: str, config: ModelConfig) -> bool:
    """Whether a file may hold ``name`` although nothing reads it.

    These are stored angles, and the second copy of a tied head (:func:`read_llama` compares it with the first).
    """
    return name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and config.tie_word_embeddings)


# ---------------------------------------------------------------------------------------------- config


def config_from_llama(data: Mapping[str, Any], where: str | Path) -> ModelConfig:
    """Our config of a ``config.json`` in the form of transformers 4 (``rope_theta``, ``rope_scaling``) or 5
    (``rope_parameters``). ``generation_config.json`` beside ``where``, if there, adds its end-of-text tokens.

    A sliding window that is shorter than the longest text is not built. The model is exact up to the window, so the
    window becomes its longest text, and a warning says so.
    """
    top = Section(data, where)
    family = FAMILIES.get(top.get("model_type", str))
    if family is None:
        raise top.error("model_type", f"is {data['model_type']!r}: only {', '.join(FAMILIES)} are supported")
    _refuse_unsupported(top)
    bias = family.bias == "field" and top.get("attention_bias", bool, False)
    try:
        decoder = StackConfig(
            num_layers=top.size("num_hidden_layers"),
            intermediate_size=top.size("intermediate_size"),
            num_heads=(heads := top.size("num_attention_heads")),
            num_kv_heads=_kv_heads(top, family, heads),
            head_dim=_head_dim(top, heads),
            rms_norm_eps=top.get("rms_norm_eps", float, 1e-6),
            **_rope(top),
            max_position_embeddings=top.size("max_position_embeddings", family.max_position_embeddings),
            qkv_bias=bias or family.bias == "qkv",
            o_bias=bias,
        )
        decoder = _within_window(top, family, decoder)
        eos, *more = _end_tokens(top) or [-1]
        return ModelConfig(
            hidden_size=top.size("hidden_size"),
            vocab_size=top.size("vocab_size"),
            embedding=replace(decoder, num_layers=0),
            decoder=decoder,
            tie_word_embeddings=top.get("tie_word_embeddings", bool, False),
            bos_token_id=top.get("bos_token_id", int, -1),
            eos_token_id=eos,
            pad_token_id=top.get("pad_token_id", int, eos),
            stop_token_ids=tuple(more),
            template="tokenizer",
        )
    except UserError:
        raise
    except ValueError as refusal:
        raise UserError(f"{where}: {refusal}") from refusal


def _refuse_unsupported(top: Section) -> None:
    """Refuse fields that mean another network than the one we build."""
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[top.data["model_type"]]
    top.require("architectures", ([f"{name}ForCausalLM"],))
    top.require("hidden_act", ("silu",))
    top.require("mlp_bias", (False,))
    top.require("partial_rotary_factor", (1.0,))
    for key in ("qk_layernorm", "use_qk_norm", "qk_norm", "is_encoder_decoder", "add_cross_attention", "alibi"):
        top.require(key, (False,))
    for key in ("num_experts", "num_local_experts"):
        top.require(key, (0, 1))
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers"):
        if top.data.get(key):
            raise top.error(key, f"is {top.data[key]!r}: it is not supported")
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        top.require(key, (1.0,))
    if top.data.get("auto_map"):
        raise top.error("auto_map", "names code in the folder, which is never run")
    if top.data.get("quantization_config"):
        raise top.error("quantization_config", "is set: quantised weights are not read; give the unquantised model")


def _kv_heads(top: Section, family: Family, heads: int) -> int:
    absent = "num_key_value_heads" not in top.data
    return top.size("num_key_value_heads", (absent and family.num_kv_heads) or heads)


def _head_dim(top: Section, heads: int) -> int:
    hidden = top.size("hidden_size")
    if top.data.get("head_dim") is None and hidden % heads:
        raise top.error("num_attention_heads", f"is {heads}, which does not divide the hidden size {hidden}")
    return top.size("head_dim", hidden // heads)


def _rope(top: Section) -> dict[str, Any]:
    """Our ``rope_theta`` and ``rope_scaling``."""
    new = top.data.get("rope_parameters") is not None
    if top.data.get("rope_scaling" if not new else "rope_parameters") is None:
        return {"rope_theta": top.get("rope_theta", float, 10000.0)}
    if new and top.data.get("rope_scaling") is not None:
        raise top.error("rope_scaling", "is set beside 'rope_parameters': only one of them may be")
    rope = top.section("rope_parameters" if new else "rope_scaling")
    theta = top.get("rope_theta", float, rope.get("rope_theta", float, 10000.0))
    if rope.get("rope_theta", float, theta) != theta:
        raise rope.error("rope_theta", f"is {rope.data['rope_theta']}, but 'rope_theta' is {theta}")
    rope.require("partial_rotary_factor", (1.0,))
    key = "rope_type" if "rope_type" in rope.data else "type"
    kind = rope.get(key, str, "default")
    rope.require(key, ("default", "linear", "dynamic", "llama3"))
    fields = {"linear": ["factor"], "dynamic": ["factor"], "llama3": [*_LLAMA3, "factor"]}.get(kind, [])
    for name, value in rope.data.items():
        if value is not None and name not in ("rope_theta", "partial_rotary_factor", "rope_type", "type", *fields):
            raise rope.error(name, f"is {value!r}: it has no meaning for '{key}' {kind!r}")
    if kind == "default":
        return {"rope_theta": theta}
    values = {name: rope.get(name, int if name == _LLAMA3[2] else float) for name in fields}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(type=kind, **values)}  # type: ignore[arg-type]


_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _within_window(top: Section, family: Family, stack: StackConfig) -> StackConfig:
    """The stack, with its longest text limited to the sliding window: so far, attention covers everything."""
    kinds = top.get("layer_types", list, [])
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise top.error("layer_types", f"has {kind!r}: only 'full_attention' and 'sliding_attention' are supported")
    switched = family.window == "switched"
    slides = family.window == "always" or (
        switched
        and top.get("use_sliding_window", bool, False)
        and ("sliding_attention" in kinds if kinds else top.get("max_window_layers", int, 28) < stack.num_layers)
    )
    if not slides:
        if "sliding_attention" in kinds and not switched:
            raise top.error("layer_types", "has 'sliding_attention', which this model_type does not know")
        return stack
    if "sliding_window" in top.data and top.data["sliding_window"] is None:
        return stack
    window = top.size("sliding_window", _WINDOW)
    if window >= stack.max_position_embeddings:
        return stack
    if stack.rope_scaling is not None and stack.rope_scaling.type == "dynamic":
        raise top.error("sliding_window", f"is {window}: with dynamic RoPE scaling only null is supported")
    _warn_of_window(str(top.where), window, stack.max_position_embeddings)
    return replace(stack, max_position_embeddings=window)


@cache
def _warn_of_window(where: str, window: int, longest: int) -> None:
    """Warn once for each file, however often it is read."""
    log.warning(
        "%s: attention slides over a window of %d tokens, which is not built: the model is exact up to that length, "
        "and max_position_embeddings is %d instead of %d",
        where, window, window, longest,
    )  # fmt: skip


def _end_tokens(top: Section) -> list[int]:
    """The ids that end a text: first those of the config, then those of ``generation_config.json``."""
    beside = Path(top.where).with_name(GENERATION_CONFIG)
    sections = [top, Section(read_json(beside), beside)] if beside.is_file() else [top]
    found: list[int] = []
    for section in sections:
        ids = section.data.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if not isinstance(token, int) or isinstance(token, bool):
                raise section.error("eos_token_id", f"must be an int or a list of them, got {ids!r}")
            found.append(token)
    return list(dict.fromkeys(found))
