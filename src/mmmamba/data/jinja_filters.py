"""The filters, tests and functions that a chat template may use. Each pays from the budget before it runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jinja2
from jinja2.utils import pass_eval_context

from mmmamba.data.jinja_budget import (
    BUDGET,
    ITEM,
    OverBounds,
    bounded_number,
    checked,
    paid,
    size_of,
    taken,
    weigh,
)
from mmmamba.data.jinja_methods import pay_all, pay_replace, percent

_WIDE = 1 << 16  # the most columns, rows or spaces that a filter may be asked for
FREE_TESTS = ("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none",
                    "number", "sameas", "sequence", "string", "true", "undefined")  # fmt: skip


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as chat templates expect it: no character is escaped for HTML."""
    for option in (indent, *(separators or ())):
        bounded_number(option, 64, "tojson")
        if isinstance(option, str) and len(option) > 64:
            raise OverBounds("asks tojson for a long separator")
    budget = BUDGET.get()
    weight = weigh(value, budget.value)
    wide = 0 if indent is None else len(indent) if isinstance(indent, str) else indent
    budget.make(6 * weight if not wide else weight * (6 + wide))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget.make(len(text))
    return text


def _pay_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pay for what a filter does beyond going through its value, before it runs."""
    budget = BUDGET.get()
    options = (*args, *kwargs.values())
    if name in ("batch", "slice", "center", "indent", "round", "truncate"):
        for option in options:
            bounded_number(option, 300 if name == "round" else _WIDE, name)
    for option in options:
        checked(option)
    if name == "join":
        separator = len(args[0]) if args and isinstance(args[0], str) else len(str(kwargs.get("d", "")))
        budget.make(weigh(value, budget.value) + separator * len(value))
    elif name == "replace":
        budget.make(pay_replace(str(value), *(str(option) for option in options[:2])))
    elif name == "indent":
        wide = max((len(o) if isinstance(o, str) else o for o in options if isinstance(o, (str, int))), default=4)
        budget.make(len(value) + (value.count("\n") + 1) * max(wide, 4))
    elif name in ("batch", "slice", "center"):
        budget.make(ITEM * max((o for o in options if isinstance(o, int)), default=1))
    elif name == "trim":
        budget.spend(pay_all(value, *options))
    elif name == "sum" and any(not isinstance(o, (int, float, str)) for o in options):
        raise OverBounds("adds up other things than numbers")


AS_TEXT = ("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string",
            "title", "trim", "truncate", "upper", "urlencode", "wordcount")  # fmt: skip
COMPARE = ("dictsort", "groupby", "join", "max", "min", "sort", "sum", "unique")
GO_THROUGH = ("batch", "items", "last", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr",
               "slice")  # fmt: skip
PLAIN_FILTERS = ("abs", "attr", "count", "d", "default", "first", "float", "int", "length", "round")


def paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters, which now pays before it runs."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get(None)
        if budget is None:
            raise OverBounds("is not rendered yet")  # so that the compiler does not run it early
        before, value, rest = args[:place], args[place], args[place + 1 :]
        budget.spend(1)
        if name in AS_TEXT:
            paid(value)
            value = value if isinstance(value, str) or name in ("e", "escape", "safe") else str(value)
        elif name in COMPARE or name in GO_THROUGH:
            value = taken(value)
            if name in COMPARE:
                checked(value)
        _pay_filter(name, value, rest, kwargs)
        made = function(*before, value, *rest, **kwargs)
        if isinstance(made, Iterator):
            made = taken(made)
        budget.spend(size_of(made))
        return made

    return run


@pass_eval_context
def format_filter(_: Any, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.TemplateError("format takes places or names, not both")
    return percent(str(paid(value)), kwargs or args)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(paid(message)))


def bounded_range(*args: int) -> range:
    made = range(*args)
    BUDGET.get().make(ITEM * len(made))
    return made


def comparing(test: Any) -> Any:
    @functools.wraps(test)
    def run(*args: Any) -> bool:
        if BUDGET.get(None) is None:
            raise OverBounds("is not rendered yet")
        return test(*map(checked, args))

    return run
