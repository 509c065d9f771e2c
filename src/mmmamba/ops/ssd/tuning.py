"""How the state space recurrence is cut into programs, by the size of a head and the bytes of its products."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """What a launch is cut into: tile of the state (p, n), warps of a program, stages of the loads' pipeline."""

    p: int
    n: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """Warps of a program and stages of its loads' pipeline, for a launch that is not cut into tiles."""

    warps: int
    stages: int


class Tuning(NamedTuple):
    """Tokens a chunk, programs of the output launch that fill the machine, and how each launch runs.

    The output launch has whole rows of the state (n is not cut), the launch of the reads whole columns (p is not cut).
    """

    chunk: int
    programs: int
    states: Tiles
    output: Tiles
    reads: Tiles
    writes: Launch


# By the larger of p and n, for 2-byte and for 4-byte products; a tile is never larger than p and n.
TUNED = {
    (32, 2): Tuning(64, 264, Tiles(32, 32, 4, 3), Tiles(32, 32, 4, 3), Tiles(32, 32, 4, 2), Launch(4, 1)),
    (64, 2): Tuning(64, 264, Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 1), Launch(4, 1)),
    (128, 2): Tuning(64, 256, Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 32, 4, 3), Launch(4, 1)),
    (32, 4): Tuning(32, 528, Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Launch(4, 1)),
    (64, 4): Tuning(32, 264, Tiles(32, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1), Launch(4, 1)),
    (128, 4): Tuning(16, 264, Tiles(32, 128, 4, 1), Tiles(32, 128, 4, 1), Tiles(128, 32, 8, 1), Launch(8, 1)),
}
