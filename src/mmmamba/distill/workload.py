"""A stage of distillation as its memory and its time depend on it: configs, layers, what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from mmmamba.distill.parameters import is_matrix, known_parts, parameters_of, part_of
from mmmamba.distill.stages import Stage
from mmmamba.distill.train_config import StageConfig
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import Mixer, Passes
from mmmamba.model.model import Model
from mmmamba.model.stack import StackConfig


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a student in a stage: those trained by part (``conv``, …), and all."""

    trained: Mapping[str, int]
    total: int

    @property
    def moved(self) -> int:
        return sum(self.trained.values())


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One layer in a stage.

    Attributes:
        stack: its geometry.
        mixer: the student's, without memory for its weights; ``source``: the teacher's.
        trained: the parts of the mixer that the stage trains, W_o left out.
        trains_out, trains_mlp: whether it trains W_o, and the MLP.
        reads_gradient: whether the mixer's input has a gradient.
        gives_gradient: whether the layer's output has one: from the first layer on that trains.
    """

    stack: StackConfig
    mixer: Mixer[Any]
    source: Mixer[Any]
    trained: tuple[str, ...]
    trains_out: bool
    trains_mlp: bool
    reads_gradient: bool
    gives_gradient: bool

    @property
    def heads(self) -> int:
        """Values of a token's heads."""
        return self.stack.num_heads * self.stack.head_dim

    @property
    def out(self) -> int:
        """Parameters of W_o's matrix."""
        return self.mixer.o_proj.weight.numel()

    @property
    def mlp(self) -> int:
        """Parameters of the MLP's three matrices."""
        return 3 * self.mixer.hidden_size * self.stack.intermediate_size


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A stage of distillation.

    Attributes:
        teacher, student: their configs. In a layer-local stage every layer of the student is new.
        stage: which one it is.
        config: its section of the recipe.
        passes: how they run.
        owned: parts that an earlier stage has made the student's own.
    """

    teacher: ModelConfig
    student: ModelConfig
    stage: Stage
    config: StageConfig
    passes: Passes = field(default_factory=Passes)
    owned: tuple[str, ...] = ()
    _saved: dict[Any, int] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def student_model(self) -> Model:
        """The student's modules, without memory for their weights."""
        return _without_memory(self.student)

    @cached_property
    def teacher_model(self) -> Model:
        return _without_memory(self.teacher)

    @cached_property
    def aligned_model(self) -> Model:
        """The student with a new mixer in every layer, as stages 1 and 2 make it."""
        new = self.student.layer_map[self.student.new_layers[0]]
        return _without_memory(replace(self.student, layer_map=(new,) * self.student.num_layers))

    @cached_property
    def counts(self) -> Counts:
        """What the stage trains and what it leaves frozen."""
        found = dict.fromkeys(known_parts(), 0)
        for name, parameter in parameters_of(self.student_model, self.config.train).items():
            found[part_of(name, self.student)] += parameter.numel()
        total = sum(parameter.numel() for parameter in self.student_model.parameters())
        return Counts(trained={part: count for part, count in found.items() if count}, total=total)

    @cached_property
    def moved_matrices(self) -> int:
        """Parameters of the trained matrices between hidden states, which Muon moves if the recipe asks for it."""
        trained = parameters_of(self.student_model, self.config.train)
        return sum(p.numel() for name, p in trained.items() if is_matrix(name, p, self.student))

    @cached_property
    def layers(self) -> list[LayerWork]:
        return list(self._layers())

    def _layers(self) -> Iterator[LayerWork]:
        train = self.config.train
        around = bool({"norms", "mlp"} & {*train})
        gradient = "embeddings" in train  # of the layer's input
        for index in range(self.student.num_layers):
            mixer = self.student_model.mixer(index)
            trained = train if mixer.seeded else tuple(mixer.parts) if "attention" in train else ()
            reads_gradient = gradient or "norms" in train
            gradient = gradient or around or bool(trained)
            yield LayerWork(
                stack=self.student.stack_of(index),
                mixer=mixer,
                source=self.teacher_model.mixer(index),
                trained=trained,
                trains_out="o_proj" in train if mixer.seeded else bool(trained),
                trains_mlp="mlp" in train,
                reads_gradient=reads_gradient,
                gives_gradient=gradient,
            )

    def saved(self, layer: LayerWork, tokens: int) -> int:
        """Bytes that a layer's mixer keeps of a row for its backward pass. Layers of one shape keep the same."""
        key = (layer.stack, type(layer.mixer), layer.trained, tokens)
        if key not in self._saved:
            self._saved[key] = layer.mixer.saved_bytes(self.passes, tokens, layer.trained)
        return self._saved[key]


def _without_memory(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return Model(config)
