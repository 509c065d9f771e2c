"""Shows progress: a live bar on a terminal, plain lines at intervals anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

from rich import progress
from rich.console import Console

from mmmamba.errors import LONGEST, printable
from mmmamba.report.number_format import shown

T = TypeVar("T")

LABEL = 200  # characters of the description


class Terminal(Console):
    """Prints for this package. What it prints is plain text, never markup, emoji or a command to the terminal.

    If the reader is gone (``| head``), the command line is told, and ends quietly.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(_lines(one) if isinstance(one, str) else one for one in objects), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _lines(text: str) -> str:
    """Printable lines. Control characters are escaped."""
    return "\n".join(printable(line) for line in text.split("\n"))


class Progress:
    """Shows how far a loop is, on stderr.

    Example::

        with Progress("stage 1", total=steps) as bar:
            for step in range(steps):
                ...
                bar.update(step + 1, loss=loss, tokens=batch.tokens)

    Args:
        description: what is being done, in a word or two.
        total: how many units there are in all; None if nobody knows.
        start: units that were done before (in a resumed run); the rate leaves them out.
        interval: seconds between plain lines, if stderr isn't a terminal.
        console: where to write instead of stderr.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        start: int = 0,
        interval: float = 10.0,
        console: Terminal | None = None,
    ) -> None:
        self.description = printable(description, LABEL)
        self.total = total
        self.done = start
        self.start = start
        self.interval = interval
        self.console = console or Terminal(stderr=True)
        # `is_terminal` is not enough: with FORCE_COLOR rich says yes for a log file, where a bar would be garbage.
        self.live = self.console.is_interactive and self.console.file.isatty()
        self.tokens = 0
        self.info = ""
        self._bar: progress.Progress | None = None
        self._began = self._printed_at = time.monotonic()
        self._printed: int | None = None

    def __enter__(self) -> Progress:
        self._began = self._printed_at = time.monotonic()
        if self.live:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[info]}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.start, info="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._printed != self.done and self.done > self.start:
            self._print_line()

    def update(self, done: int, *, tokens: int | None = None, **fields: Any) -> None:
        """Report that ``done`` units are done now.

        ``tokens`` counts those of this update only, and is shown as a rate over the whole run; every other field is
        shown as it is (``loss=0.1234``).
        """
        self.done = done
        self.tokens += tokens or 0
        known = (f"{name} {printable(shown(value), LABEL)}" for name, value in fields.items())
        self.info = "  ".join([*known, *self._rates()])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=self.info)
        elif self._printed is None or time.monotonic() - self._printed_at >= self.interval:
            self._print_line()

    def advance(self, units: int = 1, **fields: Any) -> None:
        """Report that ``units`` more are done."""
        self.update(self.done + units, **fields)

    def note(self, message: str) -> None:
        """Print a line that stays, above the bar."""
        console = self._bar.console if self._bar is not None else self.console
        console.print(printable(message, LONGEST), soft_wrap=True)

    def _rates(self) -> list[str]:
        elapsed, units = time.monotonic() - self._began, self.done - self.start
        if elapsed <= 0 or units <= 0:
            return []
        rates = [f"{shown(units / elapsed)}/s"]
        if self.tokens:
            rates.append(f"{shown(round(self.tokens / elapsed))} tokens/s")
        if self.total is None or self.done >= self.total:
            return [*rates, f"took {duration(elapsed)}"]
        return [*rates, f"{duration(elapsed / units * (self.total - self.done))} left"]

    def _print_line(self) -> None:
        of = "" if self.total is None else f"/{self.total}"
        self.console.print(f"{self.description}: {self.done}{of}  {self.info}".rstrip(), soft_wrap=True)
        self._printed, self._printed_at = self.done, time.monotonic()


def track(
    iterable: Iterable[T], description: str, total: int | None = None, *, console: Terminal | None = None
) -> Iterator[T]:
    """Yield the items of ``iterable``, and show how many are done."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total, console=console) as bar:
        for item in iterable:
            yield item
            bar.advance()


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
