"""Registers our classes with transformers' Auto classes, each time one of their modules is imported.

``import mmmamba`` must not import transformers: that takes seconds. So :func:`register` puts an import hook in place.
When a module of :data:`REGISTRATIONS` is imported, the hook loads it with :class:`RegisteringLoader`, which runs the
module as usual and then registers our classes with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


def _config(auto: ModuleType) -> None:
    from mmmamba.hf.configuration import MMMambaConfig

    auto.AutoConfig.register(MMMambaConfig.model_type, MMMambaConfig)


def _model(auto: ModuleType) -> None:
    from mmmamba.hf.configuration import MMMambaConfig
    from mmmamba.hf.modeling import MMMambaForConditionalGeneration, MMMambaModel

    auto.AutoModel.register(MMMambaConfig, MMMambaModel)
    for kind in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if hasattr(auto, kind):  # some versions do not have the last one
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


#: The module of each Auto class → the function that registers our classes with it.
REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _config,
    "transformers.models.auto.modeling_auto": _model,
    "transformers.models.auto.image_processing_auto": _image_processor,
    "transformers.models.auto.tokenization_auto": _tokenizer,
    "transformers.models.auto.processing_auto": _processor,
}


class RegisteringLoader(SourceFileLoader):
    """Loads a module from its source file as Python does, then registers our classes with it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        REGISTRATIONS[module.__name__](module)


class AutoClassFinder(MetaPathFinder):
    """Finds the modules of :data:`REGISTRATIONS`, and no others."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTRATIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = RegisteringLoader(spec.loader.name, spec.loader.path)
        return spec


def register() -> None:
    """Register our classes: now with the Auto classes that are already imported, later with the others.

    A second call changes nothing.
    """
    if any(isinstance(finder, AutoClassFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, AutoClassFinder())
    for name, registration in REGISTRATIONS.items():
        if name in sys.modules:
            registration(sys.modules[name])
