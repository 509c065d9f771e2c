"""transformers' ModelTesterMixin over the teacher, the hybrid and the linear student. Run by test_suites.py."""

from __future__ import annotations

import unittest
from dataclasses import replace
from typing import Any

import torch
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from transformers.models.auto import modeling_auto as auto

from mmmamba.hf import MMMambaConfig, MMMambaForConditionalGeneration, MMMambaModel
from mmmamba.model import ATTENTION, MAMBA2, ModelConfig
from tiny import make_config

IMAGE, TOKENS_PER_TILE = 0, 4  # a mark that is there in a vocabulary of four, too, which the mixin asks for


# A model of the library stands in these tables by name; without that the mixin asks it neither for losses nor more.
auto.MODEL_MAPPING_NAMES["mmmamba"] = MMMambaModel.__name__
for names in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    names["mmmamba"] = MMMambaForConditionalGeneration.__name__


def _config(layer_map: tuple[str, ...]) -> ModelConfig:
    """Two layers, one in each stack."""
    config = make_config()
    stacks = {name: replace(getattr(config, name), num_layers=1) for name in ("embedding", "decoder")}
    return replace(config, layer_map=layer_map, img_context_token_id=IMAGE, **stacks)


class Asked:
    """What the mixin asks of a model's tester: a small config and a batch of a picture of one tile and text a row."""

    is_training = True
    batch_size, seq_length = 3, 12

    def __init__(self, *layer_map: str) -> None:
        self.layer_map = layer_map
        ours = _config(layer_map)
        self.hidden_size, self.num_hidden_layers = ours.hidden_size, ours.num_layers
        self.num_attention_heads = ours.decoder.num_heads
        self.image_size, self.patch_size = 56, 14

    def get_config(self) -> MMMambaConfig:
        return MMMambaConfig(_config(self.layer_map))

    def prepare_config_and_inputs_for_common(self) -> tuple[MMMambaConfig, dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(20, 300, (self.batch_size, self.seq_length), generator=generator)
        ids[:, 1 : 1 + TOKENS_PER_TILE] = IMAGE
        pixels = torch.randn(self.batch_size, 3, 56, 56, generator=generator)
        return self.get_config(), {
            "input_ids": ids,
            "pixel_values": pixels,
            "attention_mask": torch.ones_like(ids),
        }


class _Suite(ModelTesterMixin, GenerationTesterMixin):  # the second is an empty stand-in: see source.py
    all_model_classes = (MMMambaModel, MMMambaForConditionalGeneration)
    layer_map: tuple[str, ...] = ()

    def setUp(self) -> None:
        self.model_tester = Asked(*self.layer_map)

    def _image_features_get_expected_num_hidden_states(self) -> int:
        return 1  # pictures are embedded by one layer

    def _image_features_get_expected_num_attentions(self) -> int:
        return 0


class TeacherTest(_Suite, unittest.TestCase):
    layer_map = (ATTENTION,) * 2


class HybridTest(_Suite, unittest.TestCase):
    layer_map = (ATTENTION, MAMBA2)
    has_attentions = False


class LinearTest(_Suite, unittest.TestCase):
    layer_map = (MAMBA2,) * 2
    has_attentions = False
