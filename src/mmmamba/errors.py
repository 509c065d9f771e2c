"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, said in one clear line that names the file, line, field or layer.

    The command line prints ``error: <message>`` and exits with code 2, without a traceback.
    """
