"""The budget of a chat template while it is rendered, and the size of values: all bounds of the sandbox.

A value's size is the size of the text that it may become, because that is what writing, comparing or hashing it costs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.utils import Namespace

WORK = 1 << 24
"""The budget of one rendering. A character or a simple step costs about 1, an entry of a list costs :data:`ITEM`."""
VALUE = 1 << 22
"""The largest value: characters of a text; an entry of a list counts as :data:`ITEM` characters."""
SECONDS = 3.0
"""Processor time for one rendering."""
ITEM = 16
BITS = 4096  # of a whole number
_DEPTH = 100  # of lists within lists


class OverBounds(Exception):
    """A template asked for more than its budget."""


class Budget:
    """What one rendering may still spend.

    Args:
        size: characters of the template's input.
        marks: what is written before and after each answer that the template marks.
    """

    def __init__(self, size: int, marks: tuple[str, str] = ("", "")) -> None:
        self.marks = marks
        self.left = WORK + 64 * size
        self.value = VALUE + 8 * size
        self._end = time.thread_time() + SECONDS + size / 1e6
        self._ticks = 0

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise OverBounds("takes more steps or memory than a chat template may")
        self._ticks += 1 + (amount >> 12)
        if self._ticks >= 64:
            self._ticks = 0
            if time.thread_time() > self._end:
                raise OverBounds(f"takes longer than {SECONDS:g} s")

    def make(self, size: int) -> None:
        """Pay for a value of ``size`` before it is made."""
        if size > self.value:
            raise OverBounds(f"makes a value of {size:,} characters or more")
        self.spend(size)


BUDGET: ContextVar[Budget] = ContextVar("chat template")


def weigh(value: Any, limit: int | None) -> int:
    """How large the text of ``value`` may become. An entry that occurs twice counts twice.

    Raises:
        OverBounds: the value is larger than ``limit``, or its lists are nested too deeply.
    """
    total, stack = 0, [(value, 0)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            total += ITEM * len(value)
            inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            stack += ((entry, depth + 1) for entry in inside)
        elif isinstance(value, Namespace):
            raise OverBounds("writes or compares a namespace")
        else:
            total += ITEM
        if depth > _DEPTH:
            raise OverBounds(f"nests lists more than {_DEPTH} deep")
        if limit is not None and total > limit:
            raise OverBounds(f"makes a value of {limit:,} characters or more")
    return total


def size_of(value: Any) -> int:
    """The size of an existing value, without the content of its entries."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (Mapping, list, tuple)):
        return ITEM * len(value)
    if isinstance(value, int) and value.bit_length() > BITS:
        raise OverBounds(f"makes a number of more than {BITS} bits")
    return 1


def checked(value: Any) -> Any:
    """``value``, after paying for comparing, hashing or writing it."""
    if isinstance(value, (list, tuple, Mapping, Namespace)):
        budget = BUDGET.get()
        budget.spend(weigh(value, budget.value) // ITEM)
    elif isinstance(value, str):
        if len(value) > 4096:
            BUDGET.get().spend(len(value) // ITEM)
    elif isinstance(value, int):
        size_of(value)
    return value


def taken(values: Any) -> Any:
    """``values``, after paying for going through them. If their number is not known before, they become a list."""
    budget = BUDGET.get()
    if isinstance(values, (str, Mapping, list, tuple, set, frozenset, range, jinja2.Undefined)):
        if not isinstance(values, jinja2.Undefined):
            budget.spend(ITEM * len(values))
        return values
    found = []
    for entry in values:
        budget.make(ITEM)
        found.append(entry)
    return found


def paid(value: Any) -> Any:
    """``value``, after paying for the text that it may become."""
    budget = BUDGET.get()
    budget.make(len(value) if isinstance(value, str) else weigh(value, budget.value))
    return value


def bounded_number(value: Any, most: int, what: str) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise OverBounds(f"asks {what} for {value if value.bit_length() < 64 else 'a number of many digits'}")
