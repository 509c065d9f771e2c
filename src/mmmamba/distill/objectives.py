"""What a training step minimises: each objective runs its passes over a step's rows and leaves gradients behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from mmmamba.data.batching import Batch
from mmmamba.data.tiling import normalise
from mmmamba.distill import processes
from mmmamba.distill.losses import answer_loss, divergence, heads_error, token_weights
from mmmamba.distill.parameters import EMBEDDINGS, parameters_of
from mmmamba.distill.recipe import StageConfig
from mmmamba.distill.recompute import recompute
from mmmamba.model.model import Model, compile_layers
from mmmamba.model.rope import Rotation


class Objective(Protocol):
    """One way to train: the parameters that move, and a backward pass over the rows of one step."""

    trained: dict[str, nn.Parameter]

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        """Add the gradients of the step's loss; return ``loss`` (and parts of it) as detached scalars.

        Of several processes each does so for the rows it has, if any, and divides by what all of them count: their
        gradients and losses are to be summed.
        """


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for passes on ``device``; float32 switches it off."""
    return torch.autocast(
        device.type,
        dtype=torch.bfloat16 if precision == torch.float32 else precision,
        enabled=precision != torch.float32,
    )


def freeze_all_but(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Let only ``trained`` receive gradients; what an earlier stage left of them goes."""
    model.requires_grad_(False)
    model.zero_grad()
    for parameter in trained.values():
        parameter.requires_grad_(True)


def end_to_end(student: Model, stage: StageConfig) -> dict[str, nn.Parameter]:
    """Make a student ready for a stage that trains through all of it; what it trains, by full name."""
    trained = parameters_of(student, stage.train)
    freeze_all_but(student, trained)
    if stage.compile:
        compile_layers(student)
    recompute(student, stage.recompute)
    return trained


def pixels(row: Batch) -> Tensor | None:
    """The row's tiles as the model takes them."""
    return normalise(row.tiles) if row.tiles.shape[0] else None


def inputs(model: Model, row: Batch) -> dict[str, Tensor | None]:
    """What the layers read: the row's embeddings, unless its pictures are embedded by the layers."""
    if model.merges_late:
        return {"input_ids": row.input_ids, "pixel_values": pixels(row)}
    return {"inputs_embeds": model.embed(row.input_ids, pixels(row), spare_tiles=row.real is not None)}


def total(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of a scalar for each row, over the rows of all processes."""
    return processes.total(torch.stack(list(parts)).sum() if parts else torch.zeros((), device=device)).float()


def answer_tokens(rows: Sequence[Batch], device: torch.device) -> Tensor:
    """How many tokens of the rows of all processes are scored, at least 1."""
    return total([(row.labels[:, 1:] != -100).sum().float() for row in rows], device).clamp(min=1)


class AlignHeads:
    """Stages 1 and 2: each mixer's heads against the attention's, fed the *teacher's* input (paper, section 3.3).

    Layer-local: a layer's loss is propagated as soon as the teacher has passed it and its graph is freed, so that no
    more than one mixer's activations are alive.
    """

    def __init__(self, teacher: Model, student: Model, stage: StageConfig) -> None:
        self.teacher, self.student, self.stage = teacher, student, stage
        self.trained = parameters_of(student, stage.train)
        self.mixers = {i: student.mixer(i) for i in student.config.mamba2_layers}
        freeze_all_but(student, self.trained)
        if stage.compile:
            compile_layers(teacher)

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        weights = [token_weights(row.labels, self.stage.prompt_weight, row.real) for row in rows]
        device = self.teacher.device
        scale = self.stage.loss_scale / (total([w.sum() for w in weights], device) * len(self.mixers))
        error = torch.zeros((), device=device)
        for row, weight in zip(rows, weights, strict=True):

            def observe(index: int, u: Tensor, heads: Tensor, rotation: Rotation) -> None:
                if index not in self.mixers:
                    return
                with torch.enable_grad(), autocast(u.device, precision):
                    predicted, _ = self.mixers[index].heads(u, rotation=rotation, cu_seqlens=row.cu_seqlens)  # noqa: B023
                    loss = heads_error(predicted, heads, weight) * scale  # noqa: B023
                with torch.autocast(u.device.type, enabled=False):
                    loss.backward()
                error.add_(loss.detach())

            with torch.no_grad(), autocast(device, precision):
                self.teacher(**inputs(self.teacher, row), cu_seqlens=row.cu_seqlens, logits="none", observe=observe)
        return {"loss": error}


class MatchLogits:
    """Stage 3: KL(teacher ‖ student) end to end, from hidden states (paper, section 3.3; T = 1, no cross-entropy)."""

    def __init__(self, teacher: Model, student: Model, stage: StageConfig) -> None:
        self.teacher, self.student, self.stage = teacher, student, stage
        self.trained = end_to_end(student, stage)
        self.embeds = any(getattr(student, part) is not getattr(teacher, part) for part in EMBEDDINGS)
        if stage.compile:
            compile_layers(teacher)

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        stage, device = self.stage, self.teacher.device
        weights = [token_weights(row.labels, stage.prompt_weight, row.real) for row in rows]
        if stage.reduction == "published":
            divisor = processes.total(torch.tensor(float(sum(row.sequences for row in rows)), device=device))
        else:
            divisor = total([w.sum() for w in weights], device)
        answers = answer_tokens(rows, device) if stage.supervised else None
        kl = torch.zeros((), device=device)
        ce = torch.zeros((), device=device)
        for row, weight in zip(rows, weights, strict=True):
            with autocast(device, precision):
                with torch.no_grad():
                    given = inputs(self.teacher, row)
                    target = self.teacher(**given, cu_seqlens=row.cu_seqlens, logits="none").hidden
                if self.embeds:
                    given = inputs(self.student, row)
                hidden = self.student(**given, cu_seqlens=row.cu_seqlens, logits="none").hidden
                # With a prompt weight of 0 only the answers' tokens need logits.
                kept = slice(None) if stage.prompt_weight else row.scored
                part = (
                    divergence(
                        hidden[:, kept],
                        self.student.head.weight,
                        target[:, kept],
                        self.teacher.head.weight,
                        weight[:, kept],
                        stage.temperature,
                    )
                    / divisor
                )
                loss = part * stage.loss_scale
                kl.add_(part.detach())
                if answers is not None:
                    supervised = answer_loss(hidden, self.student.head.weight, row.labels, row.scored) / answers
                    loss = loss + stage.supervised * supervised
                    ce.add_(supervised.detach())
            loss.backward()
        return {"loss": kl * stage.loss_scale + stage.supervised * ce, **({"ce": ce} if answers is not None else {})}


class PredictAnswers:
    """Cross-entropy of the answers' tokens: teaching from scratch, and stage 4.

    Args:
        model: what is trained, all of it without a ``stage``.
        stage: what moves, and how.
    """

    def __init__(self, model: Model, stage: StageConfig | None = None) -> None:
        self.model = model
        self.trained = dict(model.named_parameters()) if stage is None else end_to_end(model, stage)
        self.scale = 1.0 if stage is None else stage.loss_scale

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        answers = answer_tokens(rows, self.model.device)
        error = torch.zeros((), device=self.model.device)
        for row in rows:
            with autocast(self.model.device, precision):
                hidden = self.model(**inputs(self.model, row), cu_seqlens=row.cu_seqlens, logits="none").hidden
                loss = answer_loss(hidden, self.model.head.weight, row.labels, row.scored) * self.scale / answers
            loss.backward()
            error.add_(loss.detach())
        return {"loss": error}
