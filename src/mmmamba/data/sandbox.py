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
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import filters, nodes
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, pass_eval_context

MAX_SOURCE = 1 << 17
"""Characters of a template; the longest published ones have some 30,000."""
WORK = 1 << 24
"""What a rendering may spend: about one a character that is made or a simple step, :data:`ITEM` an entry of a list."""
VALUE = 1 << 22
"""Characters of one text, or one for each :data:`ITEM` of a list's entries."""
SECONDS = 3.0
"""Processor time of one rendering."""
ITEM = 16
_BITS = 4096  # of a whole number
_DEPTH = 100  # of lists within lists
_WIDE = 1 << 16  # columns, rows, spaces that a filter is asked for by number
_PRODUCT = 1 << 30  # text and characters to look for, where Python compares each with each


class OverBounds(Exception):
    """A template asked for more than it may have."""


class Budget:
    """What one rendering may still spend.

    Args:
        size: characters that the template is given.
        marks: what is written at the start and at the end of what a template marks as an answer.
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


_BUDGET: ContextVar[Budget] = ContextVar("chat template")


def render(template: jinja2.Template, variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
    """The text of ``template``, within bounds.

    Args:
        variables: plain data (texts, numbers, lists, dicts): an object with methods would lend them to the template.
        marks: what is written where ``{% generation %}`` begins and ends.

    Raises:
        OverBounds: where it would take too long or grow too large.
    """
    budget = Budget(weigh(dict(variables), None), marks)
    token = _BUDGET.set(budget)
    try:
        parts: list[str] = []
        for part in template.generate(variables):
            budget.spend(len(part))
            parts.append(part)
        return "".join(parts)
    finally:
        _BUDGET.reset(token)


def weigh(value: Any, limit: int | None) -> int:
    """How large the text of ``value`` may become, an entry that stands twice counted twice.

    Raises:
        OverBounds: beyond ``limit``, or for lists too deep within one another.
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


def _size(value: Any) -> int:
    """What a value that is there already takes, without what its entries hold."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (Mapping, list, tuple)):
        return ITEM * len(value)
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise OverBounds(f"makes a number of more than {_BITS} bits")
    return 1


def _checked(value: Any) -> Any:
    """``value``, once it is known that comparing, hashing or writing it takes no more than its size allows."""
    if isinstance(value, (list, tuple, Mapping, Namespace)):
        budget = _BUDGET.get()
        budget.spend(weigh(value, budget.value) // ITEM)
    elif isinstance(value, str):
        if len(value) > 4096:
            _BUDGET.get().spend(len(value) // ITEM)
    elif isinstance(value, int):
        _size(value)
    return value


def _taken(values: Any) -> Any:
    """Entries to go through: as they are where their number is known, a list of the others."""
    budget = _BUDGET.get()
    if isinstance(values, (str, Mapping, list, tuple, set, frozenset, range, jinja2.Undefined)):
        if not isinstance(values, jinja2.Undefined):
            budget.spend(ITEM * len(values))
        return values
    found = []
    for entry in values:
        budget.make(ITEM)
        found.append(entry)
    return found


def _text(value: Any) -> Any:
    """``value``, once what it takes as a text is paid for."""
    budget = _BUDGET.get()
    budget.make(len(value) if isinstance(value, str) else weigh(value, budget.value))
    return value


def _number(value: Any, most: int, what: str) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise OverBounds(f"asks {what} for {value if value.bit_length() < 64 else 'a number of many digits'}")


# ---------------------------------------------------------------------------------------------- methods


def _pay_split(text: str, separator: Any = None, maxsplit: int = -1) -> int:
    return ITEM * (text.count(separator) + 1 if isinstance(separator, str) and separator else len(text) // 2 + 1)


def _pay_replace(text: str, old: Any = "", new: Any = "", count: Any = -1) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _pay_width(text: str, width: Any = 0, fill: str = " ") -> int:
    return max(len(text), width)


def _pay_join(text: str, values: Any = ()) -> int:
    return weigh(values, _BUDGET.get().value) + len(text) * len(values)


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
        text = super().format_field(_text(value), format_spec)
        _BUDGET.get().make(len(text))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(_text(value), conversion)


def _check_widths(form: str) -> None:
    if len(form) > VALUE or re.search("[0-9]{5}", form) or "*" in form:
        raise OverBounds("asks for a column too wide")


def _percent(form: str, values: Any) -> str:
    """``form % values``, of which no column is too wide."""
    for spec in re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", form):
        _check_widths(re.sub(r"\([^)]*\)", "", spec))
    budget = _BUDGET.get()
    each = weigh(values, budget.value)
    budget.make(len(form) + form.count("%") * each)
    return form % values


# ---------------------------------------------------------------------------------------------- filters


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as chat templates expect it: characters as they are, nothing escaped for HTML."""
    for option in (indent, *(separators or ())):
        _number(option, 64, "tojson")
        if isinstance(option, str) and len(option) > 64:
            raise OverBounds("asks tojson for a long separator")
    budget = _BUDGET.get()
    weight = weigh(value, budget.value)
    wide = 0 if indent is None else len(indent) if isinstance(indent, str) else indent
    budget.make(6 * weight if not wide else weight * (6 + wide))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget.make(len(text))
    return text


