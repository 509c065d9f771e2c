"""KL(teacher ‖ student) from hidden states, in chunks of tokens, so that the logits of a whole sequence never exist."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _kl_sum(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    temperature: float,
) -> Tensor:
    wide = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    student = F.log_softmax((student_hidden @ student_head.T).to(wide) / temperature, dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax((teacher_hidden @ teacher_head.T).to(wide) / temperature, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    return (divergence * weight).sum() * temperature**2


def chunked_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 4096,
) -> Tensor:
    """Sum over tokens of weight · KL(softmax(teacher/T) ‖ softmax(student/T)) · T² (paper stage 3; T = 1 there).

    Args:
        student_hidden, teacher_hidden: (t, d) hidden states behind the final norm.
        student_head, teacher_head: (v, d) output matrices.
        weight: (t,) float, 0 leaves a token out; ones when absent.
        temperature: T.
        chunk: tokens whose logits are alive at once (recomputed in the backward pass).

    Returns:
        a scalar in float32 (float64 for float64 inputs), with gradients to the student's hidden states and head.
    """
    if weight is None:
        weight = student_hidden.new_ones(student_hidden.shape[0], dtype=torch.float32)
    else:  # tokens that do not count need no logits
        rows = weight.nonzero()[:, 0]
        if rows.numel() < weight.numel():
            student_hidden, teacher_hidden, weight = student_hidden[rows], teacher_hidden[rows], weight[rows]
    pieces = []
    for start in range(0, student_hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        args = (student_hidden[part], student_head, teacher_hidden[part], teacher_head, weight[part], temperature)
        alone = student_hidden.shape[0] <= chunk
        pieces.append(_kl_sum(*args) if alone else checkpoint(_kl_sum, *args, use_reentrant=False))
    if not pieces:
        return student_hidden.sum() * 0.0
    return torch.stack(pieces).sum()
