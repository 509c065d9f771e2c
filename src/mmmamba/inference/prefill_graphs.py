"""Short prompts, read by replaying CUDA graphs: the host launches a whole pass at once.

A pass launches about a thousand kernels. For a short prompt, the host takes longer to launch them than the GPU to run
them. A graph launches them all at once, but it has the shapes that it was captured with. So a prompt is laid into a row
of one of a few sizes (:data:`SIZES`). The row holds three sequences: the prompt, what fills the row, and an empty one
(:class:`~mmmamba.ops.packing.DeviceLayout` says why). No token of the prompt sees the others.

A row of a new size is read twice as any row is. The third time it is captured: a program that reads a single prompt
never waits for a capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmmamba.cuda_graphs import CaptureStream, Replayed
from mmmamba.inference.decoder import decodable
from mmmamba.model.model import Model, Output
from mmmamba.model.state import State
from mmmamba.ops.dispatch import why_not
from mmmamba.ops.packing import remember_bounds

#: Tokens of the rows that are captured. Where a row is longer, the GPU takes longer than the host.
SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)

_GRAPHS: WeakKeyDictionary[nn.Module, PrefillGraphs] = WeakKeyDictionary()


def replayed_pass(model: Model, x: Tensor, state: State | None, max_length: int) -> Output | None:
    """The pass over the embeddings of one sequence, from a graph; None where a graph can't do it.

    Args:
        x: (1, l, d), embeddings of the new tokens.
        state: what the sequence left behind, if anything.
        max_length: what a new state says it was made for.

    Returns:
        The logits (1, v) after the last token and the new state. The hidden states are not kept.
    """
    if model.device.type != "cuda" or torch.is_grad_enabled() or x.shape[1] > SIZES[-1]:
        return None
    if model.dtype not in (torch.bfloat16, torch.float16):  # float32 softmax needs to know the lengths
        return None
    if model not in _GRAPHS:
        _GRAPHS[model] = PrefillGraphs(model)
    graphs = _GRAPHS[model]
    if not graphs.serve(state) or not decodable(model):
        return None
    graphs.check_weights(model)
    return graphs.read(model, x, state, max_length)


class PrefillGraphs:
    """The graphs of one model: one for each size of row that was read."""

    def __init__(self, model: Model) -> None:
        mixers = [model.mixer(i) for i in range(model.config.num_layers)]
        self._grows = any(mixer.grows for mixer in mixers)
        self._capturable = (
            not model.merges_late
            and not model.dynamic_rope
            and all(mixer.capturable for mixer in mixers)
            and all(why_not(model.head.weight, head_dim=p, state_dim=p) is None for p in {m.head_dim for m in mixers})
        )
        self._rows: dict[int, _Row] = {}
        self._stream: CaptureStream | None = None
        self._addresses: list[int] = []

    def serve(self, state: State | None) -> bool:
        """Whether a sequence that goes on from ``state`` can be read: a graph's caches can't grow."""
        return self._capturable and not (self._grows and state is not None)

    def check_weights(self, model: Model) -> None:
        """Let the graphs go if a weight no longer lies where they read it."""
        found: list[int] = []
        modules: list[nn.Module] = [model]
        while modules:
            module = modules.pop()
            found += [p.data_ptr() for p in module._parameters.values() if p is not None]
            modules += [part for name, part in module._modules.items() if part is not None and name != "vision"]
        if found != self._addresses:
            self._rows.clear()
            self._stream, self._addresses = None, found

    def read(self, model: Model, x: Tensor, state: State | None, max_length: int) -> Output:
        """The pass over x (1, l, d)."""
        if self._stream is None:
            self._stream = CaptureStream(model.device)
        size = next(size for size in SIZES if size >= x.shape[1])
        if size not in self._rows:
            starts = None if self._grows else _starts(model, size)
            self._rows[size] = _Row(starts, size, x, self._stream)
        return self._rows[size](model, x, state, max_length)


class _Row:
    """A row of one size that stays, into which prompts are laid, and the pass over it."""

    def __init__(self, starts: State | None, size: int, like: Tensor, stream: CaptureStream) -> None:
        self.x = like.new_zeros(1, size, like.shape[-1])
        self.borders = torch.full((4,), size, dtype=torch.int32, device=like.device)
        self.borders[0] = 0
        self.starts = starts  # which the pass goes on from; None: from none
        self.empty = [] if starts is None else [t[:1].clone() for t in starts.tensors()]
        self._replayed: Replayed[Output] = Replayed(stream)

    def __call__(self, model: Model, x: Tensor, state: State | None, max_length: int) -> Output:
        length, size = x.shape[1], self.x.shape[1]
        self.x[:, :length] = x
        self.borders[1].fill_(length)
        if self.starts is not None:
            _copy([t[:1] for t in self.starts.tensors()], self.empty if state is None else state.tensors())

        def run() -> Output:
            remember_bounds(self.borders, size, size)  # here, so that the tables are part of what is captured
            options: dict[str, Any] = {"state": self.starts, "logits": "last", "return_state": True, "max_length": size}
            return model(inputs_embeds=self.x, cu_seqlens=self.borders, **options)

        out = self._replayed(run)
        assert out.logits is not None and out.state is not None
        first = [layer.trimmed(length).map(lambda t: t[:1]) for layer in out.state.layers]
        kept = State(
            tuple(first), out.state.positions[:1], max(max_length, length) if state is None else state.max_length
        )
        return Output(out.hidden[:, :length], out.logits[:1].clone(), _copied(kept))


def _starts(model: Model, size: int) -> State:
    """Three sequences before their first token."""
    places: dict[str, Any] = {"dtype": model.dtype, "wide": torch.float32, "device": model.device}
    layers = tuple(model.mixer(i).empty_state(3, **places) for i in range(model.config.num_layers))
    return State(layers, torch.zeros(3, dtype=torch.long, device=model.device), size)


def _copied(state: State) -> State:
    """The state in tensors of its own."""
    tensors = state.tensors()
    copies = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    _copy(copies, tensors)
    found = iter(copies)
    return state.map(lambda _: next(found))


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors in few launches: one for those of a kind."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, tensors, strict=True):
        targets, sources = kinds.setdefault((target.dtype, source.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)
