"""Folders that transformers loads, made of built-in and of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging
from wrapped import wrap

import mmmamba
from mmmamba.data.export import export_files


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
            export_files(made[name], mmmamba.load_processor(name))
        return made[name]

    return build
