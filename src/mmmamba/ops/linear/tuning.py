"""Which calls of a linear step the kernel serves."""

from __future__ import annotations

WIDEST = 16_384  # inputs of a map: a program of the kernel holds whole rows
TOKENS = 2  # that the kernel serves: with more, the library's products are as good
INT8_TOKENS = 8  # the same of int8 weights, which the library has no product for
