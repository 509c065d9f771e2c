"""Which parameters a stage trains, by kind, and which are the student's own and not its teacher's."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from mmmamba.distill.recipe import ALIGNMENT, DistillRecipe
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import MAMBA2
from mmmamba.model.model import Model

EMBEDDINGS = ("vision", "text_embeddings", "special_embeddings")


def kind_of(name: str, config: ModelConfig) -> str:
    """What ``train`` calls the parameter of this full name (:data:`mmmamba.distill.recipe.KINDS`).

    A head that is tied to the embeddings is theirs.
    """
    top, *rest = name.split(".")
    if top == "layers":
        index, part, *inner = rest
        if part == "mixer":
            return inner[0] if config.layer_map[int(index)] == MAMBA2 else "attention"
        return "mlp" if part == "mlp" else "norms"
    return {"norm": "norms", "head": "head"}.get(top, "embeddings")


def parameters_of(student: Model, kinds: Sequence[str]) -> dict[str, nn.Parameter]:
    """The student's parameters of these kinds (e.g. ``conv``, ``A_log``, ``mlp``), by full name."""
    return {name: p for name, p in student.named_parameters() if kind_of(name, student.config) in kinds}


def check_stages(plan: DistillRecipe, student: ModelConfig) -> None:
    """Refuse, before hours of alignment, a later stage that trains what the student does not have (UserError)."""
    with torch.device("meta"):
        model = Model(student)
    for stage, config in plan.stages.items():
        for kind in config.train if stage not in ALIGNMENT else ():
            if not parameters_of(model, [kind]):
                why = "its head is tied to the embeddings" if kind == "head" else "no layer keeps softmax"
                raise UserError(f"recipe {plan.name}: {stage}.train: the student has no {kind!r} of its own ({why})")


def own_parameters(student: Model, teacher: Model) -> dict[str, nn.Parameter]:
    """Every parameter that the student does not share with its teacher, by full name."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    return {name: parameter for name, parameter in student.named_parameters() if id(parameter) not in theirs}


def unshare(student: Model, teacher: Model, kinds: Sequence[str]) -> None:
    """Give the student copies of its own of what is of these kinds and still its teacher's.

    They lie in float32 at least, for each trained parameter is its own master copy. Whole modules are copied; no kind
    is less than one.
    """
    chosen = tuple(parameters_of(student, kinds))
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
