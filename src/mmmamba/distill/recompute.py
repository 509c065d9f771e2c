"""What a backward pass computes anew instead of keeping it: parts of a model's layers, wrapped from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from mmmamba.model.layer import Layer
from mmmamba.model.model import Model


def recompute(model: Model, part: str) -> None:
    """Keep only the inputs of a part of each layer, and run it again when its gradients are wanted.

    Every operator gives the same bits again, so the gradients are the same to the bit (on a GPU as far as its kernels
    repeat themselves). Only passes with gradients are concerned.

    Args:
        part: ``none``, also after a stage that had another; ``mlp``, all that follows a layer's heads
            (:meth:`mmmamba.model.layer.Layer.rest`, compiled or not); ``layer``, whole layers.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for name in ("forward", "rest"):
            layer.__dict__.pop(name, None)  # back to the class's own
        if part == "mlp":
            layer.rest = _again(layer.rest)  # type: ignore[method-assign]
        elif part == "layer":
            layer.forward = _again(layer.forward)  # type: ignore[method-assign]


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    # Nothing here is random: no state of a generator has to be kept and read back from the device.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
