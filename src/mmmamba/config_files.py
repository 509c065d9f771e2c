"""Config files: frozen dataclasses ↔ plain dicts ↔ YAML. Unknown keys and wrong types are errors.

    recipe = from_dict(Recipe, load_yaml("recipes/nano.yaml", ["stages.stage1.steps=20"]), where="recipes/nano.yaml")

Every complaint is a :class:`~mmmamba.errors.UserError` of one line that names the file and the dotted key.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmmamba import yaml12
from mmmamba.errors import UserError
from mmmamba.input_files import read_text

T = TypeVar("T")

#: In a field's metadata: files leave it out where it has its default, so that what earlier versions wrote stays equal.
OMIT_DEFAULT = "omit default"

_NONE = type(None)
_LISTS = (list, tuple, collections.abc.Sequence)
_DICTS = (dict, collections.abc.Mapping)
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MAX_BYTES = 4 * yaml12.MAX_CHARACTERS


# ---------------------------------------------------------------------------------------------- dict → dataclass


def from_dict(cls: type[T], data: Mapping[str, Any], where: str | Path = "") -> T:
    """Build ``cls`` (a dataclass) from plain data, as read from YAML or JSON.

    Args:
        cls: the dataclass; its annotations may be nested dataclasses, ``X | None``, unions of simple types,
            ``tuple[X, ...]``, ``list[X]``, ``dict[str, X]``, ``Literal[...]``, ``Path`` and ``Any``.
        data: a mapping with the class's field names as keys.
        where: the file that the data comes from. Messages start with it.

    Raises:
        UserError: for an unknown key (with the nearest known one), a missing key, a value of the wrong type, or
            whatever the dataclass itself refuses with a ``ValueError`` in ``__post_init__``.

    A dataclass may have a class method ``resolve(data)`` that gives the class to build, by what ``data`` says, and the
    data for it.
    """
    return _Reader(str(where)).build(cls, data, "")


def to_dict(obj: Any) -> Any:
    """A dataclass as plain dicts, lists and scalars (what YAML and JSON can hold). The inverse of :func:`from_dict`."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        values = [(field, getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init]
        return {
            field.name: to_dict(value)
            for field, value in values
            if not (field.metadata.get(OMIT_DEFAULT) and value == field.default)
        }
    if isinstance(obj, Mapping):
        return {key: to_dict(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_dict(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    return obj


class _Reader:
    """Converts plain values to annotated types, and knows which file to name in messages."""

    def __init__(self, where: str) -> None:
        self.where = where

    def error(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}" if self.where else message)

    def build(self, cls: type[T], data: Any, path: str) -> T:
        """An instance of dataclass ``cls``. ``path`` is its dotted key ('' at the top)."""
        if not isinstance(data, Mapping):
            what = f"'{path}'" if path else "the top level"
            raise self.error(f"{what} must be a mapping of keys to values ({cls.__name__}), got {_show(data)}")
        resolve = getattr(cls, "resolve", None)
        if resolve is not None:  # the mapping says which of several classes it is
            try:
                cls, data = resolve(data)
            except ValueError as refusal:
                raise self.error(f"'{path}': {refusal}") from refusal
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        for key in data:
            if key not in fields:
                raise self.error(f"unknown key '{_join(path, key)}'{_hint(key, fields)}")
        missing = [name for name, field in fields.items() if name not in data and _required(field)]
        if missing:
            names = ", ".join(f"'{_join(path, name)}'" for name in missing)
            raise self.error(f"missing required key{'s' if len(missing) > 1 else ''} {names}")
        # The annotations may be strings (`from __future__ import annotations`); this resolves them.
        hints = get_type_hints(cls)
        values = {key: self.convert(hints[key], value, _join(path, key)) for key, value in data.items()}
        try:
            return cls(**values)
        except UserError:
            raise
        except ValueError as refusal:
            raise self.error(f"'{path}': {refusal}" if path else str(refusal)) from refusal

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        """``value`` as type ``hint``; UserError if it does not fit."""
        if not _fits(hint, value):
            raise self.error(f"'{path}' must be {_describe(hint)}, got {_show(value)}")
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self.convert(_member(args, value), value, path)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return value if isinstance(value, hint) else self.build(hint, value, path)
        if hint is float:
            return float(value)
        if hint is Path:
            return Path(value)
        if origin in _DICTS and args:
            key_hint, value_hint = args
            return {
                self.convert(key_hint, key, f"{path} (key)"): self.convert(value_hint, item, _join(path, key))
                for key, item in value.items()
            }
        if (origin or hint) in _LISTS:
            items = [self.convert(h, item, f"{path}[{i}]") for i, (h, item) in enumerate(_items(hint, value))]
            return tuple(items) if (origin or hint) is tuple else items
        return value


def _items(hint: Any, value: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(annotation, value) of each item of a list or tuple."""
    args = get_args(hint)
    if not args:
        return [(Any, item) for item in value]
    if get_origin(hint) is tuple and args[-1] is not Ellipsis:
        return list(zip(args, value, strict=True))
    return [(args[0], item) for item in value]


def _fits(hint: Any, value: Any) -> bool:
    """Whether ``value`` is of the right kind for ``hint``. Its contents are checked later, one level down."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if hint is None or hint is _NONE:
        return value is None
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, hint))  # type: ignore[arg-type]
    if hint is float:
        return _is_float(value)
    if hint is int:  # Python counts a bool as an int; a reader of a recipe does not
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, (str, Path))
    if (origin or hint) in _DICTS:
        return isinstance(value, Mapping)
    if (origin or hint) in _LISTS:
        fixed = origin is tuple and args[-1] is not Ellipsis
        return isinstance(value, (list, tuple)) and (not fixed or len(value) == len(args))
    if isinstance(hint, type):
        return isinstance(value, hint)
    raise TypeError(f"config fields cannot be annotated {hint!r}")


def _is_float(value: Any) -> bool:
    """Whether it is a finite float, an int, or a text such as '1e-3' (YAML 1.1 reads it as text: it has no dot)."""
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None and math.isfinite(float(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float) and math.isfinite(value)


def _member(args: tuple[Any, ...], value: Any) -> Any:
    """The member of a union for ``value``: the one of exactly its type, if there is one, else the first that fits."""
    fitting = [arg for arg in args if _fits(arg, value)]
    exact = [arg for arg in fitting if arg is type(value) or get_origin(arg) is Literal]
    return (exact or fitting)[0]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _hint(key: Any, known: Iterable[str]) -> str:
    """' (did you mean …?)', or the list of known names if none is similar."""
    names = list(known)
    nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else f" (known: {', '.join(names)})"


def _describe(hint: Any) -> str:
    """An annotation in the words of someone who writes YAML."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if hint is None or hint is _NONE:
        return "null"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"a mapping of keys to values ({hint.__name__})"
    if (origin or hint) in _DICTS:
        return f"a mapping to {_describe(args[1])}" if args else "a mapping"
    if (origin or hint) in _LISTS:
        if origin is tuple and args[-1] is not Ellipsis:
            return f"a list of {len(args)}: {', '.join(_describe(arg) for arg in args)}"
        return f"a list of {_describe(args[0])}" if args else "a list"
    if hint is float:
        return "a number"
    return "a path" if hint is Path else getattr(hint, "__name__", str(hint))


def _show(value: Any) -> str:
    """A value and its type as a file would show them, shortened to one line."""
    if value is None:
        return "null"
    text = _repr(value)
    kind = {"dict": "mapping"}.get(type(value).__name__, type(value).__name__)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python does not print numbers with thousands of digits
        return "something very large"


# ---------------------------------------------------------------------------------------------- YAML


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """The data of a YAML text. It is shared, so callers copy it. (A table of 150 cells reads few texts many times.)"""
    return yaml12.parse(text)


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with ``overrides`` ("a.b.c=value") applied.

    Raises:
        UserError: the file can't be read, isn't YAML, repeats a key, or isn't a mapping at the top.
    """
    path = Path(path)
    try:
        data = _parsed(read_text(path, _MAX_BYTES))
    except yaml12.BadYaml as error:
        raise UserError(f"{path}:{error.line}: {error}" if error.line else f"{path}: {error}") from error
    if not isinstance(data, dict):
        got = "nothing (the file is empty)" if data is None else _show(data)
        raise UserError(f"{path}: the top level must be a mapping of keys to values, got {got}")
    return apply_overrides(data, overrides)


def dump_yaml(obj: Any) -> str:
    """A dataclass (or plain data) as YAML text that :func:`load_yaml` and :func:`from_dict` read back."""
    return yaml12.dump(to_dict(obj))


def read_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of "a.b.c=value", the value as YAML.

    Raises:
        UserError: it has no key or no equals sign, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"override '{override}' must read key.path=value, such as stages.stage1.steps=20")
    try:
        return key, _copy(_parsed(text))
    except yaml12.BadYaml as error:
        raise UserError(f"override '{override}': {error}") from error


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with each "a.b.c=value" set; values are YAML, list items are named by index ("a.0.b=1")."""
    merged = _copy(data)
    for override in overrides:
        key, value = read_override(override)
        parts = key.split(".")
        target: Any = merged
        for depth, part in enumerate(parts[:-1]):
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
            target = target[_slot(target, part, override, parts[:depth])]
        target[_slot(target, parts[-1], override, parts[:-1])] = value
    return merged


def _slot(target: Any, part: str, override: str, above: list[str]) -> str | int:
    """The index into ``target`` (a dict or list) that ``part`` of an override means."""
    if isinstance(target, dict):
        return part
    if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
        return int(part)
    what = f"a list of {len(target)}" if isinstance(target, list) else _show(target)
    raise UserError(f"override '{override}': '{'.'.join(above)}' is {what}, which has no '{part}'")


def _copy(value: Any) -> Any:
    """A deep copy of plain data."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
