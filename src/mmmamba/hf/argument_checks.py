"""Arguments of transformers' callers that our models do not have."""

from __future__ import annotations

from typing import Any

from mmmamba.errors import UserError


def refuse_unknown(method: str, kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would change nothing. None and False pass: callers use them to ask for nothing.

    Raises:
        UserError: naming the method and the argument.
    """
    for name, value in kwargs.items():
        if value is not None and value is not False:
            raise UserError(f"this model's {method} has no argument '{name}'")
