"""The three stages' losses: per-token means over weights (or the published sums, for the golden tests)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmmamba.ops import chunked_kl, squared_error
from mmmamba.ops.kl import CHUNK


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
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over tokens of weight · KL(teacher ‖ student): stage 3. Hidden states (b, l, d), weights (b, l)."""
    return chunked_kl(
        student_hidden.flatten(0, 1),
        student_head,
        teacher_hidden.flatten(0, 1),
        teacher_head,
        weight=weights.flatten(),
        temperature=temperature,
    )


def answer_loss(hidden: Tensor, head: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    """Summed cross-entropy of the scored tokens of a packed row; logits exist only where something is scored.

    hidden (1, l, d) behind the final norm, head (v, d), labels (1, l) unshifted with -100 unscored, scored (k,) the
    tokens whose next one is scored; one whose next is not counts nothing. Of more than :data:`CHUNK` of them the logits
    are made a chunk at a time, and again in the backward pass.
    """
    parts = scored.split(CHUNK)
    if len(parts) == 1:
        return _answers(hidden, head, labels, scored)
    return torch.stack([
        checkpoint(_answers, hidden, head, labels, part, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]).sum()  # fmt: skip


def _answers(hidden: Tensor, head: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    logits = F.linear(hidden[0].index_select(0, scored), head)
    return F.cross_entropy(logits.float(), labels[0].index_select(0, scored + 1), ignore_index=-100, reduction="sum")
