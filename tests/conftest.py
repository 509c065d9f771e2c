"""What many tests share: the golden folder, a tiny model of the golden geometry, a tiny processor."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it once, when the first module that uses it is imported
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell in the background starts its commands so
    signal.signal(signal.SIGINT, signal.default_int_handler)

import goldens
from mmmamba.model import Mamba2Options, Model, initialise
from tiny import SPECIALS, WORDS, make_config

# The same examples every time: a test that passes goes on passing. HYPOTHESIS_PROFILE=random looks for others.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("random", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def golden():
    """``golden(name)`` → (tensors, json) of one golden file."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return goldens.tensors(name), goldens.about(name)

    return read


@pytest.fixture
def tiny_config():
    return make_config


@pytest.fixture
def tiny_model():
    """``tiny_model(layer_map, mixer)`` → a random model whose every parameter differs from its starting point."""

    def build(layer_map: tuple[str, ...] = (), mixer: Mamba2Options | None = None, seed: int = 0) -> Model:
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
    from mmmamba.data.bpe_training import train_bpe
    from mmmamba.data.processor import Processor

    return Processor(train_bpe(WORDS * 4, 320, SPECIALS), make_config())


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tiny_processor) -> Path:
    """The tiny model as a HoVLE folder. Tests must leave it as it is."""
    from mmmamba.checkpoints import save_hovle

    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    save_hovle(initialise(Model(make_config()), 0), tiny_processor, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A JSONL of six samples, with its pictures beside it. Tests must leave it as it is."""
    from small_run import make_data

    return make_data(tmp_path_factory.mktemp("data"))
