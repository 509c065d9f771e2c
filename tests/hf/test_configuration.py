"""``config.json`` as transformers reads and writes it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from mmmamba.checkpoints import read_config
from mmmamba.errors import UserError
from mmmamba.hf import MMMambaConfig
from mmmamba.model import MAMBA2
from tiny import make_config


def test_round_trip_through_a_folder_that_mmmamba_reads_too(tmp_path: Path) -> None:
    ours = make_config((MAMBA2,) * 5, system_message="Sei höflich.")
    MMMambaConfig(ours).save_pretrained(tmp_path)
    assert read_config(tmp_path) == ours
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MMMambaConfig)
    assert loaded.model_config() == ours
    assert copy.deepcopy(loaded).model_config() == ours
    assert set(json.loads((tmp_path / "config.json").read_text())) == {
        "architectures", "model_type", "model", "delta", "tensors", "teacher"
    }  # fmt: skip


def test_what_transformers_asks_for() -> None:
    ours = make_config()
    config = MMMambaConfig(ours)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (320, 64, 5)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.image_token_id) == (1, 2, 2, 7)
    assert config.get_text_config() is config
    assert config.intermediate_size == 128 and config.max_position_embeddings == 8192
    assert not config.tie_word_embeddings
    assert MMMambaConfig(replace(ours, bos_token_id=-1)).bos_token_id is None


def test_changes_reach_the_nested_config() -> None:
    config = MMMambaConfig(make_config())
    config.vocab_size, config.pad_token_id, config.eos_token_id = 400, 0, None
    ours = config.model_config()
    assert (ours.vocab_size, ours.pad_token_id, ours.eos_token_id) == (400, 0, -1)
    with pytest.raises(UserError, match="eos_token_id' must be one token id"):
        config.eos_token_id = [2, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "missing required key 'model'"),
        ({"model": {"hidden_size": 3}}, "'model.vocab_size'"),
        ({"model": 3}, "'model' must be a mapping"),
        ({"model": make_config(), "delta": "yes"}, "'delta' must be"),
        ({"model": make_config(), "delta": True}, "'teacher' is missing"),
    ],
)
def test_a_wrong_config_is_named(data: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMMambaConfig(**data)
