"""Processes that prepare numbered items ahead of time, and deliver them in order.

Each worker sends its items through its own pipe. Nothing goes through shared memory: a container has only 64 MB of it
unless more was asked for, and a process that writes beyond that is killed or blocked. A worker that dies closes its
pipe, so its parent knows at once. A worker whose parent has died ends too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast

from mmmamba.errors import UserError

T = TypeVar("T")

GRACE = 5.0  # seconds that a process may take to end after its pipe was closed


def ordered(
    work: Callable[[int], T],
    start: int,
    stop: int | None,
    *,
    workers: int,
    ahead: int = 2,
    receive: Callable[[T], T] | None = None,
) -> Generator[T, None, None]:
    """``work(start)``, ``work(start + 1)``, … up to ``stop`` (None: without end). This call starts the processes. They
    are killed when the generator is closed.

    Args:
        work: makes an item. It is pickled if processes are spawned; its results are always pickled.
        workers: the number of processes; 0 makes each item in this process, when it is asked for.
        ahead: items that each worker makes before they are asked for.
        receive: applied to each item in a thread as it arrives, before it is asked for.

    Raises:
        UserError: a worker died.
        RuntimeError: ``work`` raised in a worker; the message has its traceback.
    """
    numbers = range(start, sys.maxsize if stop is None else stop)
    if workers < 1:
        return (item if receive is None else receive(item) for item in map(work, numbers))
    context = multiprocessing.get_context()
    crew: list[_Worker[T]] = []
    for _ in range(min(workers, len(numbers))):
        crew.append(_Worker(context, work, [worker.pipe for worker in crew]))
    return _delivered(crew, numbers, ahead, receive)


def _delivered(
    crew: list[_Worker[T]], numbers: Iterable[int], ahead: int, receive: Callable[[T], T] | None
) -> Generator[T, None, None]:
    try:
        for worker in crew:
            worker.listen(receive)
        asked = iter(numbers)
        for _ in range(ahead):
            for worker in crew:
                worker.ask(next(asked, None))
        for worker, _ in zip(cycle(crew), numbers, strict=False):
            for other in crew:  # report a dead worker at once, not when its turn comes
                other.check()
            yield worker.next()
            worker.ask(next(asked, None))
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.end()


class _Worker(Generic[T]):
    """A worker process, seen from its parent."""

    def __init__(self, context: BaseContext, work: Callable[[int], T], older: list[Connection]) -> None:
        self.pipe, theirs = context.Pipe()
        # A forked process inherits what its parent has open: the pipes of older workers, and the other end of its own.
        held = [*older, self.pipe] if context.get_start_method() == "fork" else []
        self.process = cast(
            BaseProcess,
            context.Process(target=_serve, args=(theirs, work, held, os.getpid()), daemon=True),  # type: ignore[attr-defined]
        )
        self.process.start()
        theirs.close()
        self._arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None
        self._dead = False

    def listen(self, receive: Callable[[T], T] | None) -> None:
        self._listener = threading.Thread(target=self._listen, args=(receive,), daemon=True)
        self._listener.start()

    def ask(self, number: int | None) -> None:
        if number is not None:
            with contextlib.suppress(OSError):  # it has died, and the next answer will say so
                self.pipe.send(number)

    def next(self) -> T:
        kind, value = self._arrived.get()
        self.check()
        if kind == "failed":
            raise RuntimeError(f"a process that reads samples failed:\n{value}")
        return cast(T, value)

    def check(self) -> None:
        if self._dead:
            self.process.join(GRACE)
            raise UserError(_epitaph(self.process.exitcode))

    def end(self) -> None:
        """Clean up after it was killed.

        Its pipe is closed last, so that nobody reads from a number that was given away.
        """
        self.process.join()
        if self._listener is not None:
            self._listener.join()
        self.pipe.close()

    def _listen(self, receive: Callable[[T], T] | None) -> None:
        try:
            while True:
                kind, value = _received(self.pipe)
                if kind == "made" and receive is not None:
                    value = receive(value)
                self._arrived.put((kind, value))
        except (EOFError, OSError):
            self._dead = True
            self._arrived.put(("died", None))
        except BaseException:
            self._arrived.put(("failed", traceback.format_exc()))


def _epitaph(code: int | None) -> str:
    killed = code is not None and code < 0
    how = f"was killed by {signal.Signals(-code).name}" if killed else f"ended with code {code}"  # type: ignore[operator]
    return (
        f"a process that reads samples {how}{' (out of memory?)' if code == -signal.SIGKILL else ''}: "
        "try fewer workers; a training run goes on with --resume"
    )


# ---------------------------------------------------------------------------------------------- in the worker


def _serve(pipe: Connection, work: Callable[[int], Any], held: list[Connection], parent: int) -> None:
    import torch

    for other in held:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C for all
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    try:
        while True:
            number = pipe.recv()
            try:
                answer = ("made", work(number))
            except BaseException:
                answer = ("failed", traceback.format_exc())
            _send(pipe, answer)
    except (EOFError, OSError):  # the parent wants no more items, or has died
        os._exit(0)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, for whatever reason."""
    known = multiprocessing.parent_process()
    forked = multiprocessing.get_start_method() != "forkserver"  # whose child it would be otherwise
    while (known is None or known.is_alive()) and not (forked and os.getppid() != parent):
        time.sleep(0.5)
    os._exit(1)


def _send(pipe: Connection, value: Any) -> None:
    """Send pickled; the content of arrays is sent from where it is in memory, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    pipe.send([len(view) for view in views])
    pipe.send_bytes(head)
    for view in views:
        if len(view):
            pipe.send_bytes(view)


def _received(pipe: Connection) -> Any:
    sizes = pipe.recv()
    head = pipe.recv_bytes()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if buffer:
            pipe.recv_bytes_into(buffer)
    return pickle.loads(head, buffers=buffers)
