"""The methods that a chat template may call on texts, lists, dicts and numbers, and what each call costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.sandbox import SandboxedFormatter

from mmmamba.data.jinja_budget import BUDGET, ITEM, VALUE, OverBounds, paid, weigh

_PRODUCT = 1 << 30  # length of a text times length of what is searched for: Python may compare each with each


def _pay_split(text: str, separator: Any = None, maxsplit: int = -1) -> int:
    return ITEM * (text.count(separator) + 1 if isinstance(separator, str) and separator else len(text) // 2 + 1)


def pay_replace(text: str, old: Any = "", new: Any = "", count: Any = -1) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _pay_width(text: str, width: Any = 0, fill: str = " ") -> int:
    return max(len(text), width)


def _pay_join(text: str, values: Any = ()) -> int:
    return weigh(values, BUDGET.get().value) + len(text) * len(values)


def pay_all(text: str, *more: Any) -> int:
    """The cost of a method that makes at most a few texts as long as its own."""
    if any(isinstance(entry, str) and len(entry) > 64 and len(entry) * len(text) > _PRODUCT for entry in more):
        raise OverBounds("looks for a text too long in another")
    return 3 * len(text) + ITEM


METHOD_PRICES: Mapping[type, Mapping[str, Callable[..., int]]] = {
    str: dict.fromkeys(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
        "isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex "
        "rpartition rstrip startswith strip swapcase title upper".split(),
        pay_all,
    )
    | dict.fromkeys(("split", "rsplit"), _pay_split)
    | dict.fromkeys(("center", "ljust", "rjust", "zfill"), _pay_width)
    | {"splitlines": lambda text, *more: _pay_split(text), "replace": pay_replace, "join": _pay_join},
    dict: {"get": lambda *_: 1, **dict.fromkeys(("items", "keys", "values", "copy"), lambda value: ITEM * len(value))},
    list: dict.fromkeys(("index", "count", "copy"), lambda value, *_: ITEM * len(value)),
    tuple: dict.fromkeys(("index", "count"), lambda value, *_: ITEM * len(value)),
    int: {"bit_length": lambda value: 1},
    float: {"is_integer": lambda value: 1},
}


class BoundedFormatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_widths(format_spec)
        text = super().format_field(paid(value), format_spec)
        BUDGET.get().make(len(text))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(paid(value), conversion)


def _check_widths(form: str) -> None:
    if len(form) > VALUE or re.search("[0-9]{5}", form) or "*" in form:
        raise OverBounds("asks for a column too wide")


def percent(form: str, values: Any) -> str:
    """``form % values``; columns that are too wide are refused."""
    for spec in re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", form):
        _check_widths(re.sub(r"\([^)]*\)", "", spec))
    budget = BUDGET.get()
    each = weigh(values, budget.value)
    budget.make(len(form) + form.count("%") * each)
    return form % values
