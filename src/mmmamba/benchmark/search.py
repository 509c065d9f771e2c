"""The greatest whole number that passes a costly test."""

from __future__ import annotations

from collections.abc import Callable

PRECISION = 16  # the answer is at most a sixteenth too small


def greatest(fits: Callable[[int], bool], *, guess: int, most: int) -> int:
    """The greatest number from 0 to ``most`` that fits, a sixteenth of it less at worst.

    Args:
        fits: whether a number of at least 1 fits; if it does, so does every smaller one.
        guess: where to begin: doubled while it fits, halved until it does, then bisected.
        most: nothing above this is asked for.
    """
    fitting, failing, number = 0, most + 1, max(1, min(guess, most))
    while fitting < most and failing > 1:
        if fits(number):
            fitting = number
            if failing <= most:
                break
            number = min(2 * number, most)
        else:
            failing = number
            if fitting:
                break
            number = max(number // 2, 1)
    while failing - fitting > max(1, fitting // PRECISION):
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting
