"""Measure one point: a decoding step, a prefill, or the greatest batch, of one model after one context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmmamba.benchmark import memory
from mmmamba.benchmark.limits import Cost, int8_bytes, prefill_cost, step_cost
from mmmamba.benchmark.published import PublishedDecoder
from mmmamba.benchmark.timing import Clock, Timing
from mmmamba.data.processor import Encoded
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.engine import BLOCK
from mmmamba.inference.sampling import Sampler, Sampling
from mmmamba.inference.steps import fixed_length, prefill
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import StateBytes
from mmmamba.model.model import Model
from mmmamba.model.state import state_bytes

STEPS = 256  # room after the context for the tokens that are timed: more than the samples and the warm-up
WORDS = 500  # random text is drawn from this many ids
MOST_SEQUENCES = {"cuda": 8192, "cpu": 32}  # in a batch: above this, memory no longer decides
PRECISION = 16  # the greatest batch found is at most a sixteenth too small
STATES = 0.95  # share of the free memory that the states of the greatest batch are expected to need


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found at one point.

    Attributes:
        timing: of a step, or of the time to the first token.
        tokens_per_s: decoded for all sequences together, or read.
        batch: sequences at once.
        state_bytes: kept of one sequence after the context.
        resident_bytes: held between steps: weights, states and room for more (before a prefill: weights).
        peak_bytes: most that was held while it ran; None on a CPU, where PyTorch does not count.
        bytes, flops: the least that the work moves and computes (``limits``).
        graph: whether steps were replayed as a CUDA graph.
        chunk: tokens of a piece in which a prompt was read; the whole prompt's length when it was read at once.
        note: what a reader must also know.
    """

    timing: Timing
    tokens_per_s: float
    batch: int = 1
    state_bytes: int
    resident_bytes: int
    peak_bytes: int | None
    bytes: float
    flops: float
    graph: bool = False
    chunk: int | None = None
    note: str = ""

    @property
    def held_bytes(self) -> int:
        """The memory to compare: the peak, or what is held between steps where no peak is counted."""
        return self.resident_bytes if self.peak_bytes is None else self.peak_bytes


# ---------------------------------------------------------------------------------------------- decoding


def decode(
    model: Model, *, context: int, batch: int = 1, state_dtype: torch.dtype | None = None, seconds: float = 1.0
) -> Measured:
    """Time a step of ``batch`` sequences after ``context`` tokens in the engine's pool; greedy tokens are fed back.

    As in the engine, the picked tokens are read a block of steps later, and the host runs ahead of the GPU until then.
    Caches and states hold random numbers, not those of a real prompt: a step takes equally long with either.
    """
    decoder = furnished(model, context=context, batch=batch, state_dtype=state_dtype)
    slots = torch.arange(batch, device=model.device)
    tokens = torch.zeros(batch, dtype=torch.long, device=model.device)
    sampler = Sampler(Sampling())

    def step() -> None:
        picked, _ = sampler.pick(decoder.step(tokens, slots))
        tokens.copy_(picked)

    memory.reset_peak(model.device)
    timing = Clock(model.device).time(step, seconds=seconds, ahead=BLOCK)
    state = state_bytes(model.config, model.dtype, state_dtype or wide(model.dtype))
    return _step_measured(model, timing, state, context, batch, _pool_bytes(decoder), graph=decoder.graph)


def decode_published(model: Model, *, context: int, mask: bool, seconds: float = 1.0) -> Measured:
    """Time a step of one sequence after ``context`` tokens in the published way (:mod:`mmmamba.benchmark.published`).

    The host waits for each step, since it reads each token before the next step.
    """
    decoder = PublishedDecoder(model, context, mask=mask)
    tokens = torch.zeros(1, dtype=torch.long, device=model.device)

    def step() -> None:
        tokens.copy_(decoder.step(tokens).argmax(-1))

    memory.reset_peak(model.device)
    timing = Clock(model.device).time(step, seconds=seconds)
    return _step_measured(model, timing, state_bytes(model.config, model.dtype), context, 1, decoder.nbytes)


def furnished(
    model: Model,
    *,
    context: int,
    batch: int,
    state_dtype: torch.dtype | None = None,
    graph: bool | None = None,
) -> Decoder:
    """A pool whose first ``batch`` slots hold made-up sequences of ``context`` tokens."""
    capacity = context + STEPS
    length = fixed_length(model, capacity)
    decoder = Decoder(model, batch, capacity, max_length=length, graph=graph, state_dtype=state_dtype)
    decoder.reserve(capacity)
    for tensor in _pool(decoder):
        tensor.normal_()
    for counts in (decoder.positions, decoder.embedded):
        counts[:batch] = context
    decoder.longest = context
    return decoder


def _pool(decoder: Decoder) -> list[Tensor]:
    return [tensor for kept in decoder.pool for tensor in kept.tensors()]


def _pool_bytes(decoder: Decoder) -> int:
    return sum(tensor.nbytes for tensor in _pool(decoder))


def _step_measured(
    model: Model,
    timing: Timing,
    state: StateBytes,
    context: int,
    batch: int,
    held: int,
    *,
    graph: bool = False,
) -> Measured:
    """``held``: bytes of caches and states, with room for more."""
    cost: Cost = step_cost(model, state, context=context, batch=batch)
    return Measured(
        timing=timing,
        tokens_per_s=batch / timing.ms * 1e3,
        batch=batch,
        state_bytes=state.at(context),
        resident_bytes=weight_bytes(model) + held,
        peak_bytes=memory.peak(model.device),
        bytes=cost.bytes,
        flops=cost.flops,
        graph=graph,
    )


# ---------------------------------------------------------------------------------------------- prefill


