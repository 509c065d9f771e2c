"""One pass of the network: from the arguments of transformers' callers to the outputs that they expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from mmmamba.errors import UserError
from mmmamba.hf.argument_checks import refuse_unknown
from mmmamba.hf.attention_weights import AttentionWeights
from mmmamba.hf.pretrained import MMMambaPreTrainedModel
from mmmamba.hf.sequence_borders import BORDERS, Packed, packed
from mmmamba.hf.state_cache import CACHE, StateCache

logger = logging.get_logger(__name__)


@dataclass
class Passed:
    """The result of a pass, and further fields of transformers' outputs: cache, hidden states, attentions."""

    hidden: Tensor  # (b, l, d), zeros at padding
    logits: Tensor | None
    more: dict[str, Any]
    return_dict: bool

    def result(self, kind: Any, return_dict: bool | None, **first: Any) -> Any:
        found = kind(**first, **self.more)
        return found if (self.return_dict if return_dict is None else return_dict) else found.to_tuple()


def run(
    model: MMMambaPreTrainedModel,
    input_ids: Tensor | None,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    past: StateCache,
    use_cache: bool | None,
    *,
    position_ids: Tensor | None = None,
    logits_to_keep: int | Tensor | None = None,
    output_hidden_states: bool | int | Sequence[int] | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> Passed:
    """One pass over new tokens; see the models' ``forward``. Without ``logits_to_keep`` there are no logits."""
    packing = {name: kwargs.pop(name) for name in BORDERS if name in kwargs}
    refuse_unknown("forward", kwargs)
    if (input_ids is None) == (inputs_embeds is None):
        raise UserError("forward needs either input_ids or inputs_embeds")
    network, config = model.network, model.config
    x = input_ids if inputs_embeds is None else inputs_embeds
    assert x is not None
    rows, new = x.shape[:2]
    if attention_mask is not None:
        if attention_mask.shape not in ((rows, new), (rows, past.columns + new)):
            raise UserError(
                f"attention_mask is {tuple(attention_mask.shape)}, expected {(rows, new)}"
                + (f" or {(rows, past.columns + new)}" if past.columns else "")
            )
        attention_mask = attention_mask[:, -new:]
    row = None
    if position_ids is not None or any(value is not None for value in packing.values()):
        given = {name: _placed_as(x, value) for name, value in {**packing, "position_ids": position_ids}.items()}
        real = None if attention_mask is None or bool((attention_mask != 0).all()) else attention_mask != 0
        row = packed((rows, new), real, past, **given)
    use_cache = _uses_cache(model, use_cache, row)
    hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    weights = None
    if config.output_attentions if output_attentions is None else output_attentions:
        if row is not None:
            raise UserError("output_attentions: rows that hold several sequences have no square of weights")
        weights = AttentionWeights(network, attention_mask, past.state)
    wanted = "all" if _is(logits_to_keep, 0) else "last" if _is(logits_to_keep, 1) else "none"
    out = network(
        input_ids if row is None or input_ids is None else row.pack(input_ids),
        pixel_values,
        attention_mask if row is None else None,
        inputs_embeds=inputs_embeds if row is None or inputs_embeds is None else row.pack(inputs_embeds),
        cu_seqlens=None if row is None else row.cu_seqlens,
        state=past.state,
        logits=wanted if row is None else "none",
        return_state=use_cache,
        max_length=past.max_length,
        observe=weights,
        return_layers=hidden_states is not None and hidden_states is not False,
    )
    hidden = out.hidden if row is None else row.unpack(out.hidden)
    logits = out.logits
    if logits is not None and wanted == "last":
        logits = logits[:, None]
    elif logits is None and logits_to_keep is not None:
        logits = network.head(_kept(hidden, logits_to_keep, row))
    more: dict[str, Any] = {}
    if use_cache:
        more[CACHE] = StateCache(out.state, past.columns + new, past.max_length)
    if out.layers is not None:
        layers = [*out.layers] if row is None else [row.unpack(one) for one in out.layers]
        more["hidden_states"] = _selected(layers, hidden_states)
    if weights is not None:
        more["attentions"] = tuple(weights.layers)
    return Passed(hidden, logits, more, bool(getattr(config, "return_dict", True)))


def _placed_as(x: Tensor, value: Any) -> Any:
    """Move a tensor, or a list of numbers, to the device of ``x``. Collators leave borders on the host."""
    return torch.as_tensor(value, device=x.device) if isinstance(value, (Tensor, list)) else value


def _is(logits_to_keep: int | Tensor | None, count: int) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == count


def _kept(hidden: Tensor, logits_to_keep: int | Tensor, row: Packed | None) -> Tensor:
    """The hidden states (b, l, d) for which logits are wanted."""
    if _is(logits_to_keep, 0):
        return hidden
    if _is(logits_to_keep, 1) and row is not None:
        return row.last(hidden)
    return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


def _selected(layers: list[Tensor], wanted: Any) -> tuple[Tensor | None, ...]:
    """All hidden states, with None for those whose indices are not ``wanted``."""
    if isinstance(wanted, bool):
        return tuple(layers)
    indices = {int(i) % len(layers) for i in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(layer if i in indices else None for i, layer in enumerate(layers))


def _uses_cache(model: MMMambaPreTrainedModel, asked: bool | None, row: Packed | None) -> bool:
    """Whether the pass returns a cache."""
    if row is not None:
        if asked:
            raise UserError("use_cache: rows that hold several sequences have no cache (it holds one for each row)")
        return False
    if asked is None:
        return bool(model.config.use_cache) and not model.training
    if asked and model.training and torch.is_grad_enabled() and model.network.layers[0].gradient_checkpointing:
        logger.warning_once("use_cache=True cannot be combined with gradient checkpointing: no cache is kept")
        return False
    return asked
