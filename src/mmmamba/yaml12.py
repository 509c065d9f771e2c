"""YAML 1.2 (its core schema) as plain data, with all bounds that a file from somebody else needs.

PyYAML scans and parses; what scalars mean is decided here, since PyYAML follows YAML 1.1: there ``010`` is eight,
``1:30`` is ninety, ``no`` is false, ``1e-3`` is a text and ``2020-01-01`` a date. Here a plain scalar is null, true or
false, an integer (``12``, ``0o17``, ``0x1f``), a float (``1.5``, ``1e-3``), or else a text. A number that the two
versions read differently (``010``), one that is not finite and one of hundreds of digits are refused.

Source: YAML 1.2.2, chapter 10.3 (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 18  # of a text; recipes have a few thousand
MAX_DEPTH = 50  # of lists and mappings in each other
MAX_VALUES = 100_000  # what an alias repeats counts each time
MAX_DIGITS = 400  # of a number

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_OCTAL_IN_1_1 = re.compile(r"[-+]?0[0-9]+")
_MERGE = object()  # the key << of YAML 1.1, which merges the keys of another mapping


class BadYaml(ValueError):
    """What is wrong with a text, in one line. ``line`` counts from 1; None if it is unknown."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def parse(text: str) -> Any:
    """The plain data (dicts, lists, scalars) of a YAML text; None for an empty text.

    An alias gives the same object each time.

    Raises:
        BadYaml: for what is no YAML, a key that stands twice, a tag that is not of the core schema, an ambiguous
            number, and whatever is larger or deeper than the bounds of this module.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadYaml(f"the text has {len(text):,} characters, may have {MAX_CHARACTERS:,}")
    try:
        return _Builder().build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        context = f" ({error.context})" if error.context else ""
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise BadYaml(f"{error.problem}{context}", line) from error
    except yaml.YAMLError as error:
        raise BadYaml(" ".join(str(error).split())) from error
    except BadYaml:
        raise
    except (ValueError, OverflowError) as error:  # an escape or a version number out of range
        raise BadYaml(f"not usable YAML ({error})") from error


def dump(plain: Any, *, flow: bool = False, width: float = 120) -> str:
    """Plain data as YAML that :func:`parse` and a reader of YAML 1.1 both read back; a mapping keeps its order."""
    options: dict[str, Any] = {"sort_keys": False, "width": width, "default_flow_style": flow}
    escaped: str = yaml.dump(plain, Dumper=_Dumper, **options)
    # Unescaped, the odd line breaks \N, \L and \P (U+0085, U+2028, U+2029) would be folded to spaces on reading.
    if re.search(r"\\[NLP]", escaped):
        return escaped
    unescaped: str = yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, **options)
    return unescaped


class _Dumper(yaml.SafeDumper):
    """Quote a text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern, _first in ((_INT, "-+0123456789"), (_FLOAT, "-+.0123456789")):
    _Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"(?:{_pattern.pattern})$"), list(_first))


@dataclass
class _Open:
    """A list or mapping that has not ended yet."""

    value: list[Any] | dict[Any, Any]
    anchor: str | None
    begun: int  # values counted before it
    key: Any = None
    key_line: int | None = None  # None while the next thing in a mapping is a key
    lines: dict[Any, int] = field(default_factory=dict)  # of its keys
    merged: list[dict[Any, Any]] = field(default_factory=list)


