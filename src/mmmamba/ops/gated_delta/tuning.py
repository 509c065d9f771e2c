"""How the gated delta rule is cut into programs, by the size of a head and the bytes of its products."""

from __future__ import annotations

from typing import NamedTuple

ACCURATE = "tf32x3"  # how T's blocks are multiplied
JOINED = 32  # rows of a state that a program joins
PROGRAMS = 256  # walks that fill the machine
LEAST = 1024  # tokens of a segment
JOINING = 8  # warps of a program that joins segments


class Tuning(NamedTuple):
    """Tokens of a chunk, rows of a state that a walk holds, and how each launch runs.

    Warps of each launch's programs, stages of the loads' pipeline of those that walk, and how many rows of a state the
    launch of the gradients holds at once.
    """

    chunk: int
    rows: int
    prepare: int
    walk: int
    stages: int
    gradients: int
    columns: int


# By the larger of p and n, for 2-byte and for 4-byte products. The latter stay too small for Hopper's asynchronous
# products, which have given wrong digits in three-part TF32.
TUNED = {
    (32, 2): Tuning(32, 32, 1, 1, 3, 2, 32),
    (64, 2): Tuning(32, 64, 1, 4, 3, 2, 32),
    (128, 2): Tuning(64, 64, 1, 4, 2, 8, 64),
    (32, 4): Tuning(32, 32, 1, 2, 1, 4, 32),
    (64, 4): Tuning(32, 32, 1, 2, 1, 4, 64),
    (128, 4): Tuning(32, 32, 2, 2, 1, 8, 64),
}


def held_rows(tuning: Tuning, p: int, n: int) -> int:
    """Rows of a state that a program walks with."""
    return min(tuning.rows, p, n)


def segment_chunks(tokens: int, longest: int, walks: int, chunk: int) -> int:
    """Chunks of a segment, such that about PROGRAMS walks run at once; 0 where no sequence is longer than one.

    Walking in segments costs nearly three times the products, so that short sequences are never cut.
    """
    total = -(-tokens // chunk)
    chunks = max(-(-total // max(PROGRAMS // walks, 1)), -(-LEAST // chunk))
    return chunks if -(-longest // chunk) > chunks else 0
