"""SOLO ("A Single Transformer for Scalable Vision-Language Modeling"): a Mistral decoder that reads patches of pixels.

The tensors are Mistral's, and one more matrix, ``model.embed_vision_patch.weight`` (d, 3·p·p). Its result is added to
the embedding of the mark ``<vpatch>``. Names, marks and sizes come from the public code (modeling, conversion script,
demo notebook). We have not checked them on a released checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmmamba.checkpoints.llama import config_from_llama, read_llama, write_llama
from mmmamba.checkpoints.section import Section
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig, VisionConfig

ARCHITECTURE = "SoloForCausalLM"

#: These are not in ``config.json``; the published code has both as constants (``<vpatch>`` follows Mistral's 32,000
#: pieces and ``<vision>``; a picture's longer side is at most 32 patches of 32 pixels).
PATCH_TOKEN_ID = 32001
MAX_SIDE = 1024

_OURS, _THEIRS = "vision.patch_embedding.weight", "model.embed_vision_patch.weight"


def is_solo(data: Mapping[str, Any]) -> bool:
    """Whether a parsed ``config.json`` is SOLO's. (Its ``model_type`` is Mistral's.)"""
    return data.get("architectures") == [ARCHITECTURE] or "vision_patch_size" in data


def config_from_solo(data: Mapping[str, Any], where: str | Path) -> ModelConfig:
    """Our config for a SOLO ``config.json``. Code that ``auto_map`` names is not needed and not run."""
    top = Section(data, where)
    top.require("architectures", ([ARCHITECTURE],))
    ids = {"bos_token_id": 1, "eos_token_id": 2}  # the defaults of SOLO's config class
    mistral = {**ids, **data, "model_type": "mistral", "architectures": None, "auto_map": None}
    config = config_from_llama(mistral, where)
    if config.vocab_size <= PATCH_TOKEN_ID:
        raise top.error("vocab_size", f"is {config.vocab_size}: no room for the token {PATCH_TOKEN_ID}, <vpatch>")
    patch = top.size("vision_patch_size", 32)
    try:
        vision = VisionConfig(
            image_size=patch,
            patch_size=patch,
            pixel_shuffle_loc="none",
            use_pixel_shuffle_proj=False,
            max_side=MAX_SIDE,
        )
    except ValueError as refusal:
        raise UserError(f"{where}: 'vision_patch_size' is {patch}: {refusal}") from refusal
    return replace(config, vision=vision, img_context_token_id=PATCH_TOKEN_ID, template="solo", system_message="")


def read_solo(state: Mapping[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """The tensors of a part under our names."""
    ours = read_llama(state, config, part)
    return ours if part is not None else {**ours, _OURS: state[_THEIRS]}


def write_solo(ours: dict[str, Tensor], config: ModelConfig, part: int | None) -> dict[str, Tensor]:
    """Our tensors of a part, moved out of ``ours``, under SOLO's names."""
    theirs = write_llama(ours, config, part)
    # HoVLE's patches have more parameters. They stay in `ours`, and the caller refuses them by name.
    if part is None and config.vision is not None and config.vision.max_side is not None:
        theirs[_THEIRS] = ours.pop(_OURS)
    return theirs
