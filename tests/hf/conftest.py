"""Folders that transformers loads, made of built-in and of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging
from wrapped import TILES, wrap

import mmmamba
from mmmamba.data.tiling import normalise


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """``folder_of("pico-linear")`` → the built-in model as a whole folder. Tests must leave it as it is."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("folders") / name
            wrap(mmmamba.load(name)).save_pretrained(made[name])
            mmmamba.load_processor(name).save(made[name])
        return made[name]

    return build


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    """Three rows: a picture of one tile; text padded left; two tiles."""
    image, ids = [7] * 4, torch.full((3, 14), 2)
    rows = [[1, *image, 20, 30], [1, 40, 50, 60, 70], [1, 9, *image, 5, *image, 8, 11, 12]]
    for i, row in enumerate(rows):
        ids[i, 14 - len(row) :] = torch.tensor(row)
    mask = (torch.arange(14) >= 14 - torch.tensor([[len(row)] for row in rows])).long()
    pixels = normalise(torch.from_numpy(TILES)).double()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
