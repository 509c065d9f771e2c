"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, said in one clear line that names the file, line, field or layer.

    It is a ValueError too: callers of other libraries catch that one for bad input.

    The command line prints ``error: <message>`` and exits with code 2, without a traceback.
    """
