"""The exception that a user is meant to read, and how text from a user's file is shown: on one line, as plain text."""

from __future__ import annotations

LONGEST = 1000  # characters of a message


class UserError(ValueError):
    """Bad input, described in one clear line that names the file, line, field or layer.

    It is a ValueError too, which callers of other libraries catch for bad input.

    The command line prints ``error: <message>`` and exits with code 2, without a traceback. A message may quote what a
    file holds: its text is one line of at most :data:`LONGEST` printable characters, whatever was quoted.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), LONGEST)


def printable(text: str, longest: int | None = None) -> str:
    r"""``text`` on one line, with what a terminal does not show as itself escaped, and its middle left out if too long.

    A control character (a line break, an escape sequence, a change of direction) becomes ``\n``, ``\x1b``, ``\u202e``;
    a byte that was not UTF-8 becomes ``\xe9``. Escaping what was escaped changes nothing.
    """
    if longest is not None and len(text) > longest:
        head, tail = 2 * longest // 3, longest // 6
        text = f"{text[:head]}… ({len(text) - head - tail:,} characters) …{text[len(text) - tail :]}"
    if text.isprintable():
        return text
    shown = "".join(map(_shown, text))
    # Escapes are up to ten characters long: cut again, by what is shown.
    return shown if longest is None or len(shown) <= longest else printable(shown, longest)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # Python represents a byte that it could not decode like this
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
