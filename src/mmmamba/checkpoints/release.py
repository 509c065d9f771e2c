"""The layout of the published students (mmMamba-linear, mmMamba-hybrid) ↔ ours, with fused or separate projections.

It is the HoVLE layout with Mamba-2 tensors in the layers that ``layers_block_type`` calls ``mamba2``. It has one mixer,
the published one: whatever our mixer has switched on beside it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints.hovle import (
    config_from_hovle,
    config_to_hovle,
    layer_prefix,
    read_attention,
    read_common,
    write_attention,
    write_common,
)
from mmmamba.checkpoints.section import Section
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import ATTENTION, MAMBA2, Mamba2Options
from mmmamba.model.stack import StackConfig

MODEL_TYPE = "mmMamba_chat"

_KINDS = {"mamba2": MAMBA2, "mha": ATTENTION}
_START_ONLY = ("decay", "dt_min", "dt_max")  # options of the seeding: a trained mixer no longer depends on them

_MIXER = {"A_log": "A_log_bias", "dt_bias": "dt_bias", "conv.bias": "conv1d.bias", "o_proj.weight": "o_proj.weight"}
_FUSED = "wvkqgdt.weight"
_FUSED_ROWS = ("v_proj.weight", "k_proj.weight", "q_proj.weight", "gate_proj.weight", "dt_proj.weight")
_SEPARATE = {
    "v_proj.weight": "v_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "q_proj.weight": "q_proj.weight",
    "gate_proj.weight": "g_proj.weight",
    "dt_proj.weight": "in_proj.weight",
}
_CONV = ("conv.weight", "conv1d.weight")
_NORM = ("norm.weight", {True: "g_norm_swish_gate.weight", False: "g_norm.weight"})


# ---------------------------------------------------------------------------------------------- tensors


def write_release(
    ours: dict[str, Tensor], config: ModelConfig, part: int | None, *, fused: bool = True
) -> dict[str, Tensor]:
    """Our tensors of a part under the published students' names.

    Args:
        ours: our tensors of the part; what is written is taken out.
        config: the model's config.
        part: a global layer, or None for what is outside the layers.
        fused: one ``wvkqgdt`` matrix a layer, as released; else separate projections, as trained.

    Raises:
        UserError: naming the mixer option that the layout has no place for.
    """
    refuse_options(config)
    out = write_common(ours, config, part)
    if part is None:
        return out
    writers: dict[str, Callable[..., dict[str, Tensor]]] = {
        ATTENTION: write_attention,
        MAMBA2: partial(_write_mamba2, fused=fused),
    }
    return out | writers[config.layer_map[part]](ours, config, part)


def read_release(state: Mapping[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """The published students' tensors of a part under our names; ``state`` has all that ``config`` asks for."""
    out = read_common(state, config, part)
    if part is None:
        return out
    readers = {ATTENTION: read_attention, MAMBA2: read_mamba2}
    return out | readers[config.layer_map[part]](state, config, part)


def is_fused(names: Iterable[str]) -> bool:
    return any(name.endswith(f"attention.{_FUSED}") for name in names)


def _write_mamba2(ours: dict[str, Tensor], config: ModelConfig, layer: int, *, fused: bool) -> dict[str, Tensor]:
    mixer, theirs = f"layers.{layer}.mixer.", f"{layer_prefix(config, layer)}attention."
    out = {f"{theirs}{b}": ours.pop(f"{mixer}{a}") for a, b in _MIXER.items()}
    out[f"{theirs}{_CONV[1]}"] = ours.pop(f"{mixer}{_CONV[0]}").unsqueeze(1)  # (c, k) → (c, 1, k)
    out[f"{theirs}{_NORM[1][fused]}"] = ours.pop(f"{mixer}{_NORM[0]}")
    if fused:
        out[f"{theirs}{_FUSED}"] = torch.cat([ours.pop(f"{mixer}{name}") for name in _FUSED_ROWS])
    else:
        out |= {f"{theirs}{b}": ours.pop(f"{mixer}{a}") for a, b in _SEPARATE.items()}
    return out


