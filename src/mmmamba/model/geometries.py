"""Geometries by name: networks that can be built, or whose size can be estimated, without a checkpoint."""

from __future__ import annotations

import difflib
from dataclasses import replace

from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig, VisionConfig
from mmmamba.model.stack import StackConfig

_HOVLE_STACK = StackConfig(num_layers=8, intermediate_size=8192, num_heads=16, num_kv_heads=8, head_dim=128)
_NANO_STACK = StackConfig(
    num_layers=2, intermediate_size=704, num_heads=8, num_kv_heads=4, head_dim=32, max_position_embeddings=4096
)
_SMOLLM2_STACK = StackConfig(
    num_layers=30, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, max_position_embeddings=8192
)

#: hovle-2.6b: HoVLE-2.6B, the paper's teacher. Its published sizes; RoPE's base and scaling, the norms' epsilon and the
#: greatest position are in its own config.json. They cost neither memory nor time, so ours here are defaults.
#: nano: the built-in nano-teacher. smollm2-135m: SmolLM2-135M, a small language model.
GEOMETRIES: dict[str, ModelConfig] = {
    "hovle-2.6b": ModelConfig(
        hidden_size=2048,
        vocab_size=92_553,
        embedding=_HOVLE_STACK,
        decoder=replace(_HOVLE_STACK, num_layers=24),
        vision=VisionConfig(image_size=448, patch_size=14),
        img_context_token_id=92_546,
    ),
    "nano": ModelConfig(
        hidden_size=256,
        vocab_size=640,
        embedding=_NANO_STACK,
        decoder=replace(_NANO_STACK, num_layers=6),
        vision=VisionConfig(image_size=64, patch_size=8),
        system_message="",
        max_dynamic_patch=6,
    ),
    "smollm2-135m": ModelConfig(
        hidden_size=576,
        vocab_size=49_152,
        embedding=replace(_SMOLLM2_STACK, num_layers=0),
        decoder=_SMOLLM2_STACK,
        vision=None,
        tie_word_embeddings=True,
    ),
}


def geometry(name: str) -> ModelConfig:
    """The geometry called ``name``, softmax in every layer.

    Raises:
        UserError: when there is none of that name; names the nearest one.
    """
    if name not in GEOMETRIES:
        nearest = difflib.get_close_matches(name, GEOMETRIES, n=1, cutoff=0.4)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(GEOMETRIES)}"
        raise UserError(f"no geometry is called '{name}' ({hint})")
    return GEOMETRIES[name]
