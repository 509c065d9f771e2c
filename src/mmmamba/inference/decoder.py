"""One token for each of many sequences, again and again: their states in one pool, changed in place.

A pass of the model takes a state and returns another; a decoding step is so small that making new tensors for it would
cost more than the step. Here states lie in tensors that stay: a sequence is admitted to a slot, stepped, exported as a
state again, and its slot given to another. What a layer projects is one product, where its matrices lie side by side
(:mod:`mmmamba.model.joined`). On a GPU a step can be one CUDA graph for each size of batch.

A step reads weights; it calls no module. A model of which a module has to be called (an adapter, a hook, an offloaded
weight) is passed the tokens as anybody would pass them: slower, and right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmmamba.cuda_graphs import CaptureStream, Replayed
from mmmamba.errors import UserError
from mmmamba.model.joined import joined, maps_of
from mmmamba.model.layer import Layer, RMSNorm, SwiGLU
from mmmamba.model.mixers import Mixer, Pool, PoolSpec, kinds
from mmmamba.model.model import Model
from mmmamba.model.plain import device_of, plain, weight_of
from mmmamba.model.state import State
from mmmamba.ops import compute_dtype, embed_step, linear_step, linear_steps, quantize_rows, rms_norm
from mmmamba.ops.dispatch import why_not

AHEAD = 1024  # tokens that there is room for after the longest sequence; with more, the caches are made twice as long

#: What a step does without calling: modules of these very classes, those that a kind of mixer names, and no others.
READ = (nn.ModuleList, Layer, Mixer, SwiGLU, RMSNorm, nn.Linear, nn.Embedding)

_QUANTIZED: WeakKeyDictionary[nn.Module, tuple[list[Any], list[Tensor], Tensor, Tensor]] = WeakKeyDictionary()


class Decoder:
    """A pool of sequences whose next logits are computed in place.

    Args:
        model: the network; it stays as it is.
        slots: sequences that the pool has room for.
        capacity: most tokens that a sequence may come to hold. The caches of softmax layers grow up to it with need.
        max_length, max_embedded: the lengths that dynamic RoPE scaling was fixed for when the sequences' states were
            made, as a :class:`~mmmamba.model.state.State` has them.
        graph: replay steps as CUDA graphs; by default wherever that can be done.
        state_dtype: of the SSM states (default: what the model's ``half_states`` says, else float32 at least).
            bfloat16 halves what a step moves in a large batch; it is rounded stochastically, so that a state does not
            drift.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        capacity: int,
        *,
        max_length: int,
        max_embedded: int | None = None,
        graph: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        config = model.config
        self.model, self.slots, self.capacity = model, slots, capacity
        self.max_length, self.max_embedded = max_length, max_embedded
        self.called = not decodable(model)  # a step is a pass of the model
        if self.called and (model.int8_steps or model.half_states):
            what = "int8 weights" if model.int8_steps else "bfloat16 states"
            raise UserError(f"{what} are for steps of a model as it is; {why_called(model)}")
        self.graph = not self.called and (graphable(model) if graph is None else graph)
        self.state_dtype = torch.bfloat16 if state_dtype is None and model.half_states else state_dtype
        # A seed for each layer's rounding, another one in every step.
        self.seeds = torch.arange(config.num_layers, device=model.device)
        # What is counted of each slot; in a row of its own where the embedding stack reads patches in place of tokens.
        self.counts = torch.zeros(1 + model.merges_late, slots, dtype=torch.long, device=model.device)
        self.positions, self.embedded = self.counts[0], self.counts[-1]
        self.longest = 0  # no sequence of the pool is longer; known on the host
        self.room = 0  # tokens of a sequence that the caches have room for now
        self.grows = any(model.mixer(i).grows for i in range(config.num_layers))
        self.pool = [self._pool(i) for i in range(config.num_layers)]
        self.layers: list[_Layer] = []
        if not self.called:
            for layer, kept in zip(model.layers, self.pool, strict=True):
                assert isinstance(layer, Layer)
                self.layers.append(_Layer(layer, self, kept))
            self.head = _Map(model, [model.head])
        self._stream: CaptureStream | None = None
        self._graphs: dict[int, _Graph] = {}

    def _pool(self, index: int) -> Pool[Any]:
        """A layer's part of the pool, where the layer is and in the dtype of its projections."""
        model, mixer = self.model, self.model.mixer(index)
        weight = weight_of((mixer.step_maps() or [mixer.o_proj])[0])
        dtype = model.dtype if weight is None or not weight.is_floating_point() else weight.dtype
        embedded = self.max_embedded if index < model.config.embedding.num_layers else None
        return mixer.pool(
            PoolSpec(
                slots=self.slots,
                dtype=dtype,
                wide=self.state_dtype or torch.promote_types(dtype, torch.float32),
                device=device_of(model.layers[index]) or model.device,
                max_length=embedded or self.max_length,
                seed=self.seeds[index : index + 1],
            )
        )

    def admit(self, slots: Tensor, state: State) -> None:
        """Lay the sequences of ``state`` into ``slots`` (s,), over whatever was there.

        Raises:
            ValueError: when a sequence is longer than the pool's capacity, or was begun for another ``max_length``.
        """
        longest = state.longest
        if longest > self.capacity:
            raise ValueError(f"a sequence of {longest} tokens does not fit into slots of {self.capacity}")
        if not self.holds(len(slots), longest, state.max_length, state.max_embedded):
            raise ValueError(f"the state was fixed for {state.max_length} tokens, the pool for {self.max_length}")
        self.reserve(longest)
        for layer, kept in zip(self.pool, state.layers, strict=True):
            layer.admit(slots, kept)
        self.positions[slots] = state.positions
        if state.embedded is not None:
            self.embedded[slots] = state.embedded
        self.longest = max(self.longest, longest)

    def clear(self, longest: int = 0) -> None:
        """Let sequences go: none that is still needed is longer than ``longest`` tokens (0: the pool is as new)."""
        self.longest = longest

    def holds(self, slots: int, capacity: int, max_length: int, max_embedded: int | None = None) -> bool:
        """Whether ``slots`` sequences of up to ``capacity`` tokens, begun for these lengths, fit into the pool."""
        same = (max_length, max_embedded or max_length) == (self.max_length, self.max_embedded or self.max_length)
        fixed = same or not self.model.dynamic_rope
        return slots <= self.slots and capacity <= self.capacity and fixed

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens. Graphs hold the old caches, and go with them."""
        if length <= self.room or not self.grows:
            return
        self.room = min(self.capacity, max(2 * self.room, length + AHEAD))
        self._graphs.clear()
        for kept in self.pool:
            kept.reserve(self.room)

    def export(self, slots: Tensor) -> State:
        """The state of some slots (s,): copies, which no later step changes."""
        embedded = self.embedded[slots] if self.model.merges_late else None
        first, counts = self.model.config.embedding.num_layers, (self.embedded, self.positions)
        layers = tuple(kept.export(slots, counts[i >= first]) for i, kept in enumerate(self.pool))
        return State(layers, self.positions[slots], self.max_length, embedded, self.max_embedded)

    @torch.no_grad()
    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Feed one token to each of some sequences.

        Args:
            tokens: (b,) ids.
            slots: (b,) int64, no two the same; a negative one marks a row that only fills the batch.

        Returns:
            logits (b, v) after the tokens; those of idle rows mean nothing. The next step of any batch size may
            overwrite a graph's: copy what is to be kept.

        Raises:
            ValueError: when a sequence would outgrow the capacity.
        """
        if self.longest >= self.capacity:
            raise ValueError(f"a sequence has grown to the {self.capacity} tokens that its slot holds")
        self.longest += 1
        self.reserve(self.longest)
        if self.called:
            return self._pass(tokens, slots)
        if not self.graph:
            return self._step(tokens, slots)
        # A graph for each power of two and one for the whole pool, filled up with idle rows.
        rows = max(len(tokens), min(1 << (len(tokens) - 1).bit_length(), self.slots))
        if rows not in self._graphs:
            self._stream = self._stream or CaptureStream(self.model.device)
            self._graphs[rows] = _Graph(rows, self._stream)
        return self._graphs[rows](self, tokens, slots)[: len(tokens)]

    def _pass(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """The step of a model that has to be called."""
        rows = (slots >= 0).nonzero()[:, 0]
        places = slots[rows]
        out = self.model(tokens[rows, None], state=self.export(places), logits="last", return_state=True)
        for kept, new in zip(self.pool, out.state.layers, strict=True):
            kept.admit(places, new)
        self.counts[:, places] += 1
        return out.logits.new_zeros(len(slots), out.logits.shape[-1]).index_copy(0, rows, out.logits)

    def _step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        model = self.model
        special = None if model.special_embeddings is None else model.special_embeddings.weight
        x, at = embed_step(tokens, slots, model.text_embeddings.weight, self.counts, special=special)
        # The host knows how long the longest sequence is, but a graph is made for all lengths.
        longest = None if self.graph else self.longest
        for layer in self.layers:
            x = layer.step(x, slots, at[layer.stack], longest)
        logits = self.head(x, norm=model.norm)
        if self.state_dtype == torch.bfloat16:
            self.seeds += len(self.layers)
        return logits


def why_called(model: Model) -> str | None:
    """Which module of a model has to be called, in words; None where a step may read all weights."""
    if not plain(Model, model):
        return f"this one is wrapped, hooked or offloaded as a whole ({type(model).__name__})"
    found = next(
        (one for name, part in model._modules.items() if name != "vision" and (one := _called(part)) is not None), None
    )
    if found is None:
        return None
    name = next(name for name, module in model.named_modules() if module is found)
    return f"'{name}' is wrapped, hooked or offloaded ({type(found).__module__}.{type(found).__name__})"


def decodable(model: Model) -> bool:
    """Whether steps may read the weights of a model instead of calling its modules."""
    return why_called(model) is None


def _called(module: nn.Module | None) -> nn.Module | None:
    """The first module that has to be called, of a module and all that it is made of."""
    if module is None:
        return None
    of: Any = type(module)
    kind = _kind(of)
    if kind is None or not plain(kind, module):
        return module
    parts: Iterable[nn.Module | None] = module._modules.values()
    if isinstance(module, Mixer) and not module.step_maps():  # the step is a pass of the mixer: only W_o is read
        parts = [module.o_proj]
    return next((found for part in parts if (found := _called(part)) is not None), None)


@functools.lru_cache(maxsize=64)
def _kind(of: type) -> type[nn.Module] | None:
    """Which of the classes that a step reads a class is."""
    named = [part for mixer in kinds().values() for part in mixer.step_modules]
    return next((kind for kind in (*READ, *named) if issubclass(of, kind)), None)


def graphable(model: Model) -> bool:
    """Whether a decoding step can be a CUDA graph: the kernels serve all of it, and no length changes its rotation."""
    served = model.device.type == "cuda" and why_not(model.head.weight) is None
    mixers = (model.mixer(i) for i in range(model.config.num_layers))
    return served and not model.dynamic_rope and all(mixer.step_graphable() for mixer in mixers)


class _Graph:
    """The step of one batch size: tensors that stay, and a graph over them."""

    def __init__(self, rows: int, stream: CaptureStream) -> None:
        self.tokens, self.slots = (torch.zeros(rows, dtype=torch.long, device=stream.device) for _ in range(2))
        self.replayed: Replayed[Tensor] = Replayed(stream)

    def __call__(self, decoder: Decoder, tokens: Tensor, slots: Tensor) -> Tensor:
        # The decoder is given, not kept: it and its graphs go when its last user does, not when garbage is collected.
        self.tokens[: len(tokens)] = tokens
        self.slots[: len(slots)] = slots
        self.slots[len(slots) :] = -1
        return self.replayed(lambda: decoder._step(self.tokens, self.slots))


class _Map:
    """The linear maps that read one input, as one product; with int8 weights where the model wants its steps so."""

    def __init__(self, model: Model, maps: Sequence[nn.Linear]) -> None:
        whole = maps[0].weight if len(maps) == 1 else joined(maps)
        self.weight, self.scale = None if whole is None else whole.detach(), None
        self.apart = [] if model.int8_steps or whole is not None else [one.weight.detach() for one in maps]
        self.biases = [None if one.bias is None else one.bias.detach() for one in maps]
        self.bias = _joined_bias(maps)
        if model.int8_steps:
            self.weight, self.scale = quantized(maps)

    def __call__(self, x: Tensor, *, norm: RMSNorm | None = None, chained: bool = True, **options: Any) -> Tensor:
        """The norm, if any, and the product. What a layer does is a chain: one kernel reads what the last one wrote."""
        before: dict[str, Any] = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        if self.weight is None:
            return linear_steps(x, self.apart, self.biases, **before, **options)
        return linear_step(x, self.weight, self.bias, scale=self.scale, chained=chained, **before, **options)


def _normed(x: Tensor, *, norm: RMSNorm, chained: bool) -> Tensor:
    """What a mixer reads whose step is a pass of its own."""
    return rms_norm(x, norm.weight, norm.eps, compute_dtype(x))


class _Layer:
    """What every layer has around its mixer's part of the pool."""

    def __init__(self, layer: Layer, decoder: Decoder, pool: Pool[Any]) -> None:
        model, mlp = decoder.model, layer.mlp
        *into, gate_up = maps_of(layer)
        self.pool = pool
        self.input_norm, self.mlp_norm = layer.input_norm, layer.mlp_norm
        self.project: Callable[..., Tensor] = _Map(model, into[0]) if into else _normed
        self.out = _Map(model, [layer.mixer.o_proj])
        self.gate_up = _Map(model, gate_up)
        self.down = _Map(model, [mlp.down])
        self.first = layer.index == 0  # it reads the embedding, which is no part of the chain
        self.stack = -1 if layer.index < model.config.embedding.num_layers else 0

    def step(self, x: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> Tensor:
        """Rows x (b, d) through the layer, in place.

        ``at`` (b,): how many tokens each row's slot has seen. ``longest``: none has seen more than that with this one.
        """
        projected = self.project(x, norm=self.input_norm, chained=not self.first)
        x = self.out(**self.pool.heads(projected, slots, at, longest), residual=x)
        inner = self.gate_up(x, norm=self.mlp_norm, swiglu=True)
        return self.down(inner, residual=x)


def quantized(maps: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """The matrices of some maps as one in int8, and its rows' scales; made again when the weights have changed."""
    owner, weights = maps[0], [one.weight.detach() for one in maps]
    state = [(weight._version, weight.data_ptr(), weight.dtype) for weight in weights]
    kept = _QUANTIZED.get(owner)
    if kept is None or kept[0] != state:
        parts = [quantize_rows(weight) for weight in weights]
        rounded, scales = (torch.cat(part) if len(maps) > 1 else part[0] for part in zip(*parts, strict=True))
        kept = _QUANTIZED[owner] = (state, weights, rounded, scales)
    return kept[2], kept[3]


def _joined_bias(projections: Sequence[nn.Linear]) -> Tensor | None:
    """The biases one after another, zeros for projections without one; None when no projection has one."""
    if all(p.bias is None for p in projections):
        return None
    parts = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in projections]
    return torch.cat(parts)
