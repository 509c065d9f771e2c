"""What one optimisation is: steps, rates, schedule, memory; and what a stage of distillation adds to that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmmamba.config_files import OMIT_DEFAULT
from mmmamba.distill.parameters import GATHERED, known_parts
from mmmamba.model.recompute import Recompute

MOST_SAMPLES = 10**7  # of a step
MOST = 10**9  # of any number that has no narrower range: what is larger is a slip
MOST_CACHED = 4096  # tokens of the teacher's for each token
DEFAULT = "default"  # in ``train``: what the stage trains by default


def in_range(config: Any, *names: str, least: float = 0, most: float = MOST, above: bool = False) -> None:
    """Refuse a number outside [least, most], or (least, most] with ``above``; None (the default of some) is none."""
    for name in names:
        value = getattr(config, name)
        _number_in_range(name, value, least, most, above)


def _number_in_range(name: str, value: float | None, least: float, most: float, above: bool) -> None:
    if value is None:
        return
    if not (least < value if above else least <= value):  # also NaN
        raise ValueError(f"{name} must be {'greater than' if above else 'at least'} {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One optimisation under a warm-up–stable–decay schedule.

    Attributes:
        optimizer: ``adamw`` (the paper's); ``muon`` moves the projections' matrices by Muon and the rest by AdamW, for
            fewer steps to the same loss.
        steps: optimizer steps.
        batch_size: samples a step.
        lr: peak learning rate.
        lr_scale: factors on it for some parameters, by name.
        warmup, decay: shares of the steps spent rising to ``lr`` and falling to zero.
        weight_decay: on matrices only, never on norms, biases, A_log and dt_bias.
        clip: greatest norm of the gradient of all that is trained.
        micro_tokens: tokens that one forward pass may hold; a step is split accordingly.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
        compile: compile what surrounds the mixers (torch.compile; half a minute at the start, then faster on a GPU).
        graph: on a GPU, replay the pass of each row, and the update, as CUDA graphs, rows padded to shapes that stay:
            several times faster for small models, whose steps the host's launches hold up, and for short rows of
            large ones.
    """

    steps: int
    batch_size: int
    lr: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr_scale: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.1
    decay: float = 0.1
    weight_decay: float = 0.05
    clip: float = 5.0
    micro_tokens: int = 32768
    checkpoint_every: int = 500
    log_every: int = 10
    compile: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(f"steps ({self.steps}) must be at least 0 and batch_size ({self.batch_size}) at least 1")
        in_range(self, "steps")
        in_range(self, "batch_size", most=MOST_SAMPLES)
        in_range(self, "micro_tokens", "checkpoint_every", "log_every", least=1)
        in_range(self, "lr", "warmup", "decay", "weight_decay")
        in_range(self, "clip", above=True)
        for name, factor in self.lr_scale.items():
            _number_in_range(f"lr_scale.{name}", factor, 0, MOST, above=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {', '.join(map(str, self.betas))}")
        if not 0 <= self.warmup + self.decay <= 1:
            raise ValueError(f"warmup + decay is {self.warmup + self.decay}, must lie in [0, 1]")

    def factor(self, step: int) -> float:
        """The learning rate of ``step`` (from 0), relative to the peak: warm-up, stable, decay (facts of the paper)."""
        rise, fall = self.warmup * self.steps, self.decay * self.steps
        up = (step + 1) / (rise + 1) if step < rise else 1.0
        left = self.steps - step
        return min(up, left / (fall + 1) if left <= fall else 1.0)


@dataclass(frozen=True, kw_only=True)
class StageConfig(TrainConfig):
    """One stage of distillation.

    Attributes:
        train: what moves in this stage. ``default``: what :data:`mmmamba.distill.stages.STAGES` says. Or the parts by
            name: those of the mixer; from stage 3 on also ``o_proj`` (W_o of the new layers), ``mlp``, ``norms`` (those
            of the layers, and the last), ``attention`` (all of it in layers that keep softmax), ``embeddings`` and
            ``head``.
        prompt_weight: weight of the tokens that no answer depends on; 1 counts every token (paper), 0 answers only.
        loss_scale: factor on the loss (the published stages 1–2 use 1000).
        reduction: ``mean`` is a per-token mean over the mask; ``published`` sums KL over tokens and divides by samples.
        supervised: weight of the cross-entropy on the answers beside the KL (stage 3; the paper has none).
        temperature: of the KL (stage 3).
        cache_teacher: keep so many of the teacher's most likely tokens on disk (stage 3); 0 keeps none. The teacher
            passes each sample once, for all later epochs and all other students of the same teacher and data. The loss
            is then the KL over these tokens and the sum of all others.
        recompute: what the backward pass of stages 3 and 4 computes again instead of keeping it: ``none``; ``mlp``, all
            that follows a layer's heads (W_o, norm, MLP); ``layer``, whole layers. The gradients are the same.
    """

    train: tuple[str, ...] = (DEFAULT,)
    prompt_weight: float = 1.0
    loss_scale: float = 1.0
    reduction: Literal["mean", "published"] = "mean"
    supervised: float = 0.0
    temperature: float = 1.0
    cache_teacher: int = field(default=0, metadata={OMIT_DEFAULT: True})
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "prompt_weight", "supervised")
        in_range(self, "cache_teacher", most=MOST_CACHED)
        in_range(self, "loss_scale", "temperature", above=True)
        if not self.train:
            raise ValueError("train names no parameter; to leave a stage out, set its steps to 0")
        parts = known_parts()
        for key, names, known in (
            ("train", self.train, (*parts, DEFAULT)),
            ("lr_scale", self.lr_scale, tuple(part for part in parts if part not in GATHERED)),
        ):
            wrong = [name for name in names if name not in known]
            if wrong:
                raise ValueError(f"{key}: unknown kind of parameter {wrong[0]!r}, must be among {', '.join(known)}")
