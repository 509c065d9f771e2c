"""What each stage of a recipe needs on a GPU: its workload, its rows, memory and seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmmamba.distill.gpus import GPUS
from mmmamba.distill.memory_estimate import Memory, greatest_row, stage_memory
from mmmamba.distill.parameters import mixer_parts
from mmmamba.distill.recipe import DistillRecipe
from mmmamba.distill.sample_lengths import SampleLengths
from mmmamba.distill.stages import STAGES
from mmmamba.distill.time_estimate import step_seconds
from mmmamba.distill.workload import Workload
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers.cost import Passes
from mmmamba.ops.dispatch import SIZES


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage on the GPU that was named.

    Attributes:
        work: what is trained, and how.
        row: tokens of the greatest row; ``fitting``: of the greatest row that fits the GPU.
        tokens, rows, seconds: of a step.
        memory: of a step with the greatest row.
    """

    name: str
    work: Workload
    row: int
    fitting: int
    tokens: float
    rows: float
    seconds: float
    memory: Memory

    @property
    def steps(self) -> int:
        return self.work.config.steps

    def memory_with(self, passes: Passes) -> Memory:
        """Its memory where passes run in another way than on that GPU."""
        return stage_memory(replace(self.work, passes=passes), self.row)


def estimate_stages(recipe: DistillRecipe, teacher: ModelConfig, data: SampleLengths, gpu: str) -> list[StageEstimate]:
    """The stages of a recipe on a GPU of :data:`GPUS`."""
    passes = passes_of(teacher, torch.bfloat16, frozen=recipe.frozen_dtype(torch.bfloat16))
    found = []
    for name, config in recipe.stages.items():
        stage = STAGES[name]
        earlier = recipe.stage3.train if name == "stage4" else ()
        work = Workload(
            teacher=teacher,
            student=recipe.student_config(teacher, softmax=() if stage.layer_local else None),
            stage=stage,
            config=config,
            passes=passes,
            owned=tuple(part for part in earlier if part not in mixer_parts()),
        )
        row = min(max(config.micro_tokens, data.longest), config.batch_size * data.longest)
        tokens = config.batch_size * data.mean
        rows = max(1.0, tokens / row)
        found.append(
            StageEstimate(
                name=name,
                work=work,
                row=row,
                fitting=greatest_row(work, GPUS[gpu].memory),
                tokens=tokens,
                rows=rows,
                seconds=step_seconds(work, GPUS[gpu], tokens, rows, data.length),
                memory=stage_memory(work, row),
            )
        )
    return found


def passes_of(
    teacher: ModelConfig, precision: torch.dtype, kernels: bool = True, frozen: torch.dtype = torch.float32
) -> Passes:
    """How passes run in ``precision``; PyTorch's operators serve float32, and heads that no kernel is built for."""
    served = all(s.head_dim in SIZES["head_dim"] for s in (teacher.embedding, teacher.decoder) if s.num_layers)
    kernels = kernels and served and precision != torch.float32
    return Passes(width=precision.itemsize, frozen=frozen.itemsize, kernels=kernels)
