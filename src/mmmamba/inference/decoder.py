"""One token for each of many sequences, again and again: their states in one pool, changed in place.

A pass of the model takes a state and returns another; a decoding step is so small that making new tensors for it would
cost more than the step. Here states lie in tensors that stay: a sequence is admitted to a slot, stepped, exported as a
state again, and its slot given to another. What a layer projects is one product. On a GPU a step can be one CUDA graph
for each size of batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmmamba.device import uncollected
from mmmamba.model.attention import Attention
from mmmamba.model.config import StackConfig
from mmmamba.model.layer import Layer, RMSNorm
from mmmamba.model.mamba2 import Mamba2
from mmmamba.model.model import Model
from mmmamba.model.rope import inverse_frequencies
from mmmamba.model.state import KVState, LayerState, MambaState, State
from mmmamba.ops import attend_step, begin_step, linear_step, mixer_step, quantize_rows
from mmmamba.ops.triton import why_not

WARM_UP = 2  # steps of a batch size before it is captured
PARTS = 8  # of a head of a single row

_FUSED: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_QUANTIZED: WeakKeyDictionary[nn.Module, tuple[list[int], Tensor, Tensor, Tensor]] = WeakKeyDictionary()


class Decoder:
    """A pool of sequences whose next logits are computed in place.

    Args:
        model: the network; its projections are laid side by side in memory (their parameters become views), which
            changes no value, name or shape.
        slots: sequences that the pool has room for.
        capacity: most tokens that a sequence will hold: the length of the softmax layers' caches.
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
        self.graph = graphable(model) if graph is None else graph
        self.state_dtype = torch.bfloat16 if state_dtype is None and model.half_states else state_dtype
        # A seed for each layer's rounding, another one in every step.
        self.seeds = torch.arange(config.num_layers, device=model.device)
        # What is counted of each slot; in a row of its own where the embedding stack reads patches in place of tokens.
        self.counts = torch.zeros(1 + model.merges_late, slots, dtype=torch.long, device=model.device)
        self.positions, self.embedded = self.counts[0], self.counts[-1]
        self.longest = 0  # no sequence of the pool is longer; known on the host
        self.layers: list[_Mamba2Layer | _AttentionLayer] = []
        for layer in model.layers:
            assert isinstance(layer, Layer)
            kind = _Mamba2Layer if isinstance(layer.mixer, Mamba2) else _AttentionLayer
            self.layers.append(kind(layer, self, config.stack_of(layer.index)))
        self.head = _Map(model, [model.head])
        self._graphs: dict[int, _Graph] = {}

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
        for layer, kept in zip(self.layers, state.layers, strict=True):
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

    def export(self, slots: Tensor) -> State:
        """The state of some slots (s,): copies, which no later step changes."""
        embedded = self.embedded[slots] if self.model.merges_late else None
        layers = tuple(layer.export(slots) for layer in self.layers)
        return State(layers, self.positions[slots], self.max_length, embedded, self.max_embedded)

    @torch.no_grad()
    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Feed one token to each of some sequences.

        Args:
            tokens: (b,) ids.
            slots: (b,) int64, no two the same; a negative one marks a row that only fills the batch.

        Returns:
            logits (b, v) behind the tokens; those of idle rows mean nothing. A graph's are overwritten by its next
            replay.

        Raises:
            ValueError: when a sequence would outgrow the capacity.
        """
        if self.longest >= self.capacity:
            raise ValueError(f"a sequence has grown to the {self.capacity} tokens that its slot holds")
        self.longest += 1
        if not self.graph:
            return self._step(tokens, slots)
        # A graph for each power of two and one for the whole pool, filled up with idle rows.
        rows = max(len(tokens), min(1 << (len(tokens) - 1).bit_length(), self.slots))
        if rows not in self._graphs:
            self._graphs[rows] = _Graph(rows, self.model.device)
        return self._graphs[rows](self, tokens, slots)[: len(tokens)]

    def _step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        model = self.model
        special = None if model.special_embeddings is None else model.special_embeddings.weight
        x, at = begin_step(tokens, slots, model.text_embeddings.weight, self.counts, special=special)
        # The host knows how long the longest sequence is, but a graph is made for all lengths.
        longest = None if self.graph else self.longest
        for layer in self.layers:
            x = layer.step(x, slots, at[layer.stack], longest)
        logits = self.head(x, norm=model.norm)
        if self.state_dtype == torch.bfloat16:
            self.seeds += len(self.layers)
        return logits


def graphable(model: Model) -> bool:
    """Whether a decoding step can be a CUDA graph: the kernels serve all of it, and no length changes its rotation."""
    config = model.config
    sizes: list[dict[str, int]] = [{"head_dim": config.stack_of(i).head_dim} for i in config.attention_layers]
    served = all(why_not(model.head.weight, **size) is None for size in [{}, *sizes])
    return model.device.type == "cuda" and served and not model.dynamic_rope


class _Graph:
    """The step of one batch size: tensors that stay, and a graph over them."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.slots = torch.zeros(rows, dtype=torch.long, device=device)
        self.taken = 0
        self.graph: Any = None
        self.logits: Tensor | None = None

    def __call__(self, decoder: Decoder, tokens: Tensor, slots: Tensor) -> Tensor:
        # The decoder is given, not kept: it and its graphs go when its last user does, not when garbage is collected.
        self.tokens[: len(tokens)] = tokens
        self.slots[: len(slots)] = slots
        self.slots[len(slots) :] = -1
        if self.graph is None:
            if self.taken < WARM_UP:
                self.taken += 1
                return decoder._step(self.tokens, self.slots)
            graph = torch.cuda.CUDAGraph()
            with uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = decoder._step(self.tokens, self.slots)
            self.graph = graph
        self.graph.replay()
        assert self.logits is not None
        return self.logits


