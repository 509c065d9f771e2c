"""Turn decoder-only multimodal Transformers into linear-time state space models.

The verbs of the command line are functions here::

    import mmmamba

    model = mmmamba.load("nano-linear")
    processor = mmmamba.load_processor("nano-linear")
    mmmamba.distill_teacher("pico-linear", dry_run=True)  # mmmamba distill pico-linear --dry-run

A name is imported when it is first used, so that ``import mmmamba`` and ``mmmamba --help`` stay fast.
"""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from mmmamba.errors import UserError
from mmmamba.hf.registration import register
from mmmamba.version import __version__ as __version__

if TYPE_CHECKING:
    from mmmamba.benchmark.bench import bench
    from mmmamba.checkpoints import load
    from mmmamba.data.build import build as build_data
    from mmmamba.data.processor import Processor
    from mmmamba.distill.distill import distill as distill_teacher
    from mmmamba.distill.seeding import seed
    from mmmamba.distill.train_teacher import teach
    from mmmamba.evaluation.evaluate import evaluate
    from mmmamba.inference.chat import chat
    from mmmamba.inference.engine import generate
    from mmmamba.model.config import ModelConfig
    from mmmamba.model.model import Model

    load_processor = Processor.from_folder

__all__ = [
    "Model",
    "ModelConfig",
    "Processor",
    "UserError",
    "bench",
    "build_data",
    "chat",
    "distill_teacher",
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
    "distill_teacher": "mmmamba.distill.distill:distill",
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


register()  # with transformers' Auto classes, once they are imported
