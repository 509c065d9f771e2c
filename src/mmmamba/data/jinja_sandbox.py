"""Jinja in bounds: a folder's chat template is somebody else's program, so its time and memory have limits.

On top of Jinja's own sandbox (no private attributes, nothing is changed) a template may call only what is listed here,
and everything that can take long or grow pays from a budget *before* it is done: a pass of a loop, a call of a macro,
a piece of text, a list. The budget grows with what the template is given, so that a long conversation has room. A limit
on the processor time of the thread holds the rest.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import filters, nodes
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, pass_eval_context

from mmmamba.data.jinja_budget import (
    BITS,
    BUDGET,
    ITEM,
    VALUE,
    Budget,
    OverBounds,
    bounded_number,
    checked,
    paid,
    size_of,
    taken,
    weigh,
)

MAX_SOURCE = 1 << 17
"""Characters of a template; the longest published ones have some 30,000."""
_WIDE = 1 << 16  # columns, rows, spaces that a filter is asked for by number
_PRODUCT = 1 << 30  # text and characters to look for, where Python compares each with each


def render(template: jinja2.Template, variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
    """The text of ``template``, within bounds.

    Args:
        variables: plain data (texts, numbers, lists, dicts): an object with methods would lend them to the template.
        marks: what is written where ``{% generation %}`` begins and ends.

    Raises:
        OverBounds: where it would take too long or grow too large.
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


# ---------------------------------------------------------------------------------------------- methods