class _Map:
    """The linear maps that read one input, as one product; with int8 weights where the model wants its steps so."""

    def __init__(self, model: Model, maps: Sequence[nn.Linear]) -> None:
        owner = maps[0]  # what is made of the maps is kept with the first
        self.weight, self.scale = fused(owner, [one.weight for one in maps]), None
        self.bias = _joined_bias(maps)
        if model.int8_steps:
            self.weight, self.scale = quantized(owner, maps, self.weight)

    def __call__(self, x: Tensor, *, norm: RMSNorm | None = None, chained: bool = True, **options: Any) -> Tensor:
        """The norm, if any, and the product. What a layer does is a chain: one kernel reads what the last one wrote."""
        before: dict[str, Any] = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        return linear_step(x, self.weight, self.bias, scale=self.scale, chained=chained, **before, **options)


class _Layer(ABC):
    """What every layer has around its mixer. ``counts``: the tokens that its stack (0, or -1) has seen of each slot."""

    def __init__(self, layer: Layer, decoder: Decoder, projections: Sequence[nn.Linear]) -> None:
        model, mixer, mlp = decoder.model, layer.mixer, layer.mlp
        self.input_norm, self.mlp_norm = layer.input_norm, layer.mlp_norm
        self.project = _Map(model, projections)
        self.out = _Map(model, [mixer.o_proj])
        self.gate_up = _Map(model, [mlp.gate, mlp.up])
        self.down = _Map(model, [mlp.down])
        self.first = layer.index == 0  # behind the embedding, which is no part of the chain
        self.stack = -1 if layer.index < model.config.embedding.num_layers else 0
        self.counts = decoder.counts[self.stack]
        embedding = decoder.max_embedded if self.stack == -1 else None
        self.max_length = embedding or decoder.max_length

    def step(self, x: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> Tensor:
        """Rows x (b, d) through the layer, in place.

        ``at`` (b,): how many tokens each row's slot has seen. ``longest``: none has seen more than that with this one.
        """
        projected = self.project(x, norm=self.input_norm, chained=not self.first)
        x = self.out(**self.heads(projected, slots, at, longest), residual=x)
        inner = self.gate_up(x, norm=self.mlp_norm, swiglu=True)
        return self.down(inner, residual=x)

    @abstractmethod
    def heads(self, projected: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> dict[str, Any]:
        """The mixer's heads from its projections, as x (b, h·p) and options of the map behind them; its state on."""


class _Mamba2Layer(_Layer):
    """A Mamba-2 layer's part of the pool and of the step."""

    def __init__(self, layer: Layer, decoder: Decoder, stack: StackConfig) -> None:
        mixer = layer.mixer
        assert isinstance(mixer, Mamba2)
        delta = mixer.config.rule == "gated_delta"
        projections = [mixer.v_proj, mixer.k_proj, mixer.q_proj, mixer.gate_proj, mixer.dt_proj]
        super().__init__(layer, decoder, [*projections, mixer.beta_proj] if delta else projections)
        self.mixer, config = mixer, mixer.config
        h, g, p = mixer.heads_count, mixer.groups, mixer.head_dim
        channels = (h + 2 * g) * p
        self.sizes = [channels, h * p, h, *([h] if delta else [])]
        weight = mixer.q_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.conv = weight.new_zeros(decoder.slots, config.conv_kernel - 1, channels)
        self.ssm = weight.new_zeros(decoder.slots, h, p, p, dtype=decoder.state_dtype or wide)
        self.squares = weight.new_empty(1, h, PARTS, dtype=wide)
        self.seed = decoder.seeds[layer.index : layer.index + 1]
        self.frequencies = inverse_frequencies(stack, self.max_length, weight.device, wide) if config.rope else None

    def admit(self, slots: Tensor, state: LayerState) -> None:
        assert isinstance(state, MambaState)
        self.conv[slots] = state.conv.to(self.conv.dtype)
        self.ssm[slots] = state.ssm.to(self.ssm.dtype)

    def export(self, slots: Tensor) -> MambaState:
        wide = torch.promote_types(self.ssm.dtype, torch.float32)
        return MambaState(self.conv[slots], self.ssm[slots].to(wide))

    def heads(self, projected: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> dict[str, Any]:
        mixer, eps = self.mixer, self.mixer.config.norm_eps
        vkq, gate, dt, *beta = projected.split(self.sizes, dim=-1)
        # A single row's heads are worked on in parts, side by side: the norm waits for the map that reads them all.
        squares = self.squares if len(vkq) == 1 else None
        heads = mixer_step(
            vkq,
            gate,
            dt,
            conv_weight=mixer.conv.weight,
            conv_bias=mixer.conv.bias,
            dt_bias=mixer.dt_bias,
            A_log=mixer.A_log,
            norm_weight=mixer.norm.weight,
            conv_state=self.conv,
            ssm_state=self.ssm,
            slots=slots,
            eps=eps,
            activation=mixer.config.conv_activation,
            qk_norm=mixer.config.qk_norm,
            positions=None if self.frequencies is None else at,
            frequencies=self.frequencies,
            seed=self.seed,
            squares=squares,
            beta_raw=beta[0] if beta else None,
            chained=True,
        )
        return {"x": heads} if squares is None else {"x": heads, "squares": squares, "eps": eps}


class _AttentionLayer(_Layer):
    """A softmax layer's preallocated cache and its part of the step."""

    def __init__(self, layer: Layer, decoder: Decoder, stack: StackConfig) -> None:
        mixer = layer.mixer
        assert isinstance(mixer, Attention)
        super().__init__(layer, decoder, [mixer.q_proj, mixer.k_proj, mixer.v_proj])
        weight = mixer.q_proj.weight
        shape = decoder.slots, decoder.capacity, mixer.groups, mixer.head_dim
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.frequencies = inverse_frequencies(stack, self.max_length, weight.device, wide)

    def admit(self, slots: Tensor, state: LayerState) -> None:
        assert isinstance(state, KVState)
        # Rows that were padded, in any place, are closed up: what is filled comes first, in its order.
        order = state.filled.logical_not().byte().argsort(dim=1, stable=True)[..., None, None]
        width = min(state.k.shape[1], self.k.shape[1])
        for pool, kept in ((self.k, state.k), (self.v, state.v)):
            pool[slots, :width] = kept.gather(1, order.expand_as(kept))[:, :width].to(pool.dtype)

    def export(self, slots: Tensor) -> KVState:
        counts = self.counts[slots]
        width = int(counts.max()) if len(counts) else 0
        filled = torch.arange(width, device=counts.device) < counts[:, None]
        return KVState(self.k[slots, :width], self.v[slots, :width], filled)

    def heads(self, projected: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> dict[str, Any]:
        pool = self.k, self.v
        return {"x": attend_step(projected, *pool, slots, at, self.frequencies, longest=longest, chained=True)}


def fused(owner: nn.Module, weights: Sequence[Tensor]) -> Tensor:
    """The weights (rows_i, d) as one matrix (rows, d) of which each becomes a view: no memory is taken twice.

    Made once for as long as the weights stay where they are; a model that was moved or reloaded is joined anew.
    """
    if len(weights) == 1:
        return weights[0].detach()
    whole = _FUSED.get(owner)
    if whole is None or not _are_parts(weights, whole):
        whole = _FUSED[owner] = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
    return whole


def quantized(owner: nn.Module, maps: Sequence[nn.Linear], whole: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix ``whole`` of some maps in int8, and its rows' scales; made anew when the weights have changed."""
    versions = [one.weight._version for one in maps]
    kept = _QUANTIZED.get(owner)
    if kept is None or kept[0] != versions or kept[1].data_ptr() != whole.data_ptr():
        kept = _QUANTIZED[owner] = (versions, whole, *quantize_rows(whole))
    return kept[2], kept[3]


def _are_parts(weights: Sequence[Tensor], whole: Tensor) -> bool:
    if whole.dtype != weights[0].dtype or whole.device != weights[0].device:
        return False
    parts = whole.split([len(weight) for weight in weights])
    return all(weight.data_ptr() == part.data_ptr() for weight, part in zip(weights, parts, strict=True))


def _joined_bias(projections: Sequence[nn.Linear]) -> Tensor | None:
    """The biases behind one another, zeros for projections without one; None when no projection has one."""
    if all(p.bias is None for p in projections):
        return None
    parts = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in projections]
    return torch.cat(parts)
