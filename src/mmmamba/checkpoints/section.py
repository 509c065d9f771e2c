"""Typed reads of a foreign ``config.json``, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mmmamba.errors import UserError

T = TypeVar("T")


class Section:
    """One object of a foreign ``config.json``: typed reads that name the field. Keys nobody asks for are not read."""

    def __init__(self, data: Mapping[str, Any], where: str | Path, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.where}: '{self.prefix}{key}' {message}")

    def section(self, key: str) -> Section:
        value = self.get(key, dict)
        return Section(value, self.where, f"{self.prefix}{key}.")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of ``key`` as ``kind``; without a default it must be there. null counts as absent."""
        value = self.data.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"must be {kind.__name__}, got {value!r}")
        return value

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key, int, default)
        if value < least:
            raise self.error(key, f"must be at least {least}, got {value}")
        return value

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value that would change the network in a way we do not build; absent is fine."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise self.error(key, f"is {value!r}: only {choices} is supported")
