"""Our models, processors and configs as transformers classes.

After ``import mmmamba``, transformers' Auto classes load our folders (:mod:`mmmamba.hf.registration`). transformers
takes seconds to import, so nothing here imports it before a class is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmmamba.hf.registration import register

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