def _pay_split(text: str, separator: Any = None, maxsplit: int = -1) -> int:
    return ITEM * (text.count(separator) + 1 if isinstance(separator, str) and separator else len(text) // 2 + 1)


def _pay_replace(text: str, old: Any = "", new: Any = "", count: Any = -1) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _pay_width(text: str, width: Any = 0, fill: str = " ") -> int:
    return max(len(text), width)


def _pay_join(text: str, values: Any = ()) -> int:
    return weigh(values, BUDGET.get().value) + len(text) * len(values)


def _pay_all(text: str, *more: Any) -> int:
    """A method that makes no more than some texts of its own length."""
    if any(isinstance(entry, str) and len(entry) > 64 and len(entry) * len(text) > _PRODUCT for entry in more):
        raise OverBounds("looks for a text too long in another")
    return 3 * len(text) + ITEM


_PAY: Mapping[type, Mapping[str, Callable[..., int]]] = {
    str: dict.fromkeys(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
        "isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex "
        "rpartition rstrip startswith strip swapcase title upper".split(),
        _pay_all,
    )
    | dict.fromkeys(("split", "rsplit"), _pay_split)
    | dict.fromkeys(("center", "ljust", "rjust", "zfill"), _pay_width)
    | {"splitlines": lambda text, *more: _pay_split(text), "replace": _pay_replace, "join": _pay_join},
    dict: {"get": lambda *_: 1, **dict.fromkeys(("items", "keys", "values", "copy"), lambda value: ITEM * len(value))},
    list: dict.fromkeys(("index", "count", "copy"), lambda value, *_: ITEM * len(value)),
    tuple: dict.fromkeys(("index", "count"), lambda value, *_: ITEM * len(value)),
    int: {"bit_length": lambda value: 1},
    float: {"is_integer": lambda value: 1},
}


class _Formatter(SandboxedFormatter):
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


def _percent(form: str, values: Any) -> str:
    """``form % values``, of which no column is too wide."""
    for spec in re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", form):
        _check_widths(re.sub(r"\([^)]*\)", "", spec))
    budget = BUDGET.get()
    each = weigh(values, budget.value)
    budget.make(len(form) + form.count("%") * each)
    return form % values


# ---------------------------------------------------------------------------------------------- filters


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as chat templates expect it: characters as they are, nothing escaped for HTML."""
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
    """What a filter takes beyond going through its value, before it runs."""
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
        budget.make(_pay_replace(str(value), *(str(option) for option in options[:2])))
    elif name == "indent":
        wide = max((len(o) if isinstance(o, str) else o for o in options if isinstance(o, (str, int))), default=4)
        budget.make(len(value) + (value.count("\n") + 1) * max(wide, 4))
    elif name in ("batch", "slice", "center"):
        budget.make(ITEM * max((o for o in options if isinstance(o, int)), default=1))
    elif name == "trim":
        budget.spend(_pay_all(value, *options))
    elif name == "sum" and any(not isinstance(o, (int, float, str)) for o in options):
        raise OverBounds("adds up other things than numbers")


_AS_TEXT = ("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string",
            "title", "trim", "truncate", "upper", "urlencode", "wordcount")  # fmt: skip
_COMPARE = ("dictsort", "groupby", "join", "max", "min", "sort", "sum", "unique")
_GO_THROUGH = ("batch", "items", "last", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr",
               "slice")  # fmt: skip
_PLAIN = ("abs", "attr", "count", "d", "default", "first", "float", "int", "length", "round")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that pays before it runs."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get(None)
        if budget is None:
            raise OverBounds("is not rendered yet")  # so that the compiler leaves it for then
        before, value, rest = args[:place], args[place], args[place + 1 :]
        budget.spend(1)
        if name in _AS_TEXT:
            paid(value)
            value = value if isinstance(value, str) or name in ("e", "escape", "safe") else str(value)
        elif name in _COMPARE or name in _GO_THROUGH:
            value = taken(value)
            if name in _COMPARE:
                checked(value)
        _pay_filter(name, value, rest, kwargs)
        made = function(*before, value, *rest, **kwargs)
        if isinstance(made, Iterator):
            made = taken(made)
        budget.spend(size_of(made))
        return made

    return run


@pass_eval_context
def _format_filter(_: Any, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.TemplateError("format takes places or names, not both")
    return _percent(str(paid(value)), kwargs or args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(paid(message)))


def _range(*args: int) -> range:
    made = range(*args)
    BUDGET.get().make(ITEM * len(made))
    return made


def _comparing(test: Any) -> Any:
    @functools.wraps(test)
    def run(*args: Any) -> bool:
        if BUDGET.get(None) is None:
            raise OverBounds("is not rendered yet")
        return test(*map(checked, args))

    return run


# ---------------------------------------------------------------------------------------------- the environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``, by which some templates mark their answers: what is inside stands,
    between the budget's marks."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        start, end = (nodes.Output([_call("mark", nodes.Const(i))], lineno=line) for i in range(2))
        return [start, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The settings and names that chat templates rely on, in bounds."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=self._finalize
        )
        self.filters = {name: _bounded(name, filters.FILTERS[name])
                        for name in (*_AS_TEXT, *_COMPARE, *_GO_THROUGH, *_PLAIN)}  # fmt: skip
        self.filters["tojson"], self.filters["format"] = _to_json, _format_filter
        self.tests = {
            name: test if name in _WITHOUT_LOOKING else _comparing(test) for name, test in jinja2.tests.TESTS.items()
        }
        self.globals = {
            "range": _range, "dict": dict, "namespace": Namespace, "cycler": Cycler, "joiner": Joiner,
            "raise_exception": _raise_exception,
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
            return _percent(left, right)
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
        return _Format(lambda *args, **kwargs: _Formatter(self).vformat(str(text), args, kwargs))

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
        """Call a method of a text, a list, …, when it is known what it takes."""
        if isinstance(owner, (Cycler, Joiner, LoopContext)):
            return method(*map(checked, args))
        kind = next((kind for kind in _PAY if isinstance(owner, kind)), None)
        pay = None if kind is None else _PAY[kind].get(method.__name__)
        if pay is None:
            raise jinja2.sandbox.SecurityError(f"'{method.__name__}' is not what a chat template may call")
        if method.__name__ == "join":
            args = tuple(map(taken, args))
        for value in (*args, *kwargs.values()):
            checked(value)
        BUDGET.get().make(pay(owner, *args, *kwargs.values()))
        return method(*args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metered().visit(source), *args, **kwargs)


class _Format:
    """``text.format``, within bounds."""

    def __init__(self, run: Callable[..., str]) -> None:
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self._run(*args, **kwargs)


_CALLABLE = (Macro, BlockReference, LoopContext, Cycler, Joiner, _Format, jinja2.Undefined)
_FUNCTIONS = (_range, dict, Namespace, Cycler, Joiner, _raise_exception)
_WITHOUT_LOOKING = ("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none",
                    "number", "sameas", "sequence", "string", "true", "undefined")  # fmt: skip


class _Metered(jinja2.visitor.NodeTransformer):
    """A template's tree in which every pass of a loop and every call of a macro pays, and so does all that grows."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._body(node)

    def _body(self, node: Any) -> nodes.Node:
        weight = ITEM
        for inside in _within(node):
            weight += len(inside.data) if isinstance(inside, nodes.TemplateData) else 1
        node = self.generic_visit(node)
        pay = _call("charge", nodes.Const(weight))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(pay, node.test)
        node.body = [nodes.ExprStmt(pay), *node.body]
        return node

    def visit_Concat(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        return _call("concatenated", *node.nodes)

    def visit_Tuple(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        return _call("checked", node) if node.ctx == "load" and node.items else node

    def visit_Getitem(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("cut", node.node, *(nodes.Const(None) if end is None else end for end in ends))

    def visit_Compare(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        node.expr = _known(node.expr)
        for operand in node.ops:
            operand.expr = _known(operand.expr)
        return node


def _within(node: nodes.Node) -> Iterable[nodes.Node]:
    """What runs once for each pass of ``node``: not what stands in an inner loop, which pays for itself."""
    for child in node.iter_child_nodes():
        yield child
        if not isinstance(child, (nodes.For, nodes.Macro, nodes.CallBlock)):
            yield from _within(child)


def _known(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("checked", node)


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
