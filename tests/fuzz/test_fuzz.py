"""Seeded fuzzers: of what is changed, each input is taken for what it says, or refused in one line; none hangs."""

from __future__ import annotations

import os

import pytest

from fuzz import harness
from fuzz.targets import TARGETS
from mmmamba.errors import UserError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

SEED = int(os.environ.get("FUZZ_SEED", "0"))
MORE = 20  # times as many inputs in make test-all


def fuzz(name: str, seed: int, count: int, folder) -> None:
    target = TARGETS[name]
    outcome = harness.run(target, seed, range(count), target.seeds(folder))
    failed = [
        f"PYTHONPATH=tests python -m fuzz {name} {seed} {index}\n{why}" for index, why in outcome.failures.items()
    ]
    assert not failed, "\n\n".join(failed)
    assert outcome.taken + outcome.refused == count
    assert outcome.taken and outcome.refused, "a fuzzer whose inputs all end alike tests little"


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_are_a_little_wrong(name, tmp_path):
    fuzz(name, SEED, TARGETS[name].count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", TARGETS)
def test_many_more(name, seed, tmp_path):
    fuzz(name, SEED + seed, TARGETS[name].count * MORE // 4, tmp_path)


def test_there_are_enough():
    assert sum(target.count for target in TARGETS.values()) >= 5000


# ---------------------------------------------------------------------------------------------- the harness itself


def made(case) -> harness.Target:
    return harness.Target("made", 4, lambda folder: None, lambda rng, seeds, here: case(rng))


def test_it_counts():
    def case(rng):
        if rng.random() < 0.5:
            raise UserError("no")

    outcome = harness.run(made(case), 0, range(40), None)
    assert outcome.taken + outcome.refused == 40 and outcome.taken and outcome.refused and not outcome.failures


@pytest.mark.parametrize(("case", "why"), [
    (lambda rng: 1 / 0, "ZeroDivisionError"),
    (lambda rng: bytearray(700 << 20), "MiB of memory"),
    (lambda rng: bytearray(8 << 30), "MemoryError"),
    (lambda rng: os.kill(os.getpid(), 11), "ended with -11"),
    (lambda rng: [None for _ in iter(int, 1)], "more than 1 s"),
])  # fmt: skip
def test_it_sees(case, why, monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 1)
    outcome = harness.run(made(case), 0, range(1), None)
    assert why in outcome.failures[0]


def test_it_sees_a_wait_that_never_ends(monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 0.5)
    outcome = harness.run(made(lambda rng: os.read(os.pipe()[0], 1)), 0, range(1), None)
    assert "says nothing" in outcome.failures[0]
