"""Which shapes fit together in a call of the KL."""

from __future__ import annotations

from torch import Tensor


def check_shapes(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weight: Tensor | None
) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    (tokens, width), size = student_hidden.shape, student_head.shape[0]
    expected = {
        "student_head": (student_head, (size, width)),
        "teacher_hidden": (teacher_hidden, (tokens, teacher_head.shape[1])),
        "teacher_head": (teacher_head, (size, teacher_head.shape[1])),
        "weight": (weight, (tokens,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"chunked_kl: {name} has shape {tuple(tensor.shape)}, expected {shape}")
