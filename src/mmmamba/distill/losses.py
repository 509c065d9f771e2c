"""The three stages' losses: per-token means over weights (or the published sums, for the golden tests)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.errors import UserError
from mmmamba.model.plain import plain
from mmmamba.model.recompute import recomputed
from mmmamba.ops import chunked_kl, squared_error
from mmmamba.ops.kl.top_k import top_k_kl
from mmmamba.ops.kl.tuning import CHUNK


def token_weights(labels: Tensor, prompt_weight: float, real: Tensor | None = None) -> Tensor:
    """Weight of each position's prediction, (b, l): 1 where the *next* token is scored, ``prompt_weight`` elsewhere.

    ``labels`` (b, l) are unshifted, -100 where nothing is scored. In a packed row a sequence's first token is never
    scored, so nothing reaches across a border. Tokens from the ``real``-th on are padding, of weight 0.
    """
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != -100
    weights = torch.where(scored, 1.0, prompt_weight).to(torch.float32)
    if real is None:
        return weights
    return torch.where(torch.arange(labels.shape[1], device=labels.device) < real, weights, 0.0)


def heads_error(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight · mean over heads and head dim of (predicted - target)²: stages 1 and 2.

    predicted, target: (b, l, h, p), the heads' outputs before W_o; weights (b, l).
    """
    return squared_error(predicted.flatten(-2).flatten(0, 1), target.flatten(-2).flatten(0, 1), weights.flatten())


def divergence(
    student_hidden: Tensor,
    student_head: nn.Module,
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    weights: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over tokens of weight · KL(teacher ‖ student): stage 3. Hidden states (b, l, d), weights (b, l).

    The heads' matrices are read, so that the logits of a whole row never exist. A head that has to be called (an
    adapter, say) is called a chunk of tokens at a time, and again in the backward pass.
    """
    student, teacher, flat = student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), weights.flatten()
    if plain(nn.Linear, student_head, teacher_head):
        heads: list[Tensor] = [student_head.weight, teacher_head.weight]  # type: ignore[list-item]
        return chunked_kl(student, heads[0], teacher, heads[1], weight=flat, temperature=temperature)

    def part(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        ours, theirs = (
            F.log_softmax(head(hidden).to(wide) / temperature, dim=-1)
            for head, hidden in ((student_head, student), (teacher_head, teacher))
        )
        return (F.kl_div(ours, theirs.detach(), reduction="none", log_target=True).sum(-1) * weight).sum()

    parts = zip(student.split(CHUNK), teacher.split(CHUNK), flat.split(CHUNK), strict=True)
    return torch.stack([recomputed(part, *one) for one in parts]).sum() * temperature**2


def top_k_divergence(
    student_hidden: Tensor,
    student_head: nn.Module,
    ids: Tensor,
    log_probs: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The same where the teacher is known by its most likely tokens: ids (1, l, k), log-probabilities (1, l, k+1).

    Raises:
        UserError: when the head has to be called (an adapter, say): its matrix is read.
    """
    if not plain(nn.Linear, student_head):
        raise UserError("cache_teacher reads the matrix of the student's head, which is wrapped or hooked")
    weight: Tensor = student_head.weight  # type: ignore[assignment]
    flat = weights.flatten()
    return top_k_kl(student_hidden[0], weight, ids[0].long(), log_probs[0], weight=flat, temperature=temperature)


def answer_loss(hidden: Tensor, head: nn.Module, labels: Tensor, scored: Tensor) -> Tensor:
    """Summed cross-entropy of the scored tokens of a packed row; logits exist only where something is scored.

    hidden (1, l, d) after the final norm, head d → v, labels (1, l) unshifted with -100 unscored, scored (k,) the
    tokens whose next one is scored; one whose next is not counts nothing. Of more than :data:`CHUNK` of them the logits
    are made a chunk at a time, and again in the backward pass.
    """

    def part(hidden: Tensor, scored: Tensor) -> Tensor:
        logits = head(hidden[0].index_select(0, scored))
        targets = labels[0].index_select(0, scored + 1)
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")

    parts = scored.split(CHUNK)
    if len(parts) == 1:
        return part(hidden, scored)
    return torch.stack([recomputed(part, hidden, one) for one in parts]).sum()
