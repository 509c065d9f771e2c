"""Which parts of a student a stage can train, which parameters they are, and which of them are still its teacher's."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import Part, kind_named, kinds
from mmmamba.model.model import Model

EMBEDDINGS = ("vision", "text_embeddings", "special_embeddings")
GATHERED = ("norms", "attention", "embeddings", "head")  # parts whose parameters have other names than the part
#: What can be trained beside the parts of a mixer, from stage 3 on. ``o_proj`` is W_o of the new layers.
AROUND_MIXERS = ("o_proj", "mlp", *GATHERED)


def mixer_parts() -> tuple[str, ...]:
    """The parts that a new mixer of any kind has before W_o."""
    return tuple(dict.fromkeys(part for kind in kinds().values() if kind.seeded for part in kind.parts))


def known_parts() -> tuple[str, ...]:
    """All that a recipe's ``train`` can name."""
    return (*mixer_parts(), *AROUND_MIXERS)


def label(part: str) -> str:
    """A part as tables name it."""
    return f"mixer {part}" if part == "o_proj" or part in mixer_parts() else part


def part_of(name: str, config: ModelConfig) -> str:
    """The part that the parameter of this full name belongs to. A head that is tied to the embeddings is theirs."""
    top, *rest = name.split(".")
    if top == "layers":
        index, place, *inner = rest
        if place == "mixer":
            kind = kind_named(config.layer_map[int(index)])
            return inner[0] if kind.seeded else kind.name
        return "mlp" if place == "mlp" else "norms"
    return {"norm": "norms", "head": "head"}.get(top, "embeddings")


def rule_of(name: str, config: ModelConfig) -> Part:
    """How optimizers treat the parameter of this full name."""
    top, *rest = name.split(".")
    if top == "layers" and rest[1] == "mixer":
        return kind_named(config.layer_map[int(rest[0])]).parts.get(rest[2], Part(matrix=rest[2] == "o_proj"))
    if top == "layers":
        return Part(matrix=rest[1] == "mlp")
    return Part(decays=False if "embedding" in name else None)


def rules_of(names: Iterable[str], config: ModelConfig) -> dict[str, Part]:
    """The rule of each parameter, by full name."""
    return {name: rule_of(name, config) for name in names}


def is_matrix(name: str, parameter: Tensor, config: ModelConfig) -> bool:
    """Whether a parameter is a matrix between hidden states (the few rows of a step size's map are not)."""
    return parameter.ndim == 2 and rule_of(name, config).matrix


def parameters_of(student: Model, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The student's parameters of these parts (e.g. ``conv``, ``A_log``, ``mlp``), by full name."""
    return {name: p for name, p in student.named_parameters() if part_of(name, student.config) in parts}


def own_parameters(student: Model, teacher: Model) -> dict[str, nn.Parameter]:
    """Every parameter that the student does not share with its teacher, by full name."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    return {name: parameter for name, parameter in student.named_parameters() if id(parameter) not in theirs}


def unshare(student: Model, teacher: Model, parts: Sequence[str]) -> None:
    """Give the student its own copy of each of these parts that is still its teacher's.

    Copies are in float32 at least, because each trained parameter is its own master copy. Whole modules are copied; no
    part is less than one.
    """
    chosen = tuple(parameters_of(student, parts))
    theirs = {id(module) for module in teacher.modules()}

    def visit(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            if not any(one.startswith(f"{path}{name}.") for one in chosen):
                continue
            if id(child) in theirs:
                wide = torch.promote_types(next(child.parameters()).dtype, torch.float32)
                setattr(parent, name, copy.deepcopy(child).to(wide))
            else:
                visit(child, f"{path}{name}.")

    visit(student, "")
    if student.config.tie_word_embeddings and student.text_embeddings is not teacher.text_embeddings:
        student.head = nn.Linear(student.head.in_features, student.head.out_features, bias=False, device="meta")
        student.head.weight = student.text_embeddings.weight
