"""What memory holds, and what to do when it is full."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

#: How an allocation that failed says so, where it is no OutOfMemoryError: cuBLAS's workspace, the CPU's allocator.
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


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
    # Outside the handler: the error holds the frames that it passed, and they the tensors that filled the memory. After
    # a success too: a pool and its layers hold one another, so that only collecting garbage frees them.
    release(device)
    return found


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, or came of one that does (a capture that broke off)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in FULL):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and is_full(before)


def release(device: torch.device) -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """From here on counts what :func:`peak` says."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most bytes that tensors have held since :func:`reset_peak`; None where PyTorch does not count them (a CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
