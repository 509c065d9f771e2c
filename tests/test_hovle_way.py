"""What scripts/gpu/hovle.py makes at HoVLE's size is what it says (its run needs a GPU; nano's, two minutes)."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmmamba
from mmmamba.checkpoints import read_config
from mmmamba.checkpoints.hovle import config_to_hovle
from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import Processor
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.model import Model
from mmmamba.model.geometries import geometry

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "gpu" / "hovle.py"))


@pytest.fixture(scope="module")
def tokenizer(script: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_folder(mmmamba.checkpoints.resolve(script["TOKENIZER"]))


def test_the_teacher_is_read_as_hovle_is(script: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(geometry("nano"), img_context_token_id=tokenizer.token_id("<IMG_CONTEXT>"))
    data = config_to_hovle(config) | {"torch_dtype": "bfloat16"}
    script["write_teacher"](tmp_path / "teacher", config, data, tokenizer, torch.device("cpu"))
    assert read_config(tmp_path / "teacher") == config
    model = mmmamba.load(tmp_path / "teacher")
    assert isinstance(model, Model) and not model.config.new_layers
    assert Processor.from_folder(tmp_path / "teacher").tokenizer.vocab_size <= config.vocab_size
    logits = model(torch.randint(8, 600, (1, 32))).logits
    assert 0.5 < float(logits.detach().std()) < 2


def test_the_data_fits_hovle_and_some_of_it_is_cut(
    script: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(geometry("hovle-2.6b"), img_context_token_id=tokenizer.token_id("<IMG_CONTEXT>"))
    longest = 8192
    way: Any = SimpleNamespace(
        work=tmp_path,
        train=tmp_path / "train.jsonl",
        val=tmp_path / "val.jsonl",
        plan=SimpleNamespace(data=SimpleNamespace(max_length=longest)),
    )
    script["write_data"](way, tokenizer)
    counts = []
    for file, expected in ((way.train, script["TRAIN"]), (way.val, script["HELD_OUT"])):
        source = EncodedSource(JsonlDataset(file), Processor(tokenizer, config), max_length=longest, max_tiles=12)
        assert len(source) == expected
        counts += [(len(one.input_ids), one.cut, one.tiles.shape[0]) for one in map(source.encode, range(expected))]
    lengths, cut, tiles = zip(*counts, strict=True)
    assert min(lengths) < 1000 and max(lengths) == longest
    assert 0 < sum(map(bool, cut)) < 10
    assert min(tiles) == 0 and max(tiles) > 12  # twelve and a thumbnail
    assert 2000 < sum(lengths) / len(lengths) < 4000


def test_losses_are_compared_step_by_step(script: dict[str, Any]) -> None:
    def lines(*losses: float) -> list[dict[str, Any]]:
        return [{"stage": f"stage{i // 2 + 1}", "step": i % 2 + 1, "loss": loss} for i, loss in enumerate(losses)]

    compare = script["compare"]
    assert compare(lines(4, 2, 1), lines(4, 2, 1)) == {"stage1": 0, "stage2": 0}
    assert compare(lines(4, 2, 1), lines(4, 1, 1)) == {"stage1": 0.5, "stage2": 0}
    assert max(compare(lines(4, 2, 1), lines(4, 2)).values()) == math.inf
