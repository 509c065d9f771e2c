"""Ctrl-C is held back, then passed on once."""

from __future__ import annotations

import signal
import threading

import pytest

from mmmamba.inference.interrupts import uninterrupted


def test_ctrl_c_is_passed_on_once_and_not_held_back_elsewhere():
    with uninterrupted() as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with uninterrupted() as interrupt:
        pass
    interrupt()
    seen: list[object] = []

    def elsewhere() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
