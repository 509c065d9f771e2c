"""The greatest whole number that passes a costly test."""

from __future__ import annotations

from collections.abc import Callable

PRECISION = 16  # the answer is at most a sixteenth too small


def greatest(fits: Callable[[int], bool], *, guess: int, most: int) -> int:
    """The greatest number from 0 to ``most`` that fits, a sixteenth of it less at worst.

    Args:
        fits: whether a number of at least 1 fits; if it does, so does every smaller one.
        guess: where to begin: from there in growing strides, up while it fits or down until it does, then bisected.
            A guess that is right to a sixteenth takes two tries, or one if it is as near to ``most``.
        most: nothing above this is asked for.
    """
    fitting, failing = 0, most + 1
    number = max(1, min(guess, most))
    stride = max(1, number // PRECISION)
    while failing - fitting > max(1, fitting // PRECISION):
        if fits(number):
            fitting = number
        else:
            failing = number
        if fitting and failing <= most:
            number = (fitting + failing) // 2
        else:
            number = min(fitting + stride, most) if fitting else max(failing - stride, 1)
            stride *= 2
    return fitting
