"""Numbers of a config that no model has: refused before anything is built."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from mmmamba.data.tiling import check_tiles, grid
from mmmamba.errors import UserError
from mmmamba.model import ModelConfig, RopeScaling
from tiny import make_config

WRONG = {
    "hidden_size": (0, -64, 10**9),
    "vocab_size": (0, -1, 10**9),
    "text_vocab_size": (0, 10**9),
    "min_dynamic_patch": (0, -1),
    "max_dynamic_patch": (0, 10**7),
    "img_context_token_id": (320, -2),
    "eos_token_id": (320, 10**6),
    "bos_token_id": (320, -5),
    "pad_token_id": (10**9,),
    "stop_token_ids": ((3, 320),),
    "special_token_maps": ({"<img>": 320},),
    "decoder.num_layers": (-1, 10**6),
    "decoder.intermediate_size": (0, 10**9),
    "embedding.num_heads": (0, -4, 10**6),
    "embedding.num_kv_heads": (0, -2),
    "decoder.head_dim": (0, -16, 10**6),
    "decoder.rms_norm_eps": (-1.0, math.nan, math.inf),
    "decoder.rope_theta": (0.0, -1.0, math.nan, math.inf),
    "embedding.max_position_embeddings": (0, -8, 10**20),
    "vision.image_size": (0, -56, 57, 10**6),
    "vision.patch_size": (0, -14, 13),
    "vision.downsample_ratio": (0.0, -0.5, 2.0, math.nan, 1e-9),
}


def changed(key: str, value: object) -> ModelConfig:
    config = make_config()
    part, _, name = key.rpartition(".")
    return replace(config, **({part: replace(getattr(config, part), **{name: value})} if part else {name: value}))


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_zero_negative_and_huge_numbers_are_refused(key: str, value: object) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        changed(key, value)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_scaling_factors_that_scale_nothing(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        RopeScaling(type="linear", factor=factor)


def test_how_many_tiles_a_picture_may_have() -> None:
    assert grid(9000, 9000, 56, 1, 1024) == (32, 32)
    for most in (30_000_000, 0, -1):
        with pytest.raises(UserError, match="max_tiles must be at"):
            grid(100, 100, 56, 1, most)
        with pytest.raises(UserError, match="--max-tiles must be at"):
            check_tiles(most, "--max-tiles")


@pytest.mark.parametrize("token", ["7", None, 1.0, True, [7]])
def test_an_id_that_is_no_number_is_named(token):
    with pytest.raises(ValueError, match=r"special_token_maps.* must be the id of a token"):
        replace(make_config(), special_token_maps={"<mark>": token})
