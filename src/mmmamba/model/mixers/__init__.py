"""The kinds of layers, one file each; :mod:`mmmamba.model.mixers.contract` says what a kind is."""

from mmmamba.model.mixers.attention import ATTENTION, Attention, AttentionOptions
from mmmamba.model.mixers.contract import (
    Init,
    Mixer,
    Options,
    Part,
    default_options,
    float32_names,
    kind_named,
    kind_of,
    kinds,
    options_for,
    register,
)
from mmmamba.model.mixers.cost import Passes, StateBytes
from mmmamba.model.mixers.layer_state import LayerState, Pool, PoolSpec
from mmmamba.model.mixers.mamba2 import MAMBA2, Mamba2, Mamba2Options

__all__ = [
    "ATTENTION",
    "MAMBA2",
    "Attention",
    "AttentionOptions",
    "Init",
    "LayerState",
    "Mamba2",
    "Mamba2Options",
    "Mixer",
    "Options",
    "Part",
    "Passes",
    "Pool",
    "PoolSpec",
    "StateBytes",
    "default_options",
    "float32_names",
    "kind_named",
    "kind_of",
    "kinds",
    "options_for",
    "register",
]
