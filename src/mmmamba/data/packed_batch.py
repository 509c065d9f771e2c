"""Encoded samples as tensors: several in one packed row, or padded to rows of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmmamba.data.processor import UNSCORED, Encoded


@dataclass
class Batch:
    """Several sequences in one row.

    Attributes:
        input_ids: int64 (1, total)
        labels: int64 (1, total), unshifted, -100 where unscored.
        cu_seqlens: int32 (s+1,), where each sequence starts, and where the last one ends.
        tiles: uint8 (t, H, W, 3) of all sequences, in order.
        ids: the samples' ids (s).
        scored: int64 (k,), the positions whose next token is scored. Left out, it is found in the labels. That happens
            on the host, before the row moves to a device, so that no pass waits for a count on the device.
        real: int64 (), how many of the row's tokens are real if padding follows them (None: all are).
        tile_counts: how many tiles each sequence has (s).
        top_ids: int32 (1, n, k), the teacher's most likely tokens, where they are kept on disk: of every token, or of
            those that are ``scored``.
        top_log_probs: float16 (1, n, k+1), their log-probabilities, and that of all other tokens together.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    tiles: Tensor
    ids: list[str]
    scored: Tensor = None  # type: ignore[assignment]  # found below
    real: Tensor | None = None
    tile_counts: list[int] = field(default_factory=list)
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scored is None:
            self.scored = (self.labels[0, 1:] != UNSCORED).nonzero()[:, 0]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def sequences(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle tensors as arrays. PyTorch would put them into shared memory, and there may be too little of it."""
        return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            self.__dict__[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Page-locked copies, from which a GPU reads without waiting."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with its tensors moved; ``real`` belongs to a row that stays where it is."""
        moved: dict[str, Any] = {
            key: move(one) for key, one in vars(self).items() if isinstance(one, Tensor) and key != "real"
        }
        return replace(self, **moved)


def pack(samples: Sequence[Encoded]) -> Batch:
    """All samples in one row, without padding."""
    if not samples:
        raise ValueError("nothing to pack")
    starts = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum([len(sample.input_ids) for sample in samples], out=starts[1:])
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([s.input_ids for s in samples], dtype=np.int64)[None]),
        labels=torch.from_numpy(np.concatenate([s.labels for s in samples], dtype=np.int64)[None]),
        cu_seqlens=torch.from_numpy(starts),
        tiles=torch.from_numpy(np.concatenate([s.tiles for s in samples])),
        ids=[sample.id for sample in samples],
        tile_counts=[len(sample.tiles) for sample in samples],
    )


def pad(samples: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """The samples as rows of equal length.

    Returns:
        input_ids int64 (b,l), attention_mask int64 (b,l) with 1 on real tokens, labels int64 (b,l),
        tiles uint8 (t,H,W,3)
    """
    if not samples:
        raise ValueError("nothing to pad")
    shape = len(samples), max(len(sample.input_ids) for sample in samples)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, UNSCORED, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        span = slice(0, length) if side == "right" else slice(shape[1] - length, shape[1])
        ids[row, span], labels[row, span], mask[row, span] = sample.input_ids, sample.labels, 1
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "tiles": torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
    }


def split(samples: Sequence[Encoded], max_tokens: int | None) -> list[list[Encoded]]:
    """Cut the samples, in order, into groups of at most ``max_tokens`` tokens (a longer sample gets its own group).

    There are as few groups as possible. Their lengths are nearly equal, because rows that are replayed as a CUDA graph
    are all padded to the longest.
    """
    if max_tokens is None:
        return [list(samples)] if samples else []
    groups = _runs(samples, max_tokens)
    low, high = 1, max_tokens  # the smallest limit that needs no more groups lies in (low - 1, high]
    while low < high:
        middle = (low + high) // 2
        if len(_runs(samples, middle)) > len(groups):
            low = middle + 1
        else:
            high = middle
    return _runs(samples, high)


def _runs(samples: Sequence[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """Groups of samples, in order, each filled up to ``max_tokens``."""
    groups: list[list[Encoded]] = []
    room = -1
    for sample in samples:
        length = len(sample.input_ids)
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(sample)
        room -= length
    return groups