class _Builder:
    """Builds data from PyYAML's events, without recursion."""

    def __init__(self) -> None:
        self.count = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # → value, how many values it holds
        self.stack: list[_Open] = []
        self.result: Any = None

    def build(self, events: Iterator[yaml.Event]) -> Any:
        documents = 0
        for event in events:
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise BadYaml("a second document begins here; one is read", line)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event.anchor, line)
            elif isinstance(event, yaml.ScalarEvent):
                self._counted(1, line)
                begins_mapping = bool(self.stack) and isinstance(self.stack[-1].value, dict)
                is_key = begins_mapping and self.stack[-1].key_line is None
                value = _MERGE if is_key and event.value == "<<" and event.implicit[0] else _scalar(event, line)
                self._anchor(event.anchor, value, 1, line)
                self._put(value, line)
            elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                self._begin(event, line)
            elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                self._end(line)
        return self.result

    def _counted(self, values: int, line: int) -> None:
        self.count += values
        if self.count > MAX_VALUES:
            raise BadYaml(f"with its aliases written out, the text has more than {MAX_VALUES:,} values", line)

    def _alias(self, name: str | None, line: int) -> None:
        if any(each.anchor == name for each in self.stack):
            raise BadYaml(f"the alias '{name}' is inside what it repeats", line)
        if name is None or name not in self.anchors:
            raise BadYaml(f"found undefined alias '{name}'", line)
        value, values = self.anchors[name]
        self._counted(values, line)
        self._put(value, line)

    def _anchor(self, name: str | None, value: Any, values: int, line: int) -> None:
        if name is not None:
            self.anchors[name] = (value, values)

    def _begin(self, event: yaml.SequenceStartEvent | yaml.MappingStartEvent, line: int) -> None:
        self._counted(1, line)
        mapping = isinstance(event, yaml.MappingStartEvent)
        kind = "map" if mapping else "seq"
        if event.tag not in (None, "!", f"{_TAG}{kind}"):
            raise BadYaml(f"the tag '{_shown_tag(event.tag)}' is not read here", line)
        if len(self.stack) >= MAX_DEPTH:
            raise BadYaml(f"lists and mappings are nested more than {MAX_DEPTH} deep", line)
        if self.stack and isinstance(self.stack[-1].value, dict) and self.stack[-1].key_line is None:
            raise BadYaml(f"a key must be a single value, not a {'mapping' if mapping else 'list'}", line)
        self.stack.append(_Open({} if mapping else [], event.anchor, self.count - 1))

    def _end(self, line: int) -> None:
        done = self.stack.pop()
        if isinstance(done.value, dict):
            inherited: dict[Any, Any] = {}
            for each in done.merged:  # of several mappings with a key, the first gives its value
                inherited.update((key, value) for key, value in each.items() if key not in inherited)
            done.value = {**inherited, **done.value}
        self._anchor(done.anchor, done.value, self.count - done.begun, line)
        self._put(done.value, line)

    def _put(self, value: Any, line: int) -> None:
        """Add a complete value to the open list or mapping."""
        if not self.stack:
            self.result = value
            return
        top = self.stack[-1]
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key_line is None:
            if isinstance(value, (dict, list)):  # an alias
                raise BadYaml("a key must be a single value, not an alias of a list or mapping", line)
            if value in top.lines:  # to Python, 1 and true are the same key
                name = "<<" if value is _MERGE else value
                raise BadYaml(f"the key '{name}' appears here again (first on line {top.lines[value]})", line)
            top.lines[value] = top.key_line = line
            top.key = value
        else:
            top.key_line = None
            if top.key is not _MERGE:
                top.value[top.key] = value
                return
            merged = value if isinstance(value, list) else [value]
            if not all(isinstance(each, dict) for each in merged):
                raise BadYaml("'<<' takes a mapping, or a list of them", line)
            top.merged += merged


def _scalar(event: yaml.ScalarEvent, line: int) -> Any:
    """The value of a scalar: by its tag, if it has one; a plain one by its look; a quoted one is text."""
    text: str = event.value
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadYaml("holds half of a surrogate pair", line) from error
    if event.tag is not None:
        kind = event.tag.removeprefix(_TAG)
        if kind in ("str", "!"):
            return text
        found = _resolved(text, line)
        good = {"null": found is None, "bool": isinstance(found, bool), "int": type(found) is int,
                "float": isinstance(found, float) or type(found) is int}  # fmt: skip
        if event.tag == kind or kind not in good:
            raise BadYaml(f"the tag '{_shown_tag(event.tag)}' is not read here", line)
        if not good[kind]:
            raise BadYaml(f"{_shown(text)} is not of its tag '!!{kind}'", line)
        return float(found) if kind == "float" else found
    return _resolved(text, line) if event.implicit[0] else text


def _resolved(text: str, line: int) -> Any:
    """The value of a plain scalar in the core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _NOT_FINITE.fullmatch(text):
        raise BadYaml(f"{text} is not a finite number (a text is written in quotes: '{text}')", line)
    is_int = _INT.fullmatch(text) is not None
    if not is_int and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise BadYaml(f"a number of {len(text):,} digits; the most is {MAX_DIGITS}", line)
    if _OCTAL_IN_1_1.fullmatch(text):
        plain = re.sub(r"0+(?=[0-9])", "", text, count=1)
        raise BadYaml(f"{text} is an octal number in YAML 1.1 and a decimal one in 1.2: write {plain}, or '{text}' "
                      "for a text", line)  # fmt: skip
    if is_int:
        bases = {"0o": 8, "0x": 16}
        return int(text, bases.get(text[:2], 10))
    value = float(text)
    if not math.isfinite(value):
        raise BadYaml(f"{_shown(text)} is not a finite number: it is too large", line)
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _shown_tag(tag: str) -> str:
    return tag.replace(_TAG, "!!")[:80]
