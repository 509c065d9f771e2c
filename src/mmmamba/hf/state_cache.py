"""Our state as transformers' ``cache``."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmmamba.errors import UserError
from mmmamba.model.state import State

# transformers' name for a cache, from 5.24 on and before. Callers may use either name.
CACHE_NAMES = ("cache", "past_key_values")
# The name in the installed version.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in CACHE_NAMES)


class StateCache:
    """Our :class:`~mmmamba.model.state.State` as transformers' ``cache`` (``past_key_values`` before 5.24).

    A pass returns a new cache and does not change the one it got, so a prompt's cache can be used again.

    Attributes:
        state: the state of the sequences; None before the first pass.
        columns: tokens that each row of the batch has seen, including padding.
        max_length: the length for which dynamic RoPE scaling is fixed at the first pass.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # for any layer: generate then asks get_seq_length which tokens are new

    def __init__(self, state: State | None = None, columns: int = 0, max_length: int | None = None) -> None:
        self.state = state
        self.columns = columns
        self.max_length = max_length

    @classmethod
    def of(
        cls, cache: StateCache | State | None = None, past_key_values: StateCache | State | None = None
    ) -> StateCache:
        """The cache that a caller gave, under either name."""
        if cache is not None and past_key_values is not None:
            raise UserError("cache and past_key_values are two names of one argument: give one of them")
        past = past_key_values if cache is None else cache
        if past is None:
            return cls()
        if isinstance(past, State):
            return cls(past, int(past.positions.max()), past.max_length)
        if not isinstance(past, cls):
            raise UserError(
                f"a cache must be a StateCache or a State of this model, got {type(past).__name__}: its layers keep "
                "states, and transformers' own caches cannot hold them"
            )
        return past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows of the batch. Beam search asks for this after each step."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)