def read_mamba2(state: Mapping[str, Tensor], config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The Mamba-2 mixer of ``layer`` under our names, from fused or separate projections."""
    mixer, theirs = f"layers.{layer}.mixer.", f"{layer_prefix(config, layer)}attention."
    fused = f"{theirs}{_FUSED}" in state
    out = {f"{mixer}{a}": state[f"{theirs}{b}"] for a, b in _MIXER.items()}
    out[f"{mixer}{_CONV[0]}"] = state[f"{theirs}{_CONV[1]}"].squeeze(1)
    out[f"{mixer}{_NORM[0]}"] = state[f"{theirs}{_NORM[1][fused]}"]
    if fused:
        parts = state[f"{theirs}{_FUSED}"].split(_fused_rows(config.stack_of(layer)))
        out |= {f"{mixer}{name}": part.contiguous() for name, part in zip(_FUSED_ROWS, parts, strict=True)}
    else:
        out |= {f"{mixer}{a}": state[f"{theirs}{b}"] for a, b in _SEPARATE.items()}
    return out


def _fused_rows(stack: StackConfig) -> list[int]:
    """Rows of v, k, q, the gate and dt in ``wvkqgdt``."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    return [g * p, g * p, h * p, h * p, h]


def reason(name: str) -> str:
    """Why a released file may lack or have the tensor ``name`` ('' when there is nothing to add)."""
    if name.endswith((".A_log_bias", ".dt_bias")):
        return (
            "A_log_bias and dt_bias are the trained decays, which nothing can stand in for "
            "(the published stage-3 checkpoints lack them: take them from the stage-2 checkpoint)"
        )
    if name.endswith((".wqkv.weight", f".{_FUSED}")):
        return "'layers_block_type' (mamba2 | mha) must say what each layer's tensors are"
    return ""


# ---------------------------------------------------------------------------------------------- config


def config_from_release(data: Mapping[str, Any], where: str | Path) -> ModelConfig:
    """Our config of a released ``config.json``."""
    top = Section(data, where)
    layer_map = tuple(kind for key in ("embedding_config", "llm_config") for kind in _layer_kinds(top.section(key)))
    return config_from_hovle(data, where, layer_map)


def _layer_kinds(section: Section) -> list[str]:
    kinds = section.get("layers_block_type", list)
    layers = section.get("num_hidden_layers", int)
    if len(kinds) != layers:
        raise section.error("layers_block_type", f"has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in _KINDS:
            raise section.error("layers_block_type", f"has {kind!r}: only 'mamba2' and 'mha' are supported")
    return [_KINDS[kind] for kind in kinds]


def config_to_release(config: ModelConfig) -> dict[str, Any]:
    """A released ``config.json`` of ours."""
    refuse_options(config)
    data = config_to_hovle(config)
    names = {ours: theirs for theirs, ours in _KINDS.items()}
    kinds = [names[kind] for kind in config.layer_map]
    first = config.embedding.num_layers
    data |= {"architectures": ["mmMambaChatModel"], "model_type": MODEL_TYPE}
    data["embedding_config"] |= {"model_type": "mmMamba_embedding", "layers_block_type": kinds[:first]}
    data["llm_config"] |= {
        "architectures": ["mmMambaForCausalLM"],
        "model_type": "mmMamba",
        "layers_block_type": kinds[first:],
    }
    return data


def refuse_options(config: ModelConfig) -> None:
    """Refuse a kind of layer, or an option of the mixer, that the layout has no place for, naming it."""
    for layer, kind in enumerate(config.layer_map):
        if kind not in _KINDS.values():
            raise UserError(
                f"layer {layer} is {kind!r}: the release layout holds {' and '.join(map(repr, _KINDS.values()))} only; "
                "write a student folder instead"
            )
    if MAMBA2 not in config.layer_map:
        return
    for field in fields(Mamba2Options):
        value = getattr(config.options(MAMBA2), field.name)
        if field.name not in _START_ONLY and value != field.default:
            raise UserError(
                f"'mixer.{field.name}' is {value!r}: the release layout holds the published mixer only "
                f"({field.name}={field.default!r}); write a student folder instead"
            )
