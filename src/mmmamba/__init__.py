"""mmmamba: decoder-only multimodal Transformers into linear-time state space models.

The Python API mirrors the command line::

    import mmmamba

    model = mmmamba.load("nano-linear")
    processor = mmmamba.load_processor("nano-linear")

Names are imported when they are first used, so that ``import mmmamba`` and ``mmmamba --help`` stay fast.
"""

from __future__ import annotations

import importlib
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mmmamba import distill, hf
from mmmamba.errors import UserError

if TYPE_CHECKING:
    from mmmamba.benchmark.bench import bench
    from mmmamba.checkpoints import load
    from mmmamba.data.build import build as build_data
    from mmmamba.data.processor import Processor
    from mmmamba.distill.seeding import seed
    from mmmamba.distill.train_teacher import teach
    from mmmamba.evaluation.evaluate import evaluate
    from mmmamba.inference.chat import chat
    from mmmamba.inference.engine import generate
    from mmmamba.model.config import ModelConfig
    from mmmamba.model.model import Model

    load_processor = Processor.from_folder

__version__ = "0.1.0"

__all__ = [
    "Model",
    "ModelConfig",
    "Processor",
    "UserError",
    "bench",
    "build_data",
    "chat",
    "distill",
    "evaluate",
    "generate",
    "load",
    "load_processor",
    "seed",
    "teach",
]

_HOME = {
    "Model": "mmmamba.model.model:Model",
    "ModelConfig": "mmmamba.model.config:ModelConfig",
    "Processor": "mmmamba.data.processor:Processor",
    "bench": "mmmamba.benchmark.bench:bench",
    "build_data": "mmmamba.data.build:build",
    "chat": "mmmamba.inference.chat:chat",
    "evaluate": "mmmamba.evaluation.evaluate:evaluate",
    "generate": "mmmamba.inference.engine:generate",
    "load": "mmmamba.checkpoints:load",
    "load_processor": "mmmamba.data.processor:Processor.from_folder",
    "seed": "mmmamba.distill.seeding:seed",
    "teach": "mmmamba.distill.train_teacher:teach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmmamba' has no attribute '{name}'")
    module, _, attribute = _HOME[name].partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """Lets ``mmmamba.distill(...)`` be the verb although ``mmmamba.distill`` is the package it lives in."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("mmmamba.distill.distill").distill(*args, **options)


distill.__class__ = _CallablePackage

hf.register()  # with transformers' Auto classes, once they are imported
