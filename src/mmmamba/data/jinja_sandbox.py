"""The Jinja sandbox. A chat template is a program that somebody else wrote, so its time and memory are limited.

On top of Jinja's own sandbox (no private attributes, nothing is changed) a template may call only what
:mod:`mmmamba.data.jinja_methods` and :mod:`mmmamba.data.jinja_filters` list. Everything that can take long or grow pays
from a budget *before* it is done: a pass of a loop, a call of a macro, a piece of text, a list. The budget grows with
what the template is given, so that a long conversation has room. The processor time of the thread is limited too.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import filters, nodes
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from mmmamba.data.jinja_budget import (
    BITS,
    BUDGET,
    ITEM,
    Budget,
    OverBounds,
    bounded_number,
    checked,
    paid,
    size_of,
    taken,
    weigh,
)
from mmmamba.data.jinja_filters import (
    AS_TEXT,
    COMPARE,
    FREE_TESTS,
    GO_THROUGH,
    PLAIN_FILTERS,
    bounded_range,
    comparing,
    format_filter,
    paid_filter,
    raise_exception,
    to_json,
)
from mmmamba.data.jinja_metering import MeteredTree, environment_call
from mmmamba.data.jinja_methods import METHOD_PRICES, BoundedFormatter, percent

MAX_SOURCE = 1 << 17
"""Characters of a template; the longest published ones have some 30,000."""


def render(template: jinja2.Template, variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
    """Render ``template`` within the budget.

    Args:
        variables: plain data (texts, numbers, lists, dicts). The template could call the methods of anything else.
        marks: what is written where ``{% generation %}`` begins and ends.

    Raises:
        OverBounds: the text would take too long or grow too large.
    """
    budget = Budget(weigh(dict(variables), None), marks)
    token = BUDGET.set(budget)
    try:
        parts: list[str] = []
        for part in template.generate(variables):
            budget.spend(len(part))
            parts.append(part)
        return "".join(parts)
    finally:
        BUDGET.reset(token)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``, by which some templates mark their answers: what is inside stands,
    between the budget's marks."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        start, end = (nodes.Output([environment_call("mark", nodes.Const(i))], lineno=line) for i in range(2))
        return [start, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]


class FormatMethod:
    """``text.format``, within the budget."""

    def __init__(self, run: Callable[..., str]) -> None:
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self._run(*args, **kwargs)


_CALLABLE = (Macro, BlockReference, LoopContext, Cycler, Joiner, FormatMethod, jinja2.Undefined)
_FUNCTIONS = (bounded_range, dict, Namespace, Cycler, Joiner, raise_exception)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment with the settings and names that chat templates rely on, within the budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=self._finalize
        )
        self.filters = {name: paid_filter(name, filters.FILTERS[name])
                        for name in (*AS_TEXT, *COMPARE, *GO_THROUGH, *PLAIN_FILTERS)}  # fmt: skip
        self.filters["tojson"], self.filters["format"] = to_json, format_filter
        self.tests = {
            name: test if name in FREE_TESTS else comparing(test) for name, test in jinja2.tests.TESTS.items()
        }
        self.globals = {
            "range": bounded_range, "dict": dict, "namespace": Namespace, "cycler": Cycler, "joiner": Joiner,
            "raise_exception": raise_exception,
        }  # fmt: skip

    @staticmethod
    def _finalize(value: Any) -> Any:
        return value if isinstance(value, str) or BUDGET.get(None) is None else paid(value)

    # ------------------------------------------------------------------------------ what a compiled template calls

    def charge(self, amount: int) -> bool:
        BUDGET.get().spend(amount)
        return True

    def mark(self, which: int) -> str:
        return BUDGET.get().marks[which]

    def concatenated(self, *values: Any) -> str:
        return "".join([value if isinstance(value, str) else str(value) for value in map(paid, values)])

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            return value[start:stop]
        BUDGET.get().make(size_of(value))
        return value[start:stop:step]

    def checked(self, value: Any) -> Any:
        return checked(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        sizes = size_of(left), size_of(right)
        budget = BUDGET.get()
        if operator == "*" and isinstance(left, (str, list, tuple)) and isinstance(right, int):
            budget.make(sizes[0] * max(right, 0))
        elif operator == "*" and isinstance(right, (str, list, tuple)) and isinstance(left, int):
            budget.make(sizes[1] * max(left, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bounded_number(right, BITS, "for a power of")
            if left.bit_length() * abs(right) > BITS:
                raise OverBounds(f"makes a number of more than {BITS} bits")
        else:
            budget.make(sum(sizes))
        made = super().call_binop(context, operator, left, right)
        return checked(made) if isinstance(made, tuple) else made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        name, text = getattr(value, "__name__", ""), getattr(value, "__self__", None)
        if name != "format" or not isinstance(text, str):
            return super().wrap_str_format(value) and None
        return FormatMethod(lambda *args, **kwargs: BoundedFormatter(self).vformat(str(text), args, kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, argument if isinstance(argument, (str, int)) else checked(argument))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, types.MethodType) and __obj.__self__ is __self:  # of the compiled template's own
            return __obj(*args)
        budget = BUDGET.get()
        budget.spend(ITEM)
        if isinstance(__obj, (types.BuiltinMethodType, types.MethodType)):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return __self._method(__obj.__self__, __obj, args, kwargs)
        if not isinstance(__obj, _CALLABLE) and not any(__obj is known for known in _FUNCTIONS):
            raise jinja2.sandbox.SecurityError(f"a chat template may not call a {type(__obj).__name__!r}")
        if __obj is dict:
            args = tuple(map(taken, args))
        return super().call(__context, __obj, *args, **kwargs)

    def _method(self, owner: Any, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of a text, a list, …, if its cost is known."""
        if isinstance(owner, (Cycler, Joiner, LoopContext)):
            return method(*map(checked, args))
        kind = next((kind for kind in METHOD_PRICES if isinstance(owner, kind)), None)
        pay = None if kind is None else METHOD_PRICES[kind].get(method.__name__)
        if pay is None:
            raise jinja2.sandbox.SecurityError(f"'{method.__name__}' is not what a chat template may call")
        if method.__name__ == "join":
            args = tuple(map(taken, args))
        for value in (*args, *kwargs.values()):
            checked(value)
        BUDGET.get().make(pay(owner, *args, *kwargs.values()))
        return method(*args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(MeteredTree().visit(source), *args, **kwargs)
