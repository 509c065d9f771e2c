"""The stages of distillation, in one table: what each minimises, and what it trains unless a recipe says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mmmamba.distill.objectives import AlignHeads, MatchLogits, Objective, PredictAnswers
from mmmamba.distill.train_config import StageConfig
from mmmamba.model.mixers import Options, kind_of
from mmmamba.model.model import Model


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        objective: what it minimises.
        trains: what it trains by default. ``new parts``: the parts of the mixer that attention does not have;
            ``mixer``: those that it has inherited from attention too. W_o is left as it is.
        order: the number of its order of the samples; each stage has its own.
    """

    objective: type[Objective]
    trains: Literal["new parts", "mixer"]
    order: int

    @property
    def layer_local(self) -> bool:
        """Whether each layer learns alone, from the teacher's own input to it."""
        return self.objective is AlignHeads

    @property
    def matches_logits(self) -> bool:
        """Whether it learns from the teacher's logits, which may come from disk."""
        return self.objective is MatchLogits

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher passes each row too."""
        return self.objective is not PredictAnswers

    def make_objective(self, teacher: Model, student: Model, config: StageConfig) -> Objective:
        """Its objective, with the student made ready: what the stage trains takes gradients, nothing else does."""
        make: Callable[..., Objective] = self.objective
        return make(teacher, student, config) if self.reads_teacher else make(student, config)

    def default_parts(self, mixer: Options) -> tuple[str, ...]:
        """The parts that it trains by default in mixers with these options."""
        parts = kind_of(mixer).parts_with(mixer)
        return tuple(name for name, part in parts.items() if self.trains == "mixer" or not part.inherited)


STAGES: Mapping[str, Stage] = {
    # stage         objective       trains by default   order of samples
    "stage1": Stage(AlignHeads,     "new parts",        0),
    "stage2": Stage(AlignHeads,     "mixer",            1),
    "stage3": Stage(MatchLogits,    "mixer",            2),
    "stage4": Stage(PredictAnswers, "mixer",            4),
}  # fmt: skip
PLACEMENT_ORDER = 3  # of the samples on which the softmax layers are placed, after stage 2
ALIGNMENT = tuple(name for name, stage in STAGES.items() if stage.layer_local)  # the same for linear and hybrid
