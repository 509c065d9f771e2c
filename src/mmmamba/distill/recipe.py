"""Recipes: every choice of a training run, as strict YAML.

A recipe is found by path or, for the built-in ones, by name (``nano-linear``). Unknown keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mmmamba.config_files import from_dict, load_yaml
from mmmamba.data.tiling import MAX_TILES
from mmmamba.device import MOST_WORKERS
from mmmamba.errors import UserError
from mmmamba.file_names import check_name
from mmmamba.model.mixers import ATTENTION, MAMBA2, Mamba2Options

T = TypeVar("T")

MIXER_PARAMETERS = (
    "A_log", "dt_bias", "dt_proj", "beta_proj", "conv", "gate_proj", "norm", "q_proj", "k_proj", "v_proj",
)  # fmt: skip
# What a stage can train: all of a Mamba-2 mixer before W_o, and what else stages after the alignment may move.
KINDS = (*MIXER_PARAMETERS, "o_proj", "mlp", "norms", "attention", "embeddings", "head")
ALIGNMENT = ("stage1", "stage2")  # the stages in which each layer learns by itself
SCALED = (*MIXER_PARAMETERS, "o_proj", "mlp")  # kinds that are parts of their parameters' names
MOST_SEED = 2**32 - 1  # others are made of it, and must fit 64 bits
MOST_SAMPLES = 10**7  # of a step
MOST = 10**9  # of any number that has no narrower range: what is larger is a slip
RECIPES = Path(__file__).parent.parent / "recipes"


def label(kind: str) -> str:
    """A kind of parameter as tables name it."""
    return f"mixer {kind}" if kind in (*MIXER_PARAMETERS, "o_proj") else kind


def _in_range(config: Any, *names: str, least: float = 0, most: float = MOST, above: bool = False) -> None:
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
class SourceConfig:
    """One JSONL file of a mixture.

    Attributes:
        path: the file, relative to ``data.root`` unless absolute.
        weight: its share of the samples, relative to the other sources.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise ValueError(f"path must be a file, got {self.path!r}")
        _in_range(self, "weight")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    Attributes:
        root: folder of the sources; built by ``mmmamba data build`` at ``scale`` when it is missing.
        scale: size of the built-in sources when they have to be built (1 is for a laptop).
        sources: the mixture.
        max_length: tokens of a sample; a longer text tail is cut.
        max_tiles: tiles of a picture (default: the model's own limit).
        cache: encode every sample once into memory-mapped arrays, in a folder .cache beside the JSONL file.
        workers: loader processes (default: none on one or two cores, else up to 8).
        on_bad_sample: stop, or skip and list.
    """

    root: str = "data/nano"
    scale: float = 1.0
    sources: tuple[SourceConfig, ...]
    max_length: int = 4096
    max_tiles: int | None = None
    cache: bool = False
    workers: int | None = None
    on_bad_sample: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty")
        if not any(source.weight for source in self.sources):
            raise ValueError("sources: every weight is 0")
        if not self.root or "\0" in self.root:
            raise ValueError(f"root must be a folder, got {self.root!r}")
        _in_range(self, "scale", above=True)
        _in_range(self, "max_length", least=1)
        _in_range(self, "max_tiles", least=1, most=MAX_TILES)
        _in_range(self, "workers", most=MOST_WORKERS)


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
        _in_range(self, "steps")
        _in_range(self, "batch_size", most=MOST_SAMPLES)
        _in_range(self, "micro_tokens", "checkpoint_every", "log_every", least=1)
        _in_range(self, "lr", "warmup", "decay", "weight_decay")
        _in_range(self, "clip", above=True)
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
        train: the kinds of parameters that move in this stage: the mixer's by name; from stage 3 on also ``o_proj``
            (W_o of the Mamba-2 layers), ``mlp``, ``norms`` (those of the layers, and the last), ``attention`` (all of
            it in layers that keep softmax), ``embeddings`` and ``head``.
        prompt_weight: weight of the tokens that no answer depends on; 1 counts every token (paper), 0 answers only.
        loss_scale: factor on the loss (the published stages 1–2 use 1000).
        reduction: ``mean`` is a per-token mean over the mask; ``published`` sums KL over tokens and divides by samples.
        supervised: weight of the cross-entropy on the answers beside the KL (stage 3; the paper has none).
        temperature: of the KL (stage 3).
        recompute: what the backward pass of stages 3 and 4 computes anew instead of keeping it: ``none``; ``mlp``, all
            that follows a layer's heads (W_o, norm, MLP); ``layer``, whole layers. The gradients are the same.
    """

    train: tuple[str, ...]
    prompt_weight: float = 1.0
    loss_scale: float = 1.0
    reduction: Literal["mean", "published"] = "mean"
    supervised: float = 0.0
    temperature: float = 1.0
    recompute: Literal["none", "mlp", "layer"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _in_range(self, "prompt_weight", "supervised")
        _in_range(self, "loss_scale", "temperature", above=True)
        if not self.train:
            raise ValueError("train names no parameter; to leave a stage out, set its steps to 0")
        for key, names, known in (("train", self.train, KINDS), ("lr_scale", self.lr_scale, SCALED)):
            wrong = [name for name in names if name not in known]
            if wrong:
                raise ValueError(f"{key}: unknown kind of parameter {wrong[0]!r}, must be among {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """A whole distillation.

    Attributes:
        name: also the default name of the run folder.
        teacher: a folder, or the name of a built-in teacher.
        layers: ``linear``; ``hybrid:K`` (the first layer of each group of K keeps softmax); ``measured:K`` (as many
            keep it, those that a measurement after stage 2 picks: :func:`mmmamba.distill.placement.place`); or the list
            of the global layers that keep softmax.
        mixer: options of the Mamba-2 mixer (default: the published one).
        init: how its parameters start: :func:`mmmamba.distill.seeding.seed`.
        seed: of the new parameters and of the order of the data.
        frozen: number format of the weights that no stage trains. ``float32``, or ``passes``: that of the passes
            (bfloat16 on a GPU), at half the memory and without casts; what flows between layers is in it too. What is
            trained lies in float32 in any case: its own master copy.
        data, stage1, stage2, stage3: see their classes. Stages 1 and 2 align the mixers of all layers, whatever
            ``layers`` says, so that linear and hybrid share them.
        stage4: a short pass afterwards over the answers' cross-entropy, without the teacher (the paper has none).
    """

    name: str
    teacher: str
    layers: str | tuple[int, ...] = "linear"
    mixer: Mamba2Options = field(default_factory=Mamba2Options)
    init: Literal["mimic", "inherit", "scratch"] = "mimic"
    seed: int = 0
    frozen: Literal["float32", "passes"] = "float32"
    data: DataConfig
    stage1: StageConfig
    stage2: StageConfig
    stage3: StageConfig
    stage4: StageConfig | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "name")  # of the folder runs/NAME
        _in_range(self, "seed", most=MOST_SEED)
        for name in ALIGNMENT:
            others = [kind for kind in self.stages[name].train if kind not in MIXER_PARAMETERS]
            if others:
                raise ValueError(f"{name}.train: {others[0]!r} learns nothing from a loss on the heads before W_o; "
                                 f"stage 3 can train it")  # fmt: skip
        strengths = [name for name, config in self.stages.items() if "beta_proj" in config.train]
        if strengths and self.mixer.rule != "gated_delta":
            raise ValueError(f"{strengths[0]}.train: 'beta_proj' is the gated delta rule's, and mixer.rule is "
                             f"{self.mixer.rule!r}")  # fmt: skip
        if self.init != "mimic" and self.mixer.decay != "published":
            raise ValueError(f"init {self.init!r} draws the decay as Mamba-2 does, not as mixer.decay has it: leave "
                             f"{self.mixer.decay!r} out")  # fmt: skip
        last = [config for config in (self.stage3, self.stage4) if config is not None and config.steps]
        if self.init == "scratch" and last and not any("o_proj" in config.train for config in last):
            raise ValueError("init 'scratch' draws W_o too, and no stage trains it: add o_proj to stage3.train")

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages in their order, by name."""
        found = {"stage1": self.stage1, "stage2": self.stage2, "stage3": self.stage3}
        return found if self.stage4 is None else {**found, "stage4": self.stage4}

    def frozen_dtype(self, precision: torch.dtype) -> torch.dtype:
        """The number format of frozen weights where passes run in ``precision``."""
        return precision if self.frozen == "passes" else torch.float32

    @property
    def measured(self) -> bool:
        """Whether it takes a measurement to say which layers keep softmax."""
        return isinstance(self.layers, str) and self.layers.startswith("measured:")

    def layer_map(self, num_layers: int) -> tuple[str, ...]:
        """The layer map for a teacher of ``num_layers`` layers; of one that must be measured, the interleaved one."""
        if self.layers == "linear":
            keep: Sequence[int] = ()
        elif isinstance(self.layers, str):
            kind, _, group = self.layers.partition(":")
            if kind not in ("hybrid", "measured") or not re.fullmatch("0*[1-9][0-9]{0,5}", group):
                raise UserError(
                    f"recipe {self.name}: layers must be 'linear', 'hybrid:K', 'measured:K' or a list, "
                    f"got {self.layers!r}"
                )
            keep = range(0, num_layers, int(group))
        else:
            keep = self.layers
        outside = [i for i in keep if not 0 <= i < num_layers]
        if outside:
            raise UserError(f"recipe {self.name}: layers names layer {outside[0]}, the teacher has 0…{num_layers - 1}")
        if len(set(keep)) == num_layers:
            raise UserError(f"recipe {self.name}: layers keeps softmax in all {num_layers} layers: nothing to distil")
        return tuple(ATTENTION if i in keep else MAMBA2 for i in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class TeachRecipe:
    """Training a teacher from scratch.

    Attributes:
        name: also the default name of the run folder.
        vocab_size: of the byte-level BPE tokenizer that is trained on the sources' texts.
        model: fields of ``ModelConfig``; the token ids are filled in from the tokenizer.
        seed: of weights and data order.
    """

    name: str
    vocab_size: int
    model: dict[str, Any]
    seed: int = 0
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        _in_range(self, "seed", most=MOST_SEED)
        _in_range(self, "vocab_size", least=1, most=10**7)


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path or built-in name.

    Raises:
        UserError: when there is none; the built-in ones are listed.
    """
    for candidate in (Path(recipe), RECIPES / f"{recipe}.yaml", RECIPES / Path(recipe).name):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise UserError(f"{recipe}: no such recipe file; built-in recipes: {known}")


def load_recipe(cls: type[T], recipe: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a recipe strictly, with ``a.b=value`` overrides laid over it."""
    path = find_recipe(recipe)
    return from_dict(cls, load_yaml(path, list(overrides)), where=str(path))
