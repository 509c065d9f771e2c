"""Which network a conversation belongs to, and whether tensors are the ones that were written down: hashes."""

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
    return digest_lines(texts, _parameters(model))


def _parameters(model: Model) -> list[str]:
    """The lines of all parameters, worked out again only when one was changed or moved since: that takes seconds."""
    parameters = dict(model.named_parameters())
    now = [(name, p.data_ptr(), p._version, p.dtype, p.shape) for name, p in parameters.items()]
    before, lines = _KNOWN.get(model, (None, []))
    if before != now:
        lines = lines_of(parameters)
        _KNOWN[model] = now, lines
    return lines


_KNOWN: WeakKeyDictionary[Model, tuple[list[Any], list[str]]] = WeakKeyDictionary()


def _told(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their defaults, as plain data."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            found[field.name] = _told(value) if dataclasses.is_dataclass(value) else to_dict(value)
    return found
