"""The fingerprint of a model with its processor. A session file belongs to one of them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any
from weakref import WeakKeyDictionary

from mmmamba.checkpoints.tensor_hashes import digest_lines, lines_of
from mmmamba.config_files import to_dict
from mmmamba.data.processor import Processor
from mmmamba.data.tokenizer_template import JinjaTemplate
from mmmamba.model.model import Model


def fingerprint(model: Model, processor: Processor) -> str:
    """sha256 over everything that decides an answer: both configs, the tokenizer, the chat template, every parameter.

    It is computed from the network in memory. So it is the same for every folder layout that it may be loaded from, but
    another one for another number format. Only config fields that differ from their default count, so that a field that
    a later version adds changes nothing.
    """
    template = processor.template
    texts = (
        json.dumps([_told(model.config), _told(processor.config)], sort_keys=True),
        processor.tokenizer.identity,
        template.definition if isinstance(template, JinjaTemplate) else template.name,
    )
    return digest_lines(texts, _parameters(model))


def _parameters(model: Model) -> list[str]:
    """The lines of all parameters.

    They take seconds, so they are computed again only if a parameter changed or moved.
    """
    parameters = dict(model.named_parameters())
    now = [(name, p.data_ptr(), p._version, p.dtype, p.shape) for name, p in parameters.items()]
    before, lines = _KNOWN.get(model, (None, []))
    if before != now:
        lines = lines_of(parameters)
        _KNOWN[model] = now, lines
    return lines


_KNOWN: WeakKeyDictionary[Model, tuple[list[Any], list[str]]] = WeakKeyDictionary()


def _told(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, as plain data."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            found[field.name] = _told(value) if dataclasses.is_dataclass(value) else to_dict(value)
    return found
