"""What many tests share: the golden folder, a tiny model of the golden geometry, a tiny processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmmamba.model import MixerConfig, Model, ModelConfig, StackConfig, VisionConfig, initialise

GOLDEN = Path(__file__).parent / "golden"
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
WORDS = ["what colour is the shape in the picture ?", "how many red circles are there ?", "is it left of the square ?"]


@pytest.fixture(scope="session")
def golden():
    """``golden(name)`` → (tensors, json) of one golden file."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())

    return read


def make_config(layer_map: tuple[str, ...] = (), mixer: MixerConfig | None = None, **changes: Any) -> ModelConfig:
    """The golden geometry: hidden 64, 4 heads, 2 groups, head dim 16, 2 + 3 layers, 56-px tiles of 14-px patches."""
    stack = StackConfig(num_layers=2, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5)
    config = ModelConfig(
        hidden_size=64,
        vocab_size=320,
        embedding=stack,
        decoder=replace(stack, num_layers=3, intermediate_size=128, rms_norm_eps=1e-6),
        vision=VisionConfig(image_size=56, patch_size=14),
        layer_map=layer_map,
        mixer=mixer or MixerConfig(),
        img_context_token_id=SPECIALS.index("<IMG_CONTEXT>"),
        system_message="",
        max_dynamic_patch=4,
    )
    return replace(config, **changes)


@pytest.fixture
def tiny_config():
    return make_config


@pytest.fixture
def tiny_model():
    """``tiny_model(layer_map, mixer)`` → a random model whose every parameter differs from its starting point."""

    def build(layer_map: tuple[str, ...] = (), mixer: MixerConfig | None = None, seed: int = 0) -> Model:
        model = initialise(Model(make_config(layer_map, mixer)), seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_processor():
    """A processor of the tiny geometry with a small byte-level BPE."""
    from mmmamba.data.processor import Processor
    from mmmamba.data.tokenizer import train_bpe

    return Processor(train_bpe(WORDS * 4, 320, SPECIALS), make_config())
