"""The steps that generation and scoring are made of: grouping, embedding, prefill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypedDict

import numpy as np
import torch

from mmmamba.data.packed_batch import pack
from mmmamba.data.processor import Encoded
from mmmamba.data.tiling import normalise
from mmmamba.errors import UserError
from mmmamba.inference.prefill_graphs import replayed_pass
from mmmamba.model.model import Model, Output
from mmmamba.model.state import State
from mmmamba.model.vision import check_slots

Progress = Callable[[int, int], None]

PREFILL_CHUNK = 4096
BATCH_TOKENS = 8192


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if not value >= 1:  # NaN is not
            raise UserError(f"{name} must be at least 1, got {value}")


def fixed_length(model: Model, length: int) -> int:
    """The ``max_length`` for a text that will grow to ``length``: what dynamic RoPE scaling, if any, is fixed for.

    A text within the trained range is not scaled, so that range is the least; a conversation may then grow up to it.
    """
    limit = _dynamic_limit(model)
    return length if limit is None else max(length, limit)


class Fixed(TypedDict):
    """What dynamic RoPE scaling is fixed for when sequences begin: arguments of a pass and of a pool."""

    max_length: int
    max_embedded: int | None


def fixed_for(model: Model, encodeds: Sequence[Encoded], extra: int) -> Fixed:
    """What dynamic RoPE scaling is fixed for in sequences read together, each to grow by ``extra`` tokens."""
    return {
        "max_length": fixed_length(model, max(len(encoded.input_ids) for encoded in encodeds) + extra),
        "max_embedded": (
            fixed_length(model, max(extent(model, encoded) for encoded in encodeds) + extra)
            if model.merges_late
            else None
        ),
    }


def groups(model: Model, lengths: Sequence[int], *, budget: int, chunk: int) -> Iterator[list[int]]:
    """Indices of sequences to read together, longest first, so that the largest group shows at once whether it fits.

    A group's sequences times its longest length is at most ``budget``, unless it is a single sequence. Alone run: a
    sequence that is read in chunks, and one that dynamic RoPE scaling rotates by its own length.
    """
    limit = _dynamic_limit(model)
    alone = chunk if limit is None else min(chunk, limit)
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group:
            longest = lengths[group[0]]
            if longest > alone or (len(group) + 1) * longest > budget:
                yield group
                group = []
        group.append(i)
    if group:
        yield group


@dataclass(frozen=True, kw_only=True)
class Share:
    """Prompts that are answered in one pool, as many at once as it has slots.

    Attributes:
        members: indices of the prompts, longest first.
        slots: how many are answered at once.
        capacity: tokens (or patches) of the longest prompt and its longest answer.
        fixed: what dynamic RoPE scaling, if any, is fixed for in all of them.
    """

    members: tuple[int, ...]
    slots: int
    capacity: int
    fixed: Fixed


def shares(model: Model, prompts: Sequence[Encoded], *, extra: int, budget: int) -> Iterator[Share]:
    """Pools to answer prompts in, one after the other, longest prompts first: the largest shows at once if it fits.

    A pool's slots times the tokens that each holds (a prompt and ``extra``) are at most ``budget``, unless it has a
    single slot. A pool is left for the next when all its slots are taken and twice as many would fit there, for the
    prompts that are left are so much shorter; or when dynamic RoPE scaling rotates the next prompt otherwise.
    """
    held = [extent(model, prompt) + extra for prompt in prompts]
    fixed = [fixed_for(model, [prompt], extra) for prompt in prompts]
    members: list[int] = []

    def share() -> Share:
        capacity = held[members[0]]
        slots = min(len(members), max(1, budget // capacity))
        return Share(members=tuple(members), slots=slots, capacity=capacity, fixed=fixed[members[0]])

    for i in sorted(range(len(prompts)), key=lambda i: (-held[i], i)):
        if members:
            longest = held[members[0]]
            full, shorter = len(members) >= max(1, budget // longest), 2 * held[i] <= longest
            if (full and shorter) or (model.dynamic_rope and fixed[i] != fixed[members[0]]):
                yield share()
                members = []
        members.append(i)
    if members:
        yield share()


def extent(model: Model, encoded: Encoded) -> int:
    """The most positions that any layer sees of a sequence: its tokens, or patches where those are read as such."""
    length = len(encoded.input_ids)
    if not model.merges_late or model.vision is None:
        return length
    image = int(np.count_nonzero(np.asarray(encoded.input_ids) == model.config.img_context_token_id))
    return length + image * (model.vision.config.shuffle**2 - 1)


def _dynamic_limit(model: Model) -> int | None:
    """The length above which a stack with dynamic RoPE scaling depends on the length; None without such a stack."""
    stacks = (model.config.embedding, model.config.decoder)
    limits = [
        stack.max_position_embeddings
        for stack in stacks
        if stack.num_layers and stack.rope_scaling is not None and stack.rope_scaling.type == "dynamic"
    ]
    return min(limits, default=None)


def pixels(model: Model, tiles: torch.Tensor) -> torch.Tensor | None:
    """Normalised float tiles (t, 3, H, W) on the model's device and in its dtype, from uint8 (t, H, W, 3)."""
    _check_sees(model, len(tiles))
    if not len(tiles):
        return None
    return normalise(tiles.to(model.device)).to(model.dtype)


