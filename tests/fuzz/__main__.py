"""``PYTHONPATH=tests python -m fuzz TARGET SEED INDEX``: one input alone, with its traceback and what it left."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from fuzz.harness import once
from fuzz.targets import TARGETS


def main(name: str, seed: str, index: str) -> None:
    base = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for folder in ("seeds", "here"):
        (base / folder).mkdir()
    seeds = TARGETS[name].seeds(base / "seeds")
    os.chdir(base / "here")
    print(f"what it makes is in {base / 'here'}", file=sys.stderr)
    taken = once(TARGETS[name], int(seed), int(index), seeds, base / "here")
    print("taken" if taken else "refused")


main(*sys.argv[1:])