def read_prompt(
    model: Model, *, length: int, images: bool = False, chunk: int, seconds: float = 1.0, longest: float = math.inf
) -> Measured | None:
    """Time a prompt of ``length`` tokens until its first token; None when it does not fit into memory.

    A network with softmax layers reads the prompt at once if that fits, which is fastest for it, else in pieces of
    ``chunk`` tokens. A network without softmax layers always reads in pieces.

    Args:
        images: as many pictures' tokens as fit instead of text, from uint8 tiles.
        longest: seconds after which the prompt is not read again.
    """
    encoded = prompt(model.config, length, images=images)
    for piece in (length, chunk) if model.config.attention_layers and length > chunk else (min(chunk, length),):
        found = memory.attempt(lambda size=piece: _read(model, encoded, size, seconds, longest), model.device)  # type: ignore[misc]
        if found is not None:
            return found
    return None


def _read(model: Model, encoded: Encoded, chunk: int, seconds: float, longest: float) -> Measured:
    length = len(encoded.input_ids)

    def read() -> None:
        logits, _ = prefill(model, [encoded], chunk=chunk, max_new_tokens=1)
        int(logits.argmax())  # on the host, where a reader would see it

    memory.reset_peak(model.device)
    with torch.no_grad():
        timing = Clock(model.device).time(read, seconds=seconds, warm_up=1, least=2, longest=longest)
    state = state_bytes(model.config, model.dtype, wide(model.dtype))
    cost = prefill_cost(model, state, length=length)
    return Measured(
        timing=timing,
        tokens_per_s=length / timing.ms * 1e3,
        state_bytes=state.at(length),
        resident_bytes=weight_bytes(model),
        peak_bytes=memory.peak(model.device),
        bytes=cost.bytes,
        flops=cost.flops,
        chunk=chunk,
    )


def prompt(config: ModelConfig, length: int, *, images: bool = False) -> Encoded:
    """A prompt of ``length`` tokens: random text, or as many tiles of noise as fit and then text."""
    image = config.img_context_token_id
    random = np.random.default_rng(0)
    ids = random.integers(0, min(WORDS, config.vocab_size), length, dtype=np.int32)
    ids[ids == image] = (image + 1) % config.vocab_size  # the id that stands for a picture would need one
    tiles = np.empty((0,), np.uint8)
    if images:
        vision = config.vision
        assert vision is not None
        count = length // vision.tokens_per_tile
        ids[: count * vision.tokens_per_tile] = image
        tile = random.integers(0, 256, (1, vision.image_size, vision.image_size, 3), dtype=np.uint8)
        tiles = np.broadcast_to(tile, (count, *tile.shape[1:]))  # the same tile again and again, without copies
    return Encoded(input_ids=ids, labels=np.full(length, -100, np.int32), tiles=tiles, id="bench", where="bench")


# ---------------------------------------------------------------------------------------------- the greatest batch


def greatest_batch(
    model: Model,
    *,
    context: int,
    state_dtype: torch.dtype | None = None,
    budget: int | None = None,
    seconds: float = 0.5,
) -> Measured | None:
    """Time a step of the most sequences that fit; None when not even one fits.

    The number is found by trying, exact to a sixteenth. The first try is computed from the bytes of a state.

    Args:
        budget: bytes that weights and states may take. Default: all that the device has; on a CPU it must be given.
    """
    device = model.device
    each = state_bytes(model.config, model.dtype, state_dtype or wide(model.dtype)).at(context + STEPS)
    most = MOST_SEQUENCES["cuda" if device.type == "cuda" else "cpu"]
    bound = most
    if budget is not None:
        bound = min(bound, (budget - weight_bytes(model)) // each)
    elif device.type != "cuda":
        raise ValueError("on a CPU the greatest batch needs a budget of bytes")
    if bound < 1:
        return None

    found: dict[int, Measured | None] = {}

    def fits(batch: int) -> bool:
        found[batch] = memory.attempt(
            lambda: decode(model, context=context, batch=batch, state_dtype=state_dtype, seconds=seconds), device
        )
        return found[batch] is not None

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        batch = greatest(fits, guess=int(STATES * free / each), most=min(bound, free // each))
    else:
        batch = bound if fits(bound) else 0  # trying more could exhaust the machine's memory
    best = found.get(batch)
    reason = f"bounded by {most:,} sequences, not by memory" if batch == most else ""
    return None if best is None else replace(best, note=reason)


def greatest(fits: Callable[[int], bool], *, guess: int, most: int) -> int:
    """Find the greatest number from 0 to ``most`` that fits; the answer is at most a sixteenth too small.

    Args:
        fits: whether a number of at least 1 fits; if it does, so does every smaller one.
        guess: where to begin. From there the search takes growing steps, up while it fits or down until it does, and
            then bisects. A guess that is right to a sixteenth takes two tries, or one if it is as near to ``most``.
        most: nothing above this is tried.
    """
    fitting, failing = 0, most + 1
    number = max(1, min(guess, most))
    stride = max(1, number // PRECISION)
    while failing - fitting > max(1, fitting // PRECISION):
        if fits(number):
            fitting = number
        else:
            failing = number
        if fitting and failing <= most:
            number = (fitting + failing) // 2
        else:
            number = min(fitting + stride, most) if fitting else max(failing - stride, 1)
            stride *= 2
    return fitting


# ---------------------------------------------------------------------------------------------- sizes


def weight_bytes(model: Model) -> int:
    """Bytes of the model's weights and of their int8 copies, where steps read those; prompts still need the weights."""
    return sum(parameter.nbytes for parameter in model.parameters()) + int8_bytes(model)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The number format of states when weights are of ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
