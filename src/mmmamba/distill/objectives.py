"""What a training step minimises: each objective runs its passes over a step's rows and leaves gradients behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from mmmamba.data.batching import Batch
from mmmamba.data.tiling import normalise
from mmmamba.distill.losses import answer_loss, divergence, heads_error, token_weights
from mmmamba.distill.recipe import StageConfig
from mmmamba.model.mamba2 import Mamba2
from mmmamba.model.model import Model
from mmmamba.model.rope import Rotation


class Objective(Protocol):
    """One way to train: the parameters that move, and a backward pass over the rows of one step."""

    trained: dict[str, nn.Parameter]

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        """Add the gradients of the step's loss; return ``loss`` (and parts of it) as detached scalars."""


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for passes on ``device``; float32 switches it off."""
    return torch.autocast(
        device.type,
        dtype=torch.bfloat16 if precision == torch.float32 else precision,
        enabled=precision != torch.float32,
    )


def mixer_parameters(student: Model, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The student's mixer parameters that ``names`` (e.g. ``conv``, ``A_log``) select, by full name."""
    chosen = {}
    for layer in student.layers:
        if isinstance(layer.mixer, Mamba2):
            for name, parameter in layer.mixer.named_parameters():
                if name.split(".")[0] in names:
                    chosen[f"layers.{layer.index}.mixer.{name}"] = parameter
    return chosen


def freeze_all_but(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Let only ``trained`` receive gradients."""
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)


def pixels(row: Batch) -> Tensor | None:
    """The row's tiles as the model takes them."""
    return normalise(row.tiles) if row.tiles.shape[0] else None


def inputs(model: Model, row: Batch) -> dict[str, Tensor | None]:
    """What the layers read: the row's embeddings, unless its pictures are embedded by the layers."""
    if model.merges_late:
        return {"input_ids": row.input_ids, "pixel_values": pixels(row)}
    return {"inputs_embeds": model.embed(row.input_ids, pixels(row), spare_tiles=row.real is not None)}


def answer_tokens(rows: Sequence[Batch]) -> Tensor:
    """How many tokens of the rows are scored, at least 1."""
    return torch.stack([(row.labels[:, 1:] != -100).sum() for row in rows]).sum().clamp(min=1)


class AlignHeads:
    """Stages 1 and 2: each mixer's heads against the attention's, fed the *teacher's* input (paper, section 3.3).

    Layer-local: a layer's loss is propagated as soon as the teacher has passed it and its graph is freed, so that no
    more than one mixer's activations are alive.
    """

    def __init__(self, teacher: Model, student: Model, stage: StageConfig) -> None:
        self.teacher, self.student, self.stage = teacher, student, stage
        self.trained = mixer_parameters(student, stage.train)
        self.mixers = {i: student.mixer(i) for i in student.config.mamba2_layers}
        freeze_all_but(student, self.trained)

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        weights = [token_weights(row.labels, self.stage.prompt_weight, row.real) for row in rows]
        scale = self.stage.loss_scale / (torch.stack([w.sum() for w in weights]).sum() * len(self.mixers))
        total = torch.zeros((), device=self.teacher.device)
        for row, weight in zip(rows, weights, strict=True):

            def observe(index: int, u: Tensor, heads: Tensor, rotation: Rotation) -> None:
                if index not in self.mixers:
                    return
                with torch.enable_grad(), autocast(u.device, precision):
                    predicted, _ = self.mixers[index].heads(u, rotation=rotation, cu_seqlens=row.cu_seqlens)  # noqa: B023
                    loss = heads_error(predicted, heads, weight) * scale  # noqa: B023
                with torch.autocast(u.device.type, enabled=False):
                    loss.backward()
                total.add_(loss.detach())

            with torch.no_grad(), autocast(self.teacher.device, precision):
                self.teacher(**inputs(self.teacher, row), cu_seqlens=row.cu_seqlens, logits="none", observe=observe)
        return {"loss": total}


class MatchLogits:
    """Stage 3: KL(teacher ‖ student) end to end, from hidden states (paper, section 3.3; T = 1, no cross-entropy)."""

    def __init__(self, teacher: Model, student: Model, stage: StageConfig) -> None:
        self.teacher, self.student, self.stage = teacher, student, stage
        self.trained = mixer_parameters(student, stage.train)
        freeze_all_but(student, self.trained)

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        stage = self.stage
        weights = [token_weights(row.labels, stage.prompt_weight, row.real) for row in rows]
        if stage.reduction == "published":
            divisor = torch.tensor(float(sum(row.sequences for row in rows)), device=self.teacher.device)
        else:
            divisor = torch.stack([w.sum() for w in weights]).sum()
        answers = answer_tokens(rows) if stage.supervised else None
        kl = torch.zeros((), device=self.teacher.device)
        ce = torch.zeros((), device=self.teacher.device)
        for row, weight in zip(rows, weights, strict=True):
            with autocast(self.teacher.device, precision):
                with torch.no_grad():
                    given = inputs(self.teacher, row)
                    target = self.teacher(**given, cu_seqlens=row.cu_seqlens, logits="none").hidden
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
    """Teaching from scratch: cross-entropy of the answers' tokens."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.trained = dict(model.named_parameters())

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        answers = answer_tokens(rows)
        total = torch.zeros((), device=self.model.device)
        for row in rows:
            with autocast(self.model.device, precision):
                hidden = self.model(**inputs(self.model, row), cu_seqlens=row.cu_seqlens, logits="none").hidden
                loss = answer_loss(hidden, self.model.head.weight, row.labels, row.scored) / answers
            loss.backward()
            total.add_(loss.detach())
        return {"loss": total}
