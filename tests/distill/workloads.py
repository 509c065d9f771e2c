"""Stages of distillation whose costs the tests estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmmamba.distill.stages import STAGES
from mmmamba.distill.train_config import StageConfig
from mmmamba.distill.workload import Workload
from mmmamba.model import Mamba2Options, ModelConfig
from mmmamba.model.geometries import geometry
from mmmamba.model.mixers import ATTENTION, Options, kind_of
from small_run import STAGE2

HOVLE = geometry("hovle-2.6b")
OURS = Mamba2Options(rope=True, conv_activation="none")
UNIT_KEYS = Mamba2Options(rope=True, conv_activation="none", qk_norm=True)
DELTA = replace(UNIT_KEYS, rule="gated_delta")


def stage(train: Sequence[str] = STAGE2, **changes: Any) -> StageConfig:
    return StageConfig(**{"steps": 10, "batch_size": 2, "lr": 1e-3, "train": tuple(train), **changes})


def linear(teacher: ModelConfig, mixer: Options = OURS) -> ModelConfig:
    return replace(teacher, layer_map=(kind_of(mixer).name,) * teacher.num_layers, mixer=mixer)


def work(student: ModelConfig, config: StageConfig | None = None, name: str = "stage3", **options: Any) -> Workload:
    """A stage that makes this student of a teacher of its size."""
    teacher = replace(student, layer_map=(ATTENTION,) * student.num_layers)
    return Workload(teacher=teacher, student=student, stage=STAGES[name], config=config or stage(), **options)
