"""The contract of a kind of layer, and the register of all kinds.

A kind is a class: a :class:`Mixer` with its :class:`Options` and its
:class:`~mmmamba.model.mixers.layer_state.LayerState`. Everything that differs between kinds is a method or an attribute
of that class. No other package compares the names of kinds: it asks the mixer, or :func:`kind_named` for the class of
an entry of the layer map.

A new kind is one file::

    @register
    class Retention(Mixer[RetentionState]):
        name, options_class = "retention", RetentionOptions
        …

It has to define ``heads`` and ``empty_state``. All else has defaults that are right for any mixer whose state has a
fixed size, and that a kind overrides to be faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from mmmamba.model.mixers.cost import WIDE, Passes, StateBytes, bytes_saved
from mmmamba.model.mixers.layer_state import LayerState, Pool, PoolSpec, S
from mmmamba.model.rope import Rotation, rotation
from mmmamba.model.stack import StackConfig

UNNAMED = "mamba2"  # the kind of options that do not say whose they are
MEASURED = 512  # tokens of the longest sequence on which what a mixer keeps is measured
Init = Literal["mimic", "inherit", "scratch"]  # how new mixers start: see :func:`mmmamba.distill.seeding.seed`


@dataclass(frozen=True)
class Options:
    """The named options of a kind of layer: a frozen dataclass, with a default for each.

    In files, options are a mapping with the name of their kind under ``kind``, so a subclass has a field ``kind`` with
    that default. The options of Mamba-2 were there before there were other kinds, and have no such field.
    """

    @classmethod
    def resolve(cls, data: Mapping[str, Any]) -> tuple[type[Options], dict[str, Any]]:
        """Whose options a mapping of a file holds, and the mapping without that name.

        Raises:
            ValueError: there is no such kind.
        """
        rest = dict(data)
        return kind_named(rest.pop("kind", UNNAMED)).options_class, rest

    def check_init(self, init: Init) -> None:
        """Refuse a way to start that does not go with these options (ValueError)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a mixer that distillation can train by name: one parameter, or those of one module.

    Attributes:
        inherited: attention has it too, and it starts as a copy of attention's.
        matrix: its weight is a map between hidden states: passes in bfloat16 cast it, and Muon moves it if a recipe
            asks for Muon.
        float32: its parameters stay in float32 wherever they are kept.
        decays: whether weight decay pulls on it; None: on what has two dimensions.
        rate: a factor on the learning rate.
    """

    inherited: bool = False
    matrix: bool = False
    float32: bool = False
    decays: bool | None = None
    rate: float = 1.0


class Mixer(nn.Module, Generic[S]):
    """The part of a layer in which tokens see each other.

    It reads the layer's normed input and gives h heads of p channels, which W_o (``o_proj``) maps back to the hidden
    size. Stages 1 and 2 compare these heads with those of the teacher's attention.

    Args:
        hidden_size: d, the width of the layer's input.
        stack: the geometry of the stack that the layer is in.
        options: those of this kind.

    Attributes:
        name: of the kind in layer maps.
        options_class: of the kind's options.
        seeded: whether distillation makes such layers from a teacher's attention. False for softmax attention itself:
            a layer of that kind is the teacher's own.
        grows: whether the state of a sequence grows with its length.
        capturable: whether ``heads`` can be part of a CUDA graph: with kernels for it, it waits for no answer of the
            device, and takes borders that only the device knows (:class:`~mmmamba.ops.packing.DeviceLayout`).
        attends: whether heads are sums over all tokens, weighted by softmax, so that there are weights to be shown.
        parts: what can be trained by name, W_o (``o_proj``) left out.
        step_modules: where the kind has a decoding step of its own, the classes of the modules, beside
            ``torch.nn.Linear``, whose weights the step reads without calling them.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    seeded: ClassVar[bool] = True
    grows: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, Part]] = {}
    step_modules: ClassVar[tuple[type[nn.Module], ...]] = ()

    o_proj: nn.Linear

    def __init__(self, hidden_size: int, stack: StackConfig, options: Options) -> None:
        super().__init__()
        self.hidden_size, self.stack, self.options = hidden_size, stack, options
        self.heads_count, self.groups, self.head_dim = stack.num_heads, stack.num_kv_heads, stack.head_dim

    # ------------------------------------------------------------------------------------------ passes

    def heads(
        self,
        x: Tensor,
        state: S | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, S | None]:
        """The heads before W_o, and the new state if ``keep_state``.

        A sequence may be cut into passes anywhere: each goes on from the state of the last one.

        Args:
            x: (b, l, d), normed; a packed row has b = 1.
            state: of the sequences' earlier tokens; None at their start.
            rotation: RoPE at the positions of these tokens.
            cu_seqlens: (s+1,) borders of the sequences of a packed row. States then have s rows.
            keep_state: whether the state is wanted.

        Returns:
            (b, l, h, p), and the state or None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no heads()")

    def forward(
        self,
        x: Tensor,
        state: S | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
        observe: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, S | None]:
        """x (b, l, d) → (b, l, d) and the new state: :meth:`heads`, then W_o. ``observe`` is called with the heads."""
        y, new = self.heads(x, state, rotation=rotation, cu_seqlens=cu_seqlens, keep_state=keep_state)
        if observe is not None:
            observe(y)
        return self.o_proj(y.flatten(-2)), new

    def reset_new_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start what attention does not have, where :func:`~mmmamba.model.initialise` would start it otherwise."""

    def queries_and_keys(self, x: Tensor, rotation: Rotation, state: S | None) -> tuple[Tensor, Tensor]:
        """Rotated queries (b, l, h, p) of x (b, l, d), and keys (b, past + l, g, p), of a mixer that attends."""
        raise NotImplementedError(f"{type(self).__name__} has no attention weights")

    def compile_parts(self) -> None:
        """Compile what surrounds the kernels of :meth:`heads` (torch.compile); one compilation serves all layers."""

    # ------------------------------------------------------------------------------------------ state

    def empty_state(self, rows: int, *, dtype: torch.dtype, wide: torch.dtype, device: torch.device | str) -> S:
        """The state of ``rows`` sequences before their first token.

        Args:
            dtype: of what holds activations, such as keys and values.
            wide: of what sums over the whole sequence; float32, where nothing else is asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no empty_state()")

    def misfits(self, state: S, seen: int) -> Iterator[tuple[str, str]]:
        """The tensors of a stranger's state that are not those of one sequence after ``seen`` tokens: each one's name,
        and what is wrong with it.

        The tensors have the names and kinds of numbers of :meth:`empty_state`, and are finite.
        """
        empty = self.empty_state(1, dtype=torch.float32, wide=torch.float32, device="meta")
        yield from other_shapes(state, {name: tensor.shape for name, tensor in empty.tensors().items()})

    # ------------------------------------------------------------------------------------------ decoding

    def step_maps(self) -> list[nn.Linear]:
        """The maps that read the mixer's input, whose matrices the pool's step reads as one, in this order.

        Empty where the step is a pass of the mixer. A kind that has some has a pool of its own, which reads the weights
        of the mixer's modules and calls none of them.
        """
        return []

    def pool(self, spec: PoolSpec) -> Pool[S]:
        """Room for many sequences' states, and the step that decodes them."""
        return Pool(self, spec)

    def step_graphable(self) -> bool:
        """Whether the pool's step can be captured as a CUDA graph."""
        return self.capturable

    # ------------------------------------------------------------------------------------------ training

    @classmethod
    def parts_with(cls, options: Options) -> Mapping[str, Part]:
        """The parts of a mixer with these options."""
        return cls.parts

    def start_from_scratch(self, generator: torch.Generator) -> None:
        """Start all of the mixer as its authors do, W_o too. By default its maps, as PyTorch's do: uniform in
        ±1/√inputs, their biases too.
        """
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                for parameter in layer.parameters():
                    draw_uniform(parameter, layer.in_features**-0.5, generator)

    def inherit(self, attention: Mixer[Any]) -> None:
        """Copy what attention has too, and share its W_o."""
        for name, part in self.parts_with(self.options).items():
            if part.inherited:
                source, target = getattr(attention, name), getattr(self, name)
                target.weight.copy_(source.weight)
                if target.bias is not None:
                    target.bias.copy_(source.bias)
        self.o_proj = attention.o_proj

    # ------------------------------------------------------------------------------------------ cost

    def matrix_elements(self, parts: Collection[str] | None = None) -> int:
        """Elements of the matrices between hidden states, W_o left out; of some parts, or of all."""
        wanted = [name for name, part in self.parts_with(self.options).items() if part.matrix]
        chosen = [name for name in wanted if parts is None or name in parts]
        return sum(getattr(self, name).weight.numel() for name in chosen)

    def state_bytes(self, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> StateBytes:
        """Bytes of a sequence's state, with activations in ``dtype`` and what sums over the sequence in ``wide``."""
        state = self.empty_state(1, dtype=dtype, wide=wide, device="meta")
        return StateBytes(recurrent=sum(tensor.nbytes for tensor in state.tensors().values()), per_token=0)

    def step_flops(self, context: float) -> float:
        """Operations on a token after ``context`` others, products with its matrices left out.

        By default those of a recurrence over a (p, p) state for each head: decay, update and read-out.
        """
        return 5 * self.heads_count * self.head_dim**2

    def pass_flops(self, context: float) -> float:
        """The same for a token of a pass over many, which may do more for the sake of parallelism."""
        return self.step_flops(context)

    def pass_traffic(self) -> float:
        """Bytes of memory traffic for a token of a forward pass in bfloat16, beside what attention needs too.

        By default those of a recurrence: what it reads and writes around its chunks.
        """
        return 8 * (4 * self.heads_count + 4 * self.groups) * self.head_dim + 2 * WIDE * self.hidden_size

    def saved_bytes(self, passes: Passes, tokens: int, trained: Collection[str]) -> int:
        """Bytes that :meth:`heads` keeps for its backward pass over one sequence of ``tokens`` tokens.

        By default they are measured in a pass in float32 on the CPU, which keeps more than one in bfloat16. Long
        sequences are extrapolated.

        Args:
            trained: the parts that are trained.
        """
        kind: Any = type(self)
        whole = _measured_saved(kind, self.hidden_size, self.stack, self.options, min(tokens, MEASURED))
        if tokens <= MEASURED:
            return whole
        half = _measured_saved(kind, self.hidden_size, self.stack, self.options, MEASURED // 2)
        return whole + (tokens - MEASURED) * (whole - half) // (MEASURED // 2)

    def backward_bytes(self, passes: Passes, tokens: int) -> int:
        """Bytes that the backward pass needs beside what was kept. By default the gradients of q, k, v and heads."""
        return tokens * passes.width * (2 * self.heads_count + 2 * self.groups) * self.head_dim

    def keeps_heads(self, passes: Passes) -> bool:
        """Whether the heads are among what is kept, so that W_o's gradient takes no more memory."""
        return False


@functools.lru_cache(maxsize=64)
def _measured_saved(kind: type[Mixer[Any]], hidden_size: int, stack: StackConfig, options: Options, tokens: int) -> int:
    """Bytes that a pass of a mixer keeps; its weights are whatever lies in memory."""
    with torch.device("meta"):
        mixer = kind(hidden_size, stack, options)
    mixer = mixer.to_empty(device="cpu")
    x = torch.zeros(1, tokens, hidden_size, requires_grad=True)
    turn = rotation(stack, torch.arange(tokens)[None], tokens, torch.float32)
    return bytes_saved(lambda: mixer.heads(x, rotation=turn), mixer.parameters())


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator, low: float | None = None) -> None:
    """Fill a parameter with numbers from [-bound, bound], or [low, bound]."""
    low = -bound if low is None else low
    parameter.copy_(low + (bound - low) * torch.rand(parameter.shape, generator=generator))


def other_shapes(state: LayerState, expected: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    """The tensors of a state that have other shapes than expected: each one's name, and what is wrong with it."""
    for name, tensor in state.tensors().items():
        if tuple(tensor.shape) != tuple(expected[name]):
            yield name, f"is {tuple(tensor.shape)}, expected {tuple(expected[name])}"


# ---------------------------------------------------------------------------------------------- register

_KINDS: dict[str, type[Mixer[Any]]] = {}
M = TypeVar("M", bound=type[Mixer[Any]])


def register(mixer: M) -> M:
    """Make a kind known under its name, so that layer maps, recipes and files can have it: a class decorator."""
    named = {field.name: field.default for field in fields(mixer.options_class)}.get("kind", UNNAMED)
    if named != mixer.name:
        raise ValueError(f"{mixer.options_class.__name__} needs a field 'kind' with the default {mixer.name!r}")
    _KINDS[mixer.name] = mixer
    return mixer


def kinds() -> Mapping[str, type[Mixer[Any]]]:
    """Every kind of layer, by name."""
    return _KINDS


def kind_named(name: str) -> type[Mixer[Any]]:
    """The class of a kind; ValueError where there is none of this name."""
    if name not in _KINDS:
        raise ValueError(f"there is no kind of layer {name!r} (known: {', '.join(_KINDS)})")
    return _KINDS[name]


def options_for(name: str, given: Sequence[Options]) -> Options:
    """The options of a kind among those given, or its defaults."""
    wanted = kind_named(name).options_class
    return next((options for options in given if type(options) is wanted), wanted())


def kind_of(options: Options) -> type[Mixer[Any]]:
    """The kind that some options are of."""
    return next(mixer for mixer in _KINDS.values() if mixer.options_class is type(options))


def default_options() -> Options:
    """The published options of the kind that distillation makes where nothing is said."""
    return kind_named(UNNAMED).options_class()


def float32_names() -> tuple[str, ...]:
    """The names of parameters that stay in float32 in a mixer of any kind."""
    kept = (name for mixer in _KINDS.values() for name, part in mixer.parts.items() if part.float32)
    return tuple(dict.fromkeys(kept))
