"""Cosine and sine of the large angles that rotations reach in long contexts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cos_sin(angle):
    """Both of an angle in radians, of up to 10⁸ in float32 (exact to its last bits there).

    The library's own float32 functions take a slow way beyond 10⁵, which a decoding step's time would show. Whole
    turns are taken off first: 2π as a sum of two numbers, whose first product with the turns rounds nothing.
    """
    if angle.dtype == tl.float32:
        turns = tl.floor(angle * 0.15915494309189535 + 0.5)
        angle = tl.fma(turns, -6.2831854820251465, angle)
        angle = tl.fma(turns, 1.7484555600695e-07, angle)
    return tl.cos(angle), tl.sin(angle)
