"""Ctrl-C while an answer is generated: it waits until the current token is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back inside the block.

    The block gets a function. Call it after the block: it interrupts if Ctrl-C was pressed inside. In any thread but
    the main one nothing is held back, because Ctrl-C only ever arrives in the main thread.
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
