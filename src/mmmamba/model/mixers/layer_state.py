"""What a layer keeps of the tokens seen: of some sequences as a value, and of many in a pool that decodes in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from mmmamba.model.rope import rotation

if TYPE_CHECKING:
    from typing_extensions import Self

    from mmmamba.model.mixers.contract import Mixer


class LayerState:
    """What a layer keeps of the tokens seen: a frozen dataclass of tensors, each with one row a sequence (s, …).

    It is a value: a pass takes one and returns another. Its fields are the names of its tensors in session files.
    """

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The state with each tensor changed, in the order of :meth:`tensors`."""
        return self.with_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The state with these tensors in the places of its own."""
        changed: Any = tensors
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str | int | None) -> Self:
        return self.map(lambda tensor: tensor.to(device))

    def gapless(self) -> Tensor | None:
        """Whether no sequence has gaps (a scalar on the device), of a state that can grow in place; None of others."""
        return None

    def growing(self, more: int) -> LayerState:
        """A state that ``more`` tokens can be added to in place, by passes that return the same object."""
        return self

    def settled(self) -> LayerState:
        """The state as a value again, which no pass changes."""
        return self

    def trimmed(self, length: int) -> Self:
        """The state without its room for more than ``length`` tokens: no sequence is longer."""
        return self


S = TypeVar("S", bound=LayerState)


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """What a layer's part of a pool is made for.

    Attributes:
        slots: sequences that there is room for.
        dtype: of what holds activations, such as keys and values.
        wide: of what sums over the whole sequence.
        device: the layer's.
        max_length: the length that dynamic RoPE scaling was fixed for, in the layer's stack.
        seed: (1,) int64 on the device, of the layer's stochastic rounding: another one in each step.
    """

    slots: int
    dtype: torch.dtype
    wide: torch.dtype
    device: torch.device
    max_length: int
    seed: Tensor


class Pool(Generic[S]):
    """A layer's part of a pool: its state for each slot, and the step that takes one token more of some slots.

    This one serves every mixer whose state has a fixed size: a step is a pass of the mixer, whose state is read from
    the slots and written back. It keeps sums in float32, whatever the pool would have. A kind with a faster step, or
    with a state that grows, has a pool of its own.
    """

    def __init__(self, mixer: Mixer[S], spec: PoolSpec) -> None:
        self.mixer, self.spec = mixer, spec
        wide = torch.promote_types(spec.wide, torch.float32)
        # Rows that only fill the batch have slot -1, which is the last row here: nobody reads it.
        self.state = mixer.empty_state(spec.slots + 1, dtype=spec.dtype, wide=wide, device=spec.device)

    def tensors(self) -> list[Tensor]:
        """What the slots' states lie in."""
        return list(self.state.tensors().values())

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens; a state of a fixed size has it."""

    def admit(self, slots: Tensor, state: S) -> None:
        """Lay the sequences of a state into ``slots`` (s,), over whatever was there."""
        for held, given in zip(self.tensors(), state.tensors().values(), strict=True):
            held[slots] = given.to(held)

    def export(self, slots: Tensor, counts: Tensor) -> S:
        """The state of some slots (s,): copies. ``counts`` has the tokens seen of each slot of the pool."""
        return self.state.map(lambda held: held[slots])

    def heads(self, x: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> dict[str, Any]:
        """The heads of one new token a row; the slots' states go on.

        Args:
            x: (b, …) the projections by :meth:`~mmmamba.model.mixers.contract.Mixer.step_maps`, or (b, d), the mixer's
                input, where there are none.
            slots: (b,) each row's slot; -1 marks a row that only fills the batch.
            at: (b,) tokens that each row's slot has seen.
            longest: none has seen more than that with this one; None where a graph has to serve all lengths.

        Returns:
            ``x``, the heads (b, h·p), and options of :func:`mmmamba.ops.linear_step` for the map that reads them.
        """
        turn = rotation(self.mixer.stack, at[:, None], self.spec.max_length, x.dtype)
        heads, state = self.mixer.heads(x[:, None], self.export(slots, at), rotation=turn, keep_state=True)
        assert state is not None
        self.admit(slots, state)
        return {"x": heads.flatten(1)}
