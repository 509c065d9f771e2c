"""What memory holds, and what to do when it is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mmmamba.device import is_full, release

__all__ = ["attempt", "is_full", "peak", "release", "reset_peak"]

T = TypeVar("T")


def attempt(call: Callable[[], T | None], device: torch.device) -> T | None:
    """What ``call`` returns, or None when memory does not suffice; either way what it used is given back.

    Running out is an answer here, not an accident: it is how the edge of a machine is found.
    """
    found = None
    try:
        found = call()
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
    # Outside the handler: the error holds the frames that it passed, and they the tensors that filled the memory.
    release(device)
    return found


def reset_peak(device: torch.device) -> None:
    """From here on counts what :func:`peak` says."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most bytes that tensors have held since :func:`reset_peak`; None where PyTorch does not count them (a CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
