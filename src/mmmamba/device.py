"""Which device, number format and number of cores a verb uses; memory that runs out; copies to the host."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from mmmamba.errors import UserError

T = TypeVar("T")

#: Messages of failed allocations that are not an OutOfMemoryError: cuBLAS's workspace, the CPU's allocator.
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")

MOST_WORKERS = 128  # most processes that a user may ask for: each takes memory, and a thousand would stop a machine
TOGETHER = 64 * 2**20  # bytes that are copied at once: they are gathered on the device, and pinned on the host


def pick_device(device: str = "auto") -> torch.device:
    """``auto``: the GPU if there is one, else the CPU.

    Raises:
        UserError: for a device that PyTorch does not know or that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if not re.fullmatch("(cpu|cuda|mps)(:[0-9]{1,4})?", device):
        raise UserError(f"--device {device}: must be auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: PyTorch sees no Apple GPU here")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: PyTorch sees {torch.cuda.device_count() or 'no'} CUDA GPU here")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format of weights for inference: ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    found: torch.dtype = getattr(torch, dtype)
    return found


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The number format of a training pass: ``auto`` is bf16 (over float32 weights) on a GPU, fp32 on a CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory ran out, or was caused by one that does (such as a capture that failed)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in FULL):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and is_full(before)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the CPU. Small ones are copied together, because each copy takes time."""
    found: dict[int, Tensor] = {}
    for journey in _journeys(tensors):
        load = [tensors[i].detach().contiguous().reshape(-1).view(torch.uint8) for i in journey]
        whole = load[0] if len(load) == 1 else torch.cat(load)
        here = host_bytes(whole.numel()).copy_(whole)
        for i, part in zip(journey, here.split([part.numel() for part in load]), strict=True):
            found[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


def host_bytes(count: int) -> Tensor:
    """Uninitialised bytes on the CPU. If there is a GPU and they are not too many, they are pinned, for fast copies.

    PyTorch keeps pinned memory when it is freed, so the next request need not wait for new pages of the system.
    """
    return torch.empty(count, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized() and count <= TOGETHER)


def _journeys(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices of tensors to copy together. Wide number formats come first, so that each tensor is aligned."""
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    load: list[int] = []
    size = 0
    for i in order:
        if load and size + tensors[i].nbytes > TOGETHER:
            yield load
            load, size = [], 0
        load.append(i)
        size += tensors[i].nbytes
    if load:
        yield load


def release(device: torch.device) -> None:
    """Free the memory that no tensor uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def within_memory(call: Callable[[], T], device: torch.device, doing: str) -> T:
    """What ``call`` returns.

    Raises:
        UserError: when memory runs out; it names the device and ``doing``. The memory that was taken is released first.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
    # This happens after the handler: the error refers to the frames it passed, and those to the tensors to be freed.
    release(device)
    raise UserError(f"out of memory on {device} while {doing}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Stop the garbage collector. While a CUDA graph is captured, freeing an older one would break the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
