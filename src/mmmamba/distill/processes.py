"""The processes of a run: one alone, or as many as a launcher started (``accelerate launch``, ``torchrun``).

Each process has the whole model and takes its share of every step's samples. What is counted and the gradients are
summed over all of them, so that losses and updates are those of one process that takes all samples. Only the main
process writes and prints; all read the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from mmmamba.errors import UserError
from mmmamba.progress import Terminal

T = TypeVar("T")
PATIENCE = timedelta(hours=3)  # with what the main process does alone: building data, encoding a cache, saving


def join(device: torch.device) -> torch.device:
    """Join the other processes, where a launcher started several; the device of this one.

    Raises:
        UserError: when accelerate is not installed; when ``device`` names one GPU for all processes.
    """
    if count() > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.index is not None:
        raise UserError(f"--device {device}: several processes were launched, each with its own GPU: give cuda")
    try:
        from accelerate import PartialState  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("several processes were launched, which needs the package accelerate") from error
    own = PartialState(cpu=device.type == "cpu", timeout=PATIENCE).device
    return device if device.type == "cpu" else own


def leave() -> None:
    """Wait for the others, and part: the end of a run that all have come to."""
    if count() > 1:
        dist.barrier()
        dist.destroy_process_group()


def count() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def console() -> Terminal | None:
    """Where this process shows how far it is: on stderr (None), or nowhere."""
    return None if is_main() else Terminal(quiet=True)


def local_count() -> int:
    """How many of them share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


@contextmanager
def main_first() -> Iterator[None]:
    """The others begin when the main process is done: they read what it has written."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and count() > 1:
        dist.barrier()


def total(value: Tensor) -> Tensor:
    """``value`` summed over all processes, in place; every process gets the same bits."""
    if count() > 1:
        dist.all_reduce(value)
    return value


def gather(items: Sequence[T]) -> list[T]:
    """The items of all processes, one process after another."""
    found: list[Sequence[T]] = [items] * count()
    if count() > 1:
        dist.all_gather_object(found, list(items))
    return [item for part in found for item in part]
