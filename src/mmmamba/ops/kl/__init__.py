"""KL(teacher ‖ student) from hidden states, in chunks of tokens, so that the logits of a whole sequence never exist.

The loss is a scalar: each chunk's gradients are computed with its loss, in the forward pass, and only scaled in the
backward pass. No logits are computed twice, and none are kept.
"""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.kl.reference import chunked_kl_torch

__all__ = ["chunked_kl", "chunked_kl_torch"]


def chunked_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens weight · KL(softmax(teacher/T) ‖ softmax(student/T)) · T² (the paper's stage 3, with T = 1).

    A token of weight 0 costs its logits all the same. A caller that knows which tokens count should leave out the rest.

    Args:
        student_hidden, teacher_hidden: (t, d) hidden states after the final norm.
        student_head, teacher_head: (v, d) output matrices.
        weight: (t,) float; ones when absent.
        temperature: T.
        chunk: tokens whose logits are alive at once (default: 4,096, or what 0.8 GB hold on a GPU).

    Returns:
        a scalar in float32 (float64 for float64 inputs), with gradients to the student's hidden states and head.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    arguments = (student_hidden, student_head, teacher_hidden, teacher_head)
    if serves(*arguments, weight):
        from mmmamba.ops.kl.kernels import chunked_kl as kernel

        return kernel(*arguments, weight=weight, temperature=temperature, chunk=chunk)
    return chunked_kl_torch(*arguments, weight=weight, temperature=temperature, chunk=chunk)
