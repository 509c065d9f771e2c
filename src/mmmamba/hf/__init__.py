"""The ecosystem face: folders of ours load in transformers as any model does, after ``import mmmamba``.

:func:`register` makes the Auto classes know our classes. transformers takes seconds to import, so that nothing
here imports it: each registration waits for the module of the Auto class that it speaks to.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmmamba.hf.configuration import MMMambaConfig
    from mmmamba.hf.image_processing import MMMambaImageProcessor
    from mmmamba.hf.modeling import MMMambaForConditionalGeneration, MMMambaModel
    from mmmamba.hf.processing import MMMambaProcessor
    from mmmamba.hf.state_cache import StateCache

__all__ = [
    "MMMambaConfig",
    "MMMambaForConditionalGeneration",
    "MMMambaImageProcessor",
    "MMMambaModel",
    "MMMambaProcessor",
    "StateCache",
    "register",
]

_HOME = {
    "MMMambaConfig": "configuration",
    "MMMambaForConditionalGeneration": "modeling",
    "MMMambaImageProcessor": "image_processing",
    "MMMambaModel": "modeling",
    "MMMambaProcessor": "processing",
    "StateCache": "state_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmmamba.hf' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mmmamba.hf.{_HOME[name]}"), name)


def _config(auto: ModuleType) -> None:
    from mmmamba.hf.configuration import MMMambaConfig

    auto.AutoConfig.register(MMMambaConfig.model_type, MMMambaConfig)


def _model(auto: ModuleType) -> None:
    from mmmamba.hf.configuration import MMMambaConfig
    from mmmamba.hf.modeling import MMMambaForConditionalGeneration, MMMambaModel

    auto.AutoModel.register(MMMambaConfig, MMMambaModel)
    for kind in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if hasattr(auto, kind):  # the last is not in every version
            getattr(auto, kind).register(MMMambaConfig, MMMambaForConditionalGeneration)


def _image_processor(auto: ModuleType) -> None:
    from mmmamba.hf.configuration import MMMambaConfig
    from mmmamba.hf.image_processing import MMMambaImageProcessor

    auto.AutoImageProcessor.register(MMMambaConfig, image_processor_classes={"pil": MMMambaImageProcessor})


def _tokenizer(auto: ModuleType) -> None:
    from transformers import PreTrainedTokenizerFast

    from mmmamba.hf.configuration import MMMambaConfig

    auto.AutoTokenizer.register(MMMambaConfig, fast_tokenizer_class=PreTrainedTokenizerFast)


def _processor(auto: ModuleType) -> None:
    from mmmamba.hf.configuration import MMMambaConfig
    from mmmamba.hf.processing import MMMambaProcessor

    auto.AutoProcessor.register(MMMambaConfig, MMMambaProcessor)


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _config,
    "transformers.models.auto.modeling_auto": _model,
    "transformers.models.auto.image_processing_auto": _image_processor,
    "transformers.models.auto.tokenization_auto": _tokenizer,
    "transformers.models.auto.processing_auto": _processor,
}


class _AfterImport(MetaPathFinder):
    """Finds the modules of the Auto classes as the other finders do, and registers with each once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _REGISTRATIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _REGISTRATIONS[name](module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make transformers' Auto classes know our model: at once where they are imported, else when they are."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, registration in _REGISTRATIONS.items():
        if name in sys.modules:
            registration(sys.modules[name])