def _check_prompt(model: Model, encoded: Encoded) -> None:
    """Refuse what cannot be read: nothing, or pictures that have more or fewer tokens than there are places for."""
    if not len(encoded.input_ids):
        raise UserError(f"{encoded.where}: the prompt '{encoded.id}' has no tokens")
    _check_sees(model, len(encoded.tiles))
    if model.vision is None:
        return
    places = int(np.count_nonzero(np.asarray(encoded.input_ids) == model.config.img_context_token_id))
    tokens = len(encoded.tiles) * model.vision.config.tokens_per_tile
    if places != tokens:
        raise UserError(
            f"{encoded.where}: the prompt '{encoded.id}' has {places} <IMG_CONTEXT> positions for {tokens} image "
            f"tokens ({len(encoded.tiles)} tiles)"
        )


def _check_sees(model: Model, tiles: int) -> None:
    if tiles and model.vision is None:
        raise UserError("this model reads text only, it cannot be shown pictures")


def chunks(model: Model, encoded: Encoded, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of the passes that read one sequence, in pieces of at most ``size`` tokens.

    Pictures are decoded and embedded as their piece comes: however many there are, no more than a piece's are in
    memory. A tile is embedded whole, and where its patches become tokens after the embedding stack (``merges_late``)
    it is also read whole, even if it is larger than ``size``.
    """
    for ids, pixel_values in _spans(model, encoded, size):
        if model.merges_late and pixel_values is not None:
            yield {"input_ids": ids, "pixel_values": pixel_values}
        else:
            for piece in model.embed(ids, pixel_values, spare_tiles=True).split(size, dim=1):  # they were counted
                yield {"inputs_embeds": piece}


def _spans(model: Model, encoded: Encoded, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Ids (1, l) and pixels of stretches of about ``size`` tokens, none of which begins or ends within a tile."""
    _check_sees(model, len(encoded.tiles))
    ids, tiles = np.asarray(encoded.input_ids), iter(encoded.tiles)
    per_tile = model.vision.config.tokens_per_tile if model.vision is not None else 1
    before = np.concatenate([[0], np.cumsum(ids == model.config.img_context_token_id)])  # image tokens, by position
    check_slots(int(before[-1]), len(encoded.tiles) * per_tile, len(encoded.tiles))
    borders = np.flatnonzero(before % per_tile == 0)
    on_device = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)  # at once: each copy waits for the device
    start = 0
    while start < len(ids):
        wanted, next_one = np.searchsorted(borders, [start + size, start], side="right")
        end = int(borders[max(wanted - 1, next_one)])
        own = list(islice(tiles, int(before[end] - before[start]) // per_tile))
        stacked = torch.from_numpy(np.stack(own) if own else np.empty((0,)))
        yield on_device[:, start:end], pixels(model, stacked)
        start = end


def passes(
    model: Model, encoded: Encoded, size: int, *, logits: Literal["last", "none"], extra: int, state: State | None
) -> Iterator[Output]:
    """Read one sequence after ``state`` in pieces of at most ``size`` tokens: what each pass gives. ``extra`` tokens
    are to follow it.

    The next pass may write into the caches of the last one's state, which therefore has to be settled
    (:func:`mmmamba.model.state.State.settled`) when all is read.
    """
    left, fixed = extent(model, encoded), fixed_for(model, [encoded], extra)
    for piece in chunks(model, encoded, size):
        grown = None if state is None else state.growing(left)
        out = None
        if logits == "last" and "inputs_embeds" in piece:
            out = replayed_pass(model, piece["inputs_embeds"], grown, fixed["max_length"])
        if out is None:
            out = model(**piece, state=grown, logits=logits, return_state=True, **fixed)
        state, left = out.state, left - out.hidden.shape[1]
        yield out


def prefill(
    model: Model, encodeds: Sequence[Encoded], *, chunk: int, max_new_tokens: int, state: State | None = None
) -> tuple[torch.Tensor, State]:
    """Read prompts: the logits (s, v) after the last token of each, and the state with one row each.

    A single prompt is read in pieces of ``chunk`` tokens; several are read together, in one pass. ``state`` (of a
    single sequence) is what came before.
    """
    for encoded in encodeds:
        _check_prompt(model, encoded)
    if len(encodeds) == 1:
        read = passes(model, encodeds[0], chunk, logits="last", extra=max_new_tokens, state=state)
        (last,) = deque(read, maxlen=1)
        assert last.logits is not None and last.state is not None
        return last.logits, last.state.settled()
    batch = pack(list(encodeds))
    out = model(
        batch.input_ids.to(model.device),
        pixels(model, batch.tiles),
        cu_seqlens=batch.cu_seqlens.to(model.device),
        state=state,
        logits="last",
        return_state=True,
        **fixed_for(model, encodeds, max_new_tokens),
    )
    return out.logits, out.state
