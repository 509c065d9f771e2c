"""Rounded tensors: how a delta stores a matrix, with 4 or 8 bits for each value.

A matrix ``NAME`` is stored as two tensors: its codes, ``NAME.int4`` or ``NAME.int8``, and ``NAME.scales``. Its values,
row after row, are cut into groups of 64; zeros fill the last group. With g groups::

    NAME.int4    (g, 32) uint8     two codes in a byte, the first in the low four bits, each plus 8
    NAME.int8    (g, 64) int8
    NAME.scales  (g,)    bfloat16
    NAME         = the teacher's tensor of that name and shape, or zero  +  codes · scales

The product and the sum are each rounded to float32, and the result to the dtype that ``config.json`` names: the same
bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Form = Literal["int8", "int4"]
Rounding = Literal["int8", "int4", "mixed"]

FORMS: tuple[Form, ...] = ("int8", "int4")
SCALES = "scales"
GROUP = 64
LEAST = 4096  # values; smaller tensors are not rounded

_DTYPES = {"int4": torch.uint8, "int8": torch.int8, SCALES: torch.bfloat16}
_LARGEST = {"int8": 127, "int4": 7}
_SHRINKS = torch.linspace(0.6, 1.0, 17).tolist()  # the scale of a group may cut off its largest values


def worth_rounding(tensor: Tensor) -> bool:
    """Whether a tensor is a large matrix with long rows (those of a convolution's kernel are short)."""
    return tensor.ndim >= 2 and tensor.shape[-1] >= GROUP and tensor.numel() >= LEAST


def form_for(name: str, rounding: Rounding) -> Form:
    """The form for a tensor.

    ``mixed`` rounds a mixer's matrices to int8 (a recurrence accumulates errors), others to int4.
    """
    if rounding == "mixed":
        return "int8" if ".mixer." in name else "int4"
    return rounding


def stored_rounded(name: str, shape: torch.Size, form: Form) -> dict[str, torch.Size]:
    """Name → shape of the tensors that store a rounded tensor."""
    groups = math.ceil(shape.numel() / GROUP)
    width = GROUP // 2 if form == "int4" else GROUP
    return {f"{name}.{form}": torch.Size([groups, width]), f"{name}.{SCALES}": torch.Size([groups])}


def form_of(name: str, stored: Container[str]) -> Form | None:
    """The form in which ``stored`` has the rounded tensor ``name``. None if it does not have it."""
    return next((form for form in FORMS if f"{name}.{form}" in stored), None)


def code_dtypes(expected: Iterable[str]) -> dict[str, torch.dtype]:
    """Name → dtype of those stored tensors that are codes or scales."""
    kinds = {name: name.rsplit(".", 1)[-1] for name in expected}
    return {name: _DTYPES[kind] for name, kind in kinds.items() if kind in _DTYPES}


def round_tensor(name: str, tensor: Tensor, base: Tensor | None, form: Form) -> dict[str, Tensor]:
    """The stored form of ``tensor``, given the teacher's. Each group gets the scale with the least squared error."""
    values = tensor.float() if base is None else tensor.float() - base.float()
    flat = values.reshape(-1)
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    largest = _LARGEST[form]
    peak = groups.abs().amax(1) / largest
    best, scales = torch.full_like(peak, math.inf), peak.bfloat16()
    for shrink in _SHRINKS:
        trial = (peak * shrink).bfloat16()
        error = (_codes(groups, trial, largest) * trial.float()[:, None] - groups).square().sum(1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, trial, scales)
    codes = _codes(groups, scales, largest)
    if form == "int8":
        packed = codes.to(torch.int8)
    else:
        nibbles = (codes + 8).to(torch.uint8)
        packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return {f"{name}.{form}": packed, f"{name}.{SCALES}": scales}


def _codes(groups: Tensor, scales: Tensor, largest: int) -> Tensor:
    steps = scales.float()[:, None]
    return torch.where(steps > 0, groups / steps, 0.0).round().clamp(-largest, largest)


def read_rounded(stored: Mapping[str, Tensor], name: str, shape: torch.Size, base: Tensor | None) -> Tensor:
    """The tensor in float32, given the teacher's."""
    form = form_of(name, stored)
    assert form is not None
    packed, scales = stored[f"{name}.{form}"], stored[f"{name}.{SCALES}"].float()
    if form == "int4":
        packed = torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), GROUP).to(torch.int8) - 8
    values = (packed.float() * scales[:, None]).reshape(-1)[: shape.numel()].view(shape)
    return values if base is None else base.float() + values
