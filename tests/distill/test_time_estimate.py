"""The work and the time that a step is estimated to take."""

from __future__ import annotations

import pytest
from workloads import HOVLE, linear, stage, work

from mmmamba.distill.gpus import GPUS, LAUNCH, REPLAY
from mmmamba.distill.time_estimate import step_seconds, step_work
from mmmamba.model.geometries import GEOMETRIES


def test_work_is_two_flop_a_parameter_and_pass() -> None:
    """Stage 3: a forward pass of the teacher, of the student, and its backward pass, within what else they do."""
    flop, _ = step_work(work(linear(HOVLE)), 1.0)
    matrices = 32 * (2048 * (2048 + 2 * 1024 + 2048) + 3 * 2048 * 8192)
    passes = 2 * matrices + 4 * (matrices + 32 * 2048 * 2048) + 6 * 92_553 * 2048
    trained = 2 * 32 * 2048 * (2048 + 2 * 1024 + 2048)
    assert flop == pytest.approx(passes + trained, rel=0.06) and flop > passes + trained


def test_softmax_costs_more_the_longer_the_sequence() -> None:
    flops = [step_work(work(linear(HOVLE), name="stage2"), n)[0] for n in (1000, 2000)]
    assert flops[1] - flops[0] == pytest.approx(32 * 2 * 2048 * 1000)


def test_seconds() -> None:
    matching = work(linear(HOVLE))
    seconds = {name: step_seconds(matching, gpu, 8192 * 64, 64, 8192) for name, gpu in GPUS.items()}
    assert seconds["h200"] < seconds["h100"] < seconds["a100"] < seconds["rtx4090"]
    twice = step_seconds(matching, GPUS["h100"], 8192 * 128, 128, 8192)
    assert twice == pytest.approx(2 * seconds["h100"], rel=0.01)
    for graph, launch in ((False, LAUNCH), (True, REPLAY)):
        small = work(linear(GEOMETRIES["nano"]), stage(graph=graph), "stage2")
        assert step_seconds(small, GPUS["h100"], 100, 1, 100) == 8 * launch
