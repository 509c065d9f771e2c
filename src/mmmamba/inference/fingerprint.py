"""Which network a conversation belongs to, and whether tensors are the ones that were written down: hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmmamba.config import to_dict
from mmmamba.data.processor import Processor
from mmmamba.data.template import JinjaTemplate
from mmmamba.device import cores
from mmmamba.errors import UserError
from mmmamba.model.model import Model


def fingerprint(model: Model, processor: Processor) -> str:
    """sha256 over all that decides an answer: both configs, the tokenizer, the chat template, every parameter.

    It is that of the network in memory: the same for every folder layout it may be loaded from, another one for
    another number format. Of the configs only what differs from a default counts, so that a field which a later
    version adds changes nothing.
    """
    template = processor.template
    texts = (
        json.dumps([_told(model.config), _told(processor.config)], sort_keys=True),
        processor.tokenizer.identity,
        template.definition if isinstance(template, JinjaTemplate) else template.name,
    )
    return _digest(texts, _parameters(model))


def digest(texts: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over texts in order, and over tensors (name, type, shape, bytes) whatever their order."""
    return _digest(texts, _lines(tensors))


def _digest(texts: Sequence[str], lines: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([list(texts), list(lines)]).encode()).hexdigest()


def _parameters(model: Model) -> list[str]:
    """The lines of all parameters, worked out again only when one was changed or moved since: that takes seconds."""
    parameters = dict(model.named_parameters())
    now = [(name, p.data_ptr(), p._version, p.dtype, p.shape) for name, p in parameters.items()]
    before, lines = _KNOWN.get(model, (None, []))
    if before != now:
        lines = _lines(parameters)
        _KNOWN[model] = now, lines
    return lines


_KNOWN: WeakKeyDictionary[Model, tuple[list[Any], list[str]]] = WeakKeyDictionary()


def _lines(tensors: Mapping[str, Tensor]) -> list[str]:
    with ThreadPoolExecutor(cores()) as pool:  # hashing lets go of the interpreter's lock
        return list(pool.map(_line, sorted(tensors), [tensors[name] for name in sorted(tensors)]))


def _line(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise UserError(f"'{name}' is offloaded: a session belongs to its weights, which must all be in memory")
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _told(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their defaults, as plain data."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            found[field.name] = _told(value) if dataclasses.is_dataclass(value) else to_dict(value)
    return found
