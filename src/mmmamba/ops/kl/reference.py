"""The KL in PyTorch's operators, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.kl.shapes import check_shapes
from mmmamba.ops.kl.tuning import CHUNK


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        weight: Tensor,
        temperature: float,
        chunk: int,
        train: tuple[bool, bool],
    ) -> Tensor:
        wide = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        loss = weight.new_zeros((), dtype=wide)
        to_hidden = torch.empty_like(student_hidden) if train[0] else None
        to_head = torch.zeros_like(student_head) if train[1] else None
        for start in range(0, student_hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = student_hidden[part] @ student_head.T
            dtype = logits.dtype
            student = F.log_softmax(logits.to(wide) / temperature, dim=-1)
            teacher = F.log_softmax((teacher_hidden[part] @ teacher_head.T).to(wide) / temperature, dim=-1)
            p = teacher.exp()
            loss += ((p * (teacher - student)).sum(-1) * weight[part]).sum() * temperature**2
            if any(train):
                gradient = ((student.exp_() - p) * (weight[part] * temperature)[:, None]).to(dtype)
                if to_hidden is not None:
                    to_hidden[part] = gradient @ student_head
                if to_head is not None:
                    to_head += gradient.T @ student_hidden[part]
        ctx.save_for_backward(to_hidden, to_head)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else gradient * grad for gradient in ctx.saved_tensors]
        return *scaled, *(None,) * 6


def chunked_kl_torch(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`chunked_kl`."""
    check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, weight)
    if weight is None:
        weight = student_hidden.new_ones(student_hidden.shape[0], dtype=torch.float32)
    train = (
        torch.is_grad_enabled() and student_hidden.requires_grad,
        torch.is_grad_enabled() and student_head.requires_grad,
    )
    loss: Tensor = _ChunkedKL.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_head, teacher_hidden, teacher_head, weight, temperature, chunk or CHUNK, train
    )
    return loss
