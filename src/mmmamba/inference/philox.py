"""The generator Philox4x64-10: random numbers that are a pure function of (seed, sequence, step), many at once.

They are the numbers of numpy's ``np.random.Philox`` with the key (seed, 0) and the counter (0, step, sequence, 0), one
number for each counter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def uniforms(seed: int, sequences: ArrayLike, steps: ArrayLike) -> NDArray[np.float64]:
    """The numbers in [0, 1) that ``sequences`` draw at ``steps``, whole numbers of any shapes that broadcast."""
    step, sequence = np.broadcast_arrays(np.asarray(steps, np.uint64), np.asarray(sequences, np.uint64))
    # numpy increments the lowest word before it draws.
    c0, c1, c2, c3 = np.ones_like(step), step, sequence, np.zeros_like(step)
    key0, key1 = np.uint64(seed), np.uint64(0)
    with np.errstate(over="ignore"):  # all arithmetic is modulo 2^64
        for _ in range(_ROUNDS):
            (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
            c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
            key0, key1 = key0 + _KEY_STEPS[0], key1 + _KEY_STEPS[1]
    return (c0 >> np.uint64(11)) * 2.0**-53


def _product(x: NDArray[np.uint64], factor: np.uint64) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The high and the low word of the 128-bit products."""
    x_high, x_low, high, low = x >> _HALF, x & _LOW, factor >> _HALF, factor & _LOW
    middle = x_high * low + (x_low * low >> _HALF)
    other = x_low * high + (middle & _LOW)
    return x_high * high + (middle >> _HALF) + (other >> _HALF), x * factor
