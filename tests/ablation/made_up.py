"""A small table file, and results that nobody measured, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_run
from mmmamba.ablation.journal import Ability, Journal, Result
from mmmamba.ablation.plan import Plan
from mmmamba.config_files import from_dict

ABILITIES = ["easy", "read", "recall-4x"]


def plan_data(base: str, **changes: Any) -> dict[str, Any]:
    """A table file as plain data: two tables that share a cell, three alignments; ``tables__x__cells=…`` changes it."""
    plan = {
        "name": "tiny",
        "base": base,
        "seeds": [0, 1],
        "questions": {"abilities": ABILITIES, "mean": ["easy", "read"], "limit": 2, "max_new_tokens": 3},
        "tables": {
            "stages": {
                "title": "Does each stage bring something?",
                "reference": "all",
                "claims": [{"better": "all", "worse": "only-3"}],
                "paper": {"all": "47.7", "only-3": "40.0"},
                "cells": {"all": {}, "only-3": {"stage1.steps": 0, "stage2.steps": 0}},
            },
            "layers": {"title": "How many?", "cells": {"none": {}, "two": {"layers": [0, 3]}}},
        },
    }
    return small_run.changed(plan, **changes)


def journal(path: Path) -> Journal:
    """A file with the made-up plan and its six results."""
    found = Journal(path)
    found.note_plan(plan(), 1.0)
    for result in three_seeds():
        found.add(result)
    return found


def plan(**changes: Any) -> Plan:
    data: dict[str, Any] = {
        "name": "made-up",
        "base": "nano-linear",
        "seeds": [0, 1, 2],
        "questions": {"abilities": ["easy", "read", "recall-4x"], "mean": ["easy", "read"]},
        "tables": {
            "rotation": {
                "title": "Does rotation help?",
                "reference": "rope",
                "claims": [
                    {"better": "rope", "worse": "none"},
                    {"better": "none", "worse": "rope", "ability": "recall-4x", "source": "nobody"},
                ],
                "paper": {"rope": "1 | 2"},
                "paper_metric": "MME",
                "cells": {"rope": {}, "none": {"mixer.rope": False, "base": "nano-hybrid"}},
            }
        },
    }
    return from_dict(Plan, {**data, **changes})


def result(cell: str, seed: int, easy: float, read: float, long: float | None, **changes: Any) -> Result:
    """A result of table ``rotation`` with these retentions."""
    kept = {"easy": easy, "read": read, "recall-4x": long}
    values: dict[str, Any] = {
        "table": "rotation",
        "cell": cell,
        "seed": seed,
        "id": f"id-of-{cell}-{seed}",
        "base": "nano-linear",
        "set": (f"seed={seed}",),
        "steps": (20, 40, 2000),
        "batch_sizes": (128, 128, 64),
        "losses": {"stage1": 3.0, "stage3": 0.25},
        "abilities": {
            name: Ability(n=50, accuracy=0.0 if share is None else share / 2, teacher=0.5 if share is not None else 0.0,
                          retention=share, agreement=0.5, nll=1.0)
            for name, share in kept.items()
        },
        "mean": {"accuracy": 0.4, "retention": (easy + read) / 2},
        "seconds": {"distill": 20.0, "evaluate": 5.0},
        "device": "a GPU",
        "precision": "bfloat16",
        "versions": {"torch": "2"},
        "teacher": {"name": "nano-teacher", "sha256": "0"},
        "commands": (f"mmmamba distill x --set seed={seed}", "mmmamba eval x"),
    }  # fmt: skip
    return Result(**{**values, **changes})


def three_seeds() -> list[Result]:
    """``rope`` keeps 90, 92, 94 % in the mean, ``none`` 80, 83, 83; at length 50 % and 60, 62, 64 %."""
    rope = [result("rope", seed, 0.9 + 0.02 * seed, 0.9 + 0.02 * seed, 0.5) for seed in range(3)]
    none = [result("none", seed, 0.8, (0.8, 0.86, 0.86)[seed], 0.6 + 0.02 * seed) for seed in range(3)]
    return [*rope, *none]