def _pay_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a filter takes beyond going through its value, before it runs."""
    budget = _BUDGET.get()
    options = (*args, *kwargs.values())
    if name in ("batch", "slice", "center", "indent", "round", "truncate"):
        for option in options:
            _number(option, 300 if name == "round" else _WIDE, name)
    for option in options:
        _checked(option)
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
        budget = _BUDGET.get(None)
        if budget is None:
            raise OverBounds("is not rendered yet")  # so that the compiler leaves it for then
        before, value, rest = args[:place], args[place], args[place + 1 :]
        budget.spend(1)
        if name in _AS_TEXT:
            _text(value)
            value = value if isinstance(value, str) or name in ("e", "escape", "safe") else str(value)
        elif name in _COMPARE or name in _GO_THROUGH:
            value = _taken(value)
            if name in _COMPARE:
                _checked(value)
        _pay_filter(name, value, rest, kwargs)
        made = function(*before, value, *rest, **kwargs)
        if isinstance(made, Iterator):
            made = _taken(made)
        budget.spend(_size(made))
        return made

    return run


@pass_eval_context
def _format_filter(_: Any, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.TemplateError("format takes places or names, not both")
    return _percent(str(_text(value)), kwargs or args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(_text(message)))


def _range(*args: int) -> range:
    made = range(*args)
    _BUDGET.get().make(ITEM * len(made))
    return made


def _comparing(test: Any) -> Any:
    @functools.wraps(test)
    def run(*args: Any) -> bool:
        if _BUDGET.get(None) is None:
            raise OverBounds("is not rendered yet")
        return test(*map(_checked, args))

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
        return value if isinstance(value, str) or _BUDGET.get(None) is None else _text(value)

    # ------------------------------------------------------------------------------ what a compiled template calls

    def charge(self, amount: int) -> bool:
        _BUDGET.get().spend(amount)
        return True

    def mark(self, which: int) -> str:
        return _BUDGET.get().marks[which]

    def concatenated(self, *values: Any) -> str:
        return "".join([value if isinstance(value, str) else str(value) for value in map(_text, values)])

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            return value[start:stop]
        _BUDGET.get().make(_size(value))
        return value[start:stop:step]

    def checked(self, value: Any) -> Any:
        return _checked(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return _percent(left, right)
        sizes = _size(left), _size(right)
        budget = _BUDGET.get()
        if operator == "*" and isinstance(left, (str, list, tuple)) and isinstance(right, int):
            budget.make(sizes[0] * max(right, 0))
        elif operator == "*" and isinstance(right, (str, list, tuple)) and isinstance(left, int):
            budget.make(sizes[1] * max(left, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _number(right, _BITS, "for a power of")
            if left.bit_length() * abs(right) > _BITS:
                raise OverBounds(f"makes a number of more than {_BITS} bits")
        else:
            budget.make(sum(sizes))
        made = super().call_binop(context, operator, left, right)
        return _checked(made) if isinstance(made, tuple) else made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        name, text = getattr(value, "__name__", ""), getattr(value, "__self__", None)
        if name != "format" or not isinstance(text, str):
            return super().wrap_str_format(value) and None
        return _Format(lambda *args, **kwargs: _Formatter(self).vformat(str(text), args, kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, argument if isinstance(argument, (str, int)) else _checked(argument))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, types.MethodType) and __obj.__self__ is __self:  # of the compiled template's own
            return __obj(*args)
        budget = _BUDGET.get()
        budget.spend(ITEM)
        if isinstance(__obj, (types.BuiltinMethodType, types.MethodType)):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return __self._method(__obj.__self__, __obj, args, kwargs)
        if not isinstance(__obj, _CALLABLE) and not any(__obj is known for known in _FUNCTIONS):
            raise jinja2.sandbox.SecurityError(f"a chat template may not call a {type(__obj).__name__!r}")
        if __obj is dict:
            args = tuple(map(_taken, args))
        return super().call(__context, __obj, *args, **kwargs)

    def _method(self, owner: Any, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of a text, a list, …, when it is known what it takes."""
        if isinstance(owner, (Cycler, Joiner, LoopContext)):
            return method(*map(_checked, args))
        kind = next((kind for kind in _PAY if isinstance(owner, kind)), None)
        pay = None if kind is None else _PAY[kind].get(method.__name__)
        if pay is None:
            raise jinja2.sandbox.SecurityError(f"'{method.__name__}' is not what a chat template may call")
        if method.__name__ == "join":
            args = tuple(map(_taken, args))
        for value in (*args, *kwargs.values()):
            _checked(value)
        _BUDGET.get().make(pay(owner, *args, *kwargs.values()))
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
