"""Recipes: every choice of a training run, as strict YAML.

A recipe is found by path or, for the built-in ones, by name (``nano-linear``). Unknown keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mmmamba.config_files import from_dict, load_yaml
from mmmamba.data.tiling import MAX_TILES
from mmmamba.device import MOST_WORKERS
from mmmamba.distill.parameters import mixer_parts, parameters_of
from mmmamba.distill.stages import STAGES
from mmmamba.distill.train_config import DEFAULT, StageConfig, TrainConfig, in_range
from mmmamba.errors import UserError
from mmmamba.file_names import check_name
from mmmamba.model.config import ModelConfig, student_layer_map
from mmmamba.model.mixers import Options, default_options, kind_of
from mmmamba.model.model import Model

T = TypeVar("T")

MOST_SEED = 2**32 - 1  # others are made of it, and must fit 64 bits
RECIPES = Path(__file__).parent.parent / "recipes"


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
        in_range(self, "weight")


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
        in_range(self, "scale", above=True)
        in_range(self, "max_length", least=1)
        in_range(self, "max_tiles", least=1, most=MAX_TILES)
        in_range(self, "workers", most=MOST_WORKERS)


@dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """A whole distillation.

    Attributes:
        name: also the default name of the run folder.
        teacher: a folder, or the name of a built-in teacher.
        layers: ``linear``; ``hybrid:K`` (the first layer of each group of K keeps softmax); ``measured:K`` (as many
            keep it, those that a measurement after stage 2 picks: :func:`mmmamba.distill.placement.place`); or the list
            of the global layers that keep softmax.
        mixer: the kind of the new layers and its options (default: Mamba-2, as published). Other kinds are named by
            the key ``kind``.
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
    mixer: Options = field(default_factory=default_options)
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
        in_range(self, "seed", most=MOST_SEED)
        self._fill_in_defaults()
        self._check_parts()
        self.mixer.check_init(self.init)
        last = [config for config in (self.stage3, self.stage4) if config is not None and config.steps]
        if self.init == "scratch" and last and not any("o_proj" in config.train for config in last):
            raise ValueError("init 'scratch' draws W_o too, and no stage trains it: add o_proj to stage3.train")

    def _fill_in_defaults(self) -> None:
        """Put the parts that a stage trains by default in the place of ``default``: a run's recipe then says them."""
        for name, config in self.stages.items():
            if DEFAULT in config.train:
                named = [part for part in config.train if part != DEFAULT]
                parts = dict.fromkeys([*STAGES[name].default_parts(self.mixer), *named])
                object.__setattr__(self, name, replace(config, train=tuple(parts)))

    def _check_parts(self) -> None:
        """Refuse what a stage cannot train: what its loss does not reach, or what these mixers do not have."""
        kind = kind_of(self.mixer)
        here = kind.parts_with(self.mixer)
        for name, config in self.stages.items():
            if config.cache_teacher and not STAGES[name].matches_logits:
                raise ValueError(f"{name}.cache_teacher: this stage does not read the teacher's logits, stage 3 does")
            for part in config.train:
                if part in here or (part not in mixer_parts() and not STAGES[name].layer_local):
                    continue
                if part in mixer_parts():
                    raise ValueError(f"{name}.train: a {kind.name} mixer with these options has no {part!r}, it has "
                                     f"{', '.join(here)}")  # fmt: skip
                raise ValueError(f"{name}.train: {part!r} learns nothing from a loss on the heads before W_o; "
                                 f"stage 3 can train it")  # fmt: skip

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
        return self.keeping(self.softmax_layers(num_layers), num_layers)

    def softmax_layers(self, num_layers: int) -> Sequence[int]:
        """The layers that keep softmax in :meth:`layer_map`.

        Raises:
            UserError: when ``layers`` is not understood, names a layer that is not there, or leaves nothing to distil.
        """
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
        return keep

    def keeping(self, softmax: Sequence[int], num_layers: int) -> tuple[str, ...]:
        """The layer map in which these layers keep softmax, and all others are new."""
        return student_layer_map(num_layers, softmax, self.mixer)

    def student_config(self, teacher: ModelConfig, softmax: Sequence[int] | None = None) -> ModelConfig:
        """The config of a student of this teacher; ``softmax``: the layers that keep it (default: the recipe's)."""
        layers = teacher.num_layers
        layer_map = self.keeping(self.softmax_layers(layers) if softmax is None else softmax, layers)
        return replace(teacher, layer_map=layer_map, mixer=self.mixer)

    def check_student(self, teacher: ModelConfig) -> None:
        """Refuse, before hours of alignment, a later stage that trains what the student does not have (UserError)."""
        with torch.device("meta"):
            student = Model(self.student_config(teacher))
        for name, config in self.stages.items():
            for part in config.train if not STAGES[name].layer_local else ():
                if not parameters_of(student, [part]):
                    why = "its head is tied to the embeddings" if part == "head" else "no layer keeps softmax"
                    raise UserError(f"recipe {self.name}: {name}.train: the student has no {part!r} of its own ({why})")


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
        in_range(self, "seed", most=MOST_SEED)
        in_range(self, "vocab_size", least=1, most=10**7)


def with_teacher_cache(recipe: DistillRecipe, k: int) -> DistillRecipe:
    """The recipe with k of the teacher's most likely tokens kept on disk in stage 3.

    Raises:
        UserError: for a number that no stage can have.
    """
    try:
        return replace(recipe, stage3=replace(recipe.stage3, cache_teacher=k))
    except ValueError as error:
        raise UserError(f"--cache-teacher {k}: {error}") from error


def check_teacher(config: ModelConfig, where: str | Path) -> None:
    """Refuse a teacher that is a student itself (UserError)."""
    if config.new_layers:
        layer = config.new_layers[0]
        raise UserError(
            f"{where}: layer {layer} is {config.layer_map[layer]}; a teacher has softmax attention in every layer"
        )


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
