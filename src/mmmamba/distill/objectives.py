"""What a training step minimises: each objective runs its passes over a step's rows and leaves gradients behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import UNSCORED
from mmmamba.data.tiling import normalise
from mmmamba.distill import processes
from mmmamba.distill.losses import answer_loss, divergence, heads_error, token_weights, top_k_divergence
from mmmamba.distill.parameters import EMBEDDINGS, parameters_of, rules_of
from mmmamba.distill.train_config import StageConfig
from mmmamba.model.layer import Layer
from mmmamba.model.mixers import Part
from mmmamba.model.model import Model, compile_layers
from mmmamba.model.rope import Rotation


class Objective(ABC):
    """One way to train: the parameters that move, and a pass that leaves a row's part of their gradients.

    Attributes:
        trained: what moves, by full name.
        rules: how optimizers treat it, by full name.
        device: where the passes run.
        losses: the names of what a pass returns.
    """

    trained: dict[str, nn.Parameter]
    rules: dict[str, Part]
    device: torch.device
    losses: tuple[str, ...] = ("loss",)

    @abstractmethod
    def divisors(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        """What the losses of a step's rows are divided by: scalars on the device, counted over all processes' rows."""

    @abstractmethod
    def pass_row(self, row: Batch, divisors: Mapping[str, Tensor], precision: torch.dtype) -> dict[str, Tensor]:
        """Add a row's part of the step's gradients; its part of each loss, detached.

        Nothing of it waits for the device, so that it can be captured as a CUDA graph.
        """

    def nothing(self) -> dict[str, Tensor]:
        """The losses of no row."""
        return {name: torch.zeros((), device=self.device) for name in self.losses}

    def backward(self, rows: Sequence[Batch], precision: torch.dtype) -> dict[str, Tensor]:
        """Add the gradients of a step; its losses, detached.

        Of several processes each does so for the rows it has, if any, and divides by what all of them count: their
        gradients and losses are to be summed.
        """
        divisors, losses = self.divisors(rows), self.nothing()
        for row in rows:
            for name, part in self.pass_row(row, divisors, precision).items():
                losses[name] += part
        return losses


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
    for layer in student.layers:
        cast(Layer, layer).recompute = stage.recompute
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
    own = torch.stack(list(parts)).sum().float() if parts else torch.zeros((), device=device)
    if device.type == "cuda":  # from pinned memory, so that the host does not wait for the GPU
        own = (own if own.is_cuda else own.pin_memory()).to(device, non_blocking=True)
    return processes.total(own)


def answer_tokens(rows: Sequence[Batch], device: torch.device) -> Tensor:
    """How many tokens of the rows of all processes are scored, at least 1."""
    return total([(row.labels[:, 1:] != UNSCORED).sum() for row in rows], device).clamp(min=1)


class AlignHeads(Objective):
    """Stages 1 and 2: each mixer's heads against the attention's, fed the *teacher's* input (paper, section 3.3).

    Layer-local: a layer's loss is propagated as soon as the teacher has passed it and its graph is freed, so that no
    more than one mixer's activations are alive.
    """

    def __init__(self, teacher: Model, student: Model, stage: StageConfig) -> None:
        self.teacher, self.student, self.stage, self.device = teacher, student, stage, teacher.device
        self.trained = parameters_of(student, stage.train)
        self.rules = rules_of(self.trained, student.config)
        self.mixers = {i: student.mixer(i) for i in student.config.new_layers}
        freeze_all_but(student, self.trained)
        if stage.compile:
            compile_layers(teacher)

    def divisors(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        weights = [token_weights(row.labels, self.stage.prompt_weight, row.real).sum() for row in rows]
        return {"weight": total(weights, self.device)}

    def pass_row(self, row: Batch, divisors: Mapping[str, Tensor], precision: torch.dtype) -> dict[str, Tensor]:
        weight = token_weights(row.labels, self.stage.prompt_weight, row.real)
        scale = self.stage.loss_scale / (divisors["weight"] * len(self.mixers))
        error = torch.zeros((), device=self.device)

        def observe(index: int, u: Tensor, heads: Tensor, rotation: Rotation) -> None:
            if index not in self.mixers:
                return
            with torch.enable_grad(), autocast(u.device, precision):
                predicted, _ = self.mixers[index].heads(u, rotation=rotation, cu_seqlens=row.cu_seqlens)
                loss = heads_error(predicted, heads, weight) * scale
            with torch.autocast(u.device.type, enabled=False):
                loss.backward()
            error.add_(loss.detach())

        with torch.no_grad(), autocast(self.device, precision):
            self.teacher(**inputs(self.teacher, row), cu_seqlens=row.cu_seqlens, logits="none", observe=observe)
        return {"loss": error}


class MatchLogits(Objective):
    """Stage 3: KL(teacher ‖ student) end to end, from hidden states (paper, section 3.3; T = 1, no cross-entropy).

    The teacher does not pass a row that brings its most likely tokens (:mod:`mmmamba.distill.teacher_cache`).
    """

    def __init__(self, teacher: Model, student: Model, stage: StageConfig) -> None:
        self.teacher, self.student, self.stage, self.device = teacher, student, stage, teacher.device
        self.trained = end_to_end(student, stage)
        self.rules = rules_of(self.trained, student.config)
        self.losses = ("loss", "ce") if stage.supervised else ("loss",)
        self.embeds = any(getattr(student, part) is not getattr(teacher, part) for part in EMBEDDINGS)
        if stage.compile:
            compile_layers(teacher)

    def divisors(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        stage = self.stage
        if stage.reduction == "published":
            counts = [torch.tensor(float(row.sequences)) for row in rows]
        else:
            counts = [token_weights(row.labels, stage.prompt_weight, row.real).sum() for row in rows]
        found = {"kl": total(counts, self.device)}
        return {**found, "answers": answer_tokens(rows, self.device)} if stage.supervised else found

    def pass_row(self, row: Batch, divisors: Mapping[str, Tensor], precision: torch.dtype) -> dict[str, Tensor]:
        stage = self.stage
        weight = token_weights(row.labels, stage.prompt_weight, row.real)
        # With a prompt weight of 0 only the answers' tokens need logits.
        kept = slice(None) if stage.prompt_weight else row.scored
        with autocast(self.device, precision):
            if row.top_ids is None:
                with torch.no_grad():
                    given = inputs(self.teacher, row)
                    target = self.teacher(**given, cu_seqlens=row.cu_seqlens, logits="none").hidden
            if self.embeds or row.top_ids is not None:
                given = inputs(self.student, row)
            hidden = self.student(**given, cu_seqlens=row.cu_seqlens, logits="none").hidden
            ours = (hidden[:, kept], self.student.head)
            if row.top_ids is None or row.top_log_probs is None:
                kl = divergence(*ours, target[:, kept], self.teacher.head, weight[:, kept], stage.temperature)
            else:
                theirs = (row.top_ids, row.top_log_probs)
                kl = top_k_divergence(*ours, *theirs, weight[:, kept], stage.temperature)
            loss = kl / divisors["kl"] * stage.loss_scale
            found = {}
            if stage.supervised:
                answers = answer_loss(hidden, self.student.head, row.labels, row.scored) / divisors["answers"]
                loss = loss + stage.supervised * answers
                found["ce"] = answers.detach()
        loss.backward()
        return {"loss": loss.detach(), **found}


class PredictAnswers(Objective):
    """Cross-entropy of the answers' tokens: teaching from scratch, and stage 4.

    Args:
        model: what is trained, all of it without a ``stage``.
        stage: what moves, and how.
    """

    def __init__(self, model: Model, stage: StageConfig | None = None) -> None:
        self.model, self.device = model, model.device
        self.trained = dict(model.named_parameters()) if stage is None else end_to_end(model, stage)
        self.rules = rules_of(self.trained, model.config)
        self.scale = 1.0 if stage is None else stage.loss_scale

    def divisors(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        return {"answers": answer_tokens(rows, self.device)}

    def pass_row(self, row: Batch, divisors: Mapping[str, Tensor], precision: torch.dtype) -> dict[str, Tensor]:
        with autocast(self.device, precision):
            hidden = self.model(**inputs(self.model, row), cu_seqlens=row.cu_seqlens, logits="none").hidden
            answers = answer_loss(hidden, self.model.head, row.labels, row.scored)
            loss = answers * self.scale / divisors["answers"]
        loss.backward()
        return {"loss": loss.detach()}
