"""KL(teacher ‖ student) where the teacher is known by its most likely tokens alone.

The teacher's distribution is given as k tokens with their log-probabilities, and one more: that of all other tokens
together. The loss is the KL between these k + 1 outcomes. By the data processing inequality it is at most the KL of the
whole distributions; what it misses is how the teacher ranks the tokens that it finds unlikely.

With q the student's probabilities, p the teacher's, r the rest::

    loss = sum_k p_k (log p_k - log q_k) + p_r (log p_r - log q_r),      q_r = sum of q over the other tokens
    d loss / d z_j = q_j - p_j                  for one of the k tokens
                   = q_j - p_r q_j / q_r        for another
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmamba.ops.kl.tuning import CHUNK

LEAST = -30_000.0  # of a log-probability


def top_k(hidden: Tensor, head: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a distribution's most likely tokens: ids (t, k) int64 and log-probabilities (t, k+1), the rest's last.

    Args:
        hidden: (t, d) hidden states after the final norm.
        head: (v, d) output matrix, v > k.
        k: how many tokens.
        temperature: what the logits are divided by.
    """
    found = [_top_k(part @ head.T, k, temperature) for part in hidden.split(CHUNK)]
    if not found:
        return hidden.new_zeros(0, k, dtype=torch.long), hidden.new_zeros(0, k + 1, dtype=torch.float32)
    ids, log_probs = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(log_probs)


def _top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    z = logits.to(_wide(logits)) / temperature
    total = z.logsumexp(-1, keepdim=True)
    best, ids = z.topk(k, dim=-1)
    rest = z.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    # No -inf, which times a probability of 0 is not 0; float16 holds it.
    return ids, (torch.cat([best, rest], -1) - total).clamp(min=LEAST)


class _TopKKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        log_probs: Tensor,
        weight: Tensor,
        temperature: float,
        chunk: int,
        train: tuple[bool, bool],
    ) -> Tensor:
        loss = weight.new_zeros((), dtype=_wide(hidden))
        to_hidden = torch.empty_like(hidden) if train[0] else None
        to_head = torch.zeros_like(head) if train[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ head.T
            z = logits.to(loss.dtype) / temperature
            top, given = ids[part], log_probs[part].to(loss.dtype)
            given = given - given.logsumexp(-1, keepdim=True)  # what was stored was rounded
            others = z.scatter(-1, top, -torch.inf)
            best, rest = z.gather(-1, top), others.logsumexp(-1, keepdim=True)
            total = z.logsumexp(-1, keepdim=True)
            p = given.exp()
            loss += ((p * (given - torch.cat([best, rest], -1) + total)).sum(-1) * weight[part]).sum() * temperature**2
            if any(train):
                share = (z - total).exp_() - p[:, -1:] * (others - rest).exp_()
                share = share.scatter_add(-1, top, -p[:, :-1])
                gradient = (share * (weight[part] * temperature)[:, None]).to(logits.dtype)
                if to_hidden is not None:
                    to_hidden[part] = gradient @ head
                if to_head is not None:
                    to_head += gradient.T @ hidden[part]
        ctx.save_for_backward(to_hidden, to_head)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else gradient * grad for gradient in ctx.saved_tensors]
        return *scaled, *(None,) * 6


def top_k_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of weight · KL(teacher ‖ student) over k + 1 outcomes · T².

    Args:
        student_hidden: (t, d) hidden states after the final norm.
        student_head: (v, d) output matrix.
        ids: (t, k) int64, the teacher's most likely tokens, no two of a row the same.
        log_probs: (t, k+1) their log-probabilities at temperature T, and that of all other tokens together.
        weight: (t,) float; ones when absent.
        temperature: T.
        chunk: tokens whose logits are alive at once.

    Returns:
        a scalar in float32 (float64 for float64 inputs), with gradients to the student's hidden states and head.
    """
    if weight is None:
        weight = student_hidden.new_ones(student_hidden.shape[0], dtype=torch.float32)
    learning = torch.is_grad_enabled()
    train = (learning and student_hidden.requires_grad, learning and student_head.requires_grad)
    loss: Tensor = _TopKKL.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_head, ids, log_probs, weight, temperature, chunk or CHUNK, train
    )
    return loss


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
