"""What must not go wrong half-way: memory that runs out is said in one line, Ctrl-C waits for a whole token."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from mmmamba.device import is_full, release
from mmmamba.errors import UserError

T = TypeVar("T")


def within_memory(call: Callable[[], T], device: torch.device, doing: str) -> T:
    """What ``call`` returns.

    Raises:
        UserError: naming the device and ``doing``, when memory does not suffice; what was taken is given back then.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
    # Outside the handler, for the error holds the frames that it passed, and they the tensors that filled the memory.
    release(device)
    raise UserError(f"out of memory on {device} while {doing}")


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C is only noted. The function given interrupts, called after it, if that was asked for.

    In a thread of its own nothing is held back, for there Ctrl-C never arrives.
    """
    asked: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return

    def interrupt() -> None:
        if asked:
            handler(*asked.pop())

    signal.signal(signal.SIGINT, lambda number, frame: asked.append((number, frame)))
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, handler)
