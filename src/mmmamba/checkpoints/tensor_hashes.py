"""Hashes of tensors, over their names, kinds, shapes and bytes. They tell whether tensors are unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mmmamba.device import cores
from mmmamba.errors import UserError


def digest(texts: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over texts in order, and over tensors (name, type, shape, bytes) in any order."""
    return digest_lines(texts, lines_of(tensors))


def digest_lines(texts: Sequence[str], lines: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([list(texts), list(lines)]).encode()).hexdigest()


def lines_of(tensors: Mapping[str, Tensor]) -> list[str]:
    with ThreadPoolExecutor(cores()) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(_line, sorted(tensors), [tensors[name] for name in sorted(tensors)]))


def _line(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise UserError(f"'{name}' is offloaded: a session belongs to its weights, which must all be in memory")
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
