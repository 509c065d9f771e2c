"""The tiny geometry of the golden files, for tests that need a model or a processor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmmamba.model import Mamba2Options, ModelConfig, StackConfig, VisionConfig

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
WORDS = ["what colour is the shape in the picture ?", "how many red circles are there ?", "is it left of the square ?"]


def make_config(layer_map: tuple[str, ...] = (), mixer: Mamba2Options | None = None, **changes: Any) -> ModelConfig:
    """Hidden 64, 4 heads, 2 groups, head dim 16, 2 + 3 layers, 56-px tiles of 14-px patches."""
    stack = StackConfig(num_layers=2, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5)
    config = ModelConfig(
        hidden_size=64,
        vocab_size=320,
        embedding=stack,
        decoder=replace(stack, num_layers=3, intermediate_size=128, rms_norm_eps=1e-6),
        vision=VisionConfig(image_size=56, patch_size=14),
        layer_map=layer_map,
        mixer=mixer or Mamba2Options(),
        img_context_token_id=SPECIALS.index("<IMG_CONTEXT>"),
        system_message="",
        max_dynamic_patch=4,
    )
    return replace(config, **changes)
