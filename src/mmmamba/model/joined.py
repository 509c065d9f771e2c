"""Matrices that read one input, laid side by side in memory, so that a decoding step reads them as one.

Each parameter stays what it was for everybody else: it has a storage of its own, with its own address and its own size,
which neither ``torch.save`` nor safetensors nor accelerate takes for a part of another. The storages just happen to
follow one another, and the whole matrix is kept here. No memory is taken twice.

They are laid out when a model is loaded or moved, when its tensors are new anyway, and at no other time: generating
leaves every storage where it is. A model whose matrices lie anywhere decodes with a product for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from mmmamba.model.layer import Layer, SwiGLU
from mmmamba.model.plain import plain

_WHOLE: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # by the first of the maps


def maps_of(layer: Layer) -> Iterator[list[nn.Linear]]:
    """The maps of a layer that read one input: into its mixer, in the order of a step's outputs, and into its MLP."""
    if maps := layer.mixer.step_maps():
        yield maps
    if isinstance(layer.mlp, SwiGLU):
        yield [layer.mlp.gate, layer.mlp.up]


def join(layers: nn.Module) -> None:
    """Lay the matrices of all layers side by side, unless they are; those that can't be stay where they are."""
    for layer in layers.modules():
        if isinstance(layer, Layer):
            for maps in maps_of(layer):
                if joined(maps) is None:
                    _join(maps)


def joined(maps: Sequence[nn.Linear]) -> Tensor | None:
    """The matrices (rows_i, d) of some maps as one (rows, d) that shares their memory; None where they lie apart."""
    whole = _WHOLE.get(maps[0])
    if whole is None:
        return None
    row = 0
    for one in maps:
        part = whole[row : row + one.out_features]
        if not plain(nn.Linear, one) or not _is(one.weight, part):
            del _WHOLE[maps[0]]  # moved or wrapped since: nothing of the old matrix is kept
            return None
        row += one.out_features
    return whole


def _is(weight: Tensor, part: Tensor) -> bool:
    """Whether two tensors are the same bytes, read alike."""
    alike = weight.shape == part.shape and weight.dtype == part.dtype and weight.device == part.device
    return alike and weight.data_ptr() == part.data_ptr()


@torch.no_grad()
def _join(maps: Sequence[nn.Linear]) -> None:
    if not all(plain(nn.Linear, one) for one in maps):
        return
    weights = [one.weight for one in maps]
    first = weights[0]
    alike = all(weight.dtype == first.dtype and weight.device == first.device for weight in weights)
    distinct = len({weight.data_ptr() for weight in weights}) == len(weights)
    if not alike or first.device.type not in ("cpu", "cuda") or not distinct or any(map(_is_lent, weights)):
        return
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = from_dlpack(part)  # the same bytes in a storage that begins and ends with them
    _WHOLE[maps[0]] = whole


def _is_lent(weight: Tensor) -> bool:
    """Whether others look into the memory: other processes, or tensors that it is a part of."""
    return weight.untyped_storage().nbytes() != weight.nbytes or (weight.device.type == "cpu" and weight.is_shared())
