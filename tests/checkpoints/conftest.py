"""Checkpoint folders made of the golden files, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmmamba.checkpoints.io import write_safetensors
from mmmamba.model import Model


@pytest.fixture
def golden_folder(golden, tmp_path: Path) -> Callable[[str], Path]:
    """``golden_folder(name)`` → a folder as the published code writes it, from a golden file's weights."""

    def build(name: str) -> Path:
        tensors, info = golden(name)
        config = info["config"]
        if "softmax_attention_global_indices" in info:
            softmax = info["softmax_attention_global_indices"]
            config["model_type"] = "mmMamba_chat"
            for key, first in (("embedding_config", 0), ("llm_config", 8)):  # decoder layers are counted from 8
                layers = range(config[key]["num_hidden_layers"])
                config[key]["layers_block_type"] = ["mha" if first + i in softmax else "mamba2" for i in layers]
        folder = tmp_path / f"golden_{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        weights = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
        write_safetensors(folder / "model.safetensors", weights)
        return folder

    return build


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """``edit_config(folder, {"llm_config.bias": 3})``: change fields of config.json; None stays null, ... removes."""

    def edit(folder: Path, changes: dict[str, Any]) -> None:
        data = json.loads((folder / "config.json").read_text())
        for dotted, value in changes.items():
            *path, key = dotted.split(".")
            section = data
            for part in path:
                section = section[part]
            if value is ...:
                del section[key]
            else:
                section[key] = value
        (folder / "config.json").write_text(json.dumps(data))

    return edit


@pytest.fixture
def edit_weights() -> Callable[..., None]:
    """``edit_weights(folder, change)``: ``change`` gets the dict of tensors and alters it."""

    def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


@pytest.fixture
def same_model(golden) -> Callable[[Model, Model], None]:
    """``same_model(a, b)``: the same parameters and the same logits, bit for bit."""
    pixels = golden("hovle_tiny_A")[0]["in.pixel_values"]

    @torch.no_grad()
    def check(a: Model, b: Model) -> None:
        assert a.config.layer_map == b.config.layer_map
        left, right = a.state_dict(), b.state_dict()
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype, name
            assert torch.equal(left[name], right[name]), name
        image = a.config.img_context_token_id
        ids = torch.tensor([[1, *[image] * a.config.vision.tokens_per_tile, 5, 9, 3]] * 2)
        assert torch.equal(a(ids, pixels).logits, b(ids, pixels).logits)

    return check
