"""KL(teacher ‖ student) from hidden states, with its gradients, a chunk of tokens at a time.

The matrix products are PyTorch's. Between them one kernel reads a chunk of both logits twice: once for the two
log-sum-exps, once for the divergence and its gradient to the student's logits, which takes their place in memory. The
loss is a scalar, so the gradients are computed in the forward pass and only scaled in the backward pass: no logits
are made twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.autocast import compute_dtype
from mmmamba.ops.dispatch import on_device, operator
from mmmamba.ops.kl.shapes import check_shapes
from mmmamba.ops.kl.tuning import BLOCK, MEMORY, ROWS

WARPS = 8
ALIGNED = 8  # products whose vocabulary is no multiple of it run at a sixth of the speed (cuBLAS on an H100)


@triton.jit
def _kl_kernel(
    student, teacher, weight, loss, size, stride, scale, temperature, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of logits: loss = weight · KL · T², and the student's logits become its gradient to them.

    Rows are ``stride`` apart, a multiple of BLOCK, so that no access needs a mask (one that ends at an odd vocabulary
    would keep them from being wide); what lies between ``size`` and the stride is never used. scale = log2(e)/T.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    student += row * stride
    teacher += row * stride

    # Each lane keeps a maximum and a sum of its own. One of the two exponents of an online sum is always 0.
    top_s = tl.full([BLOCK], -3.0e38, tl.float32)
    top_t = tl.full([BLOCK], -3.0e38, tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + cols < size
        s = tl.where(inside, tl.load(student + start + cols).to(tl.float32), float("-inf"))
        t = tl.where(inside, tl.load(teacher + start + cols).to(tl.float32), float("-inf"))
        e_s = tl.exp2(-tl.abs(s - top_s) * scale)
        e_t = tl.exp2(-tl.abs(t - top_t) * scale)
        sum_s = tl.where(s > top_s, sum_s * e_s + 1.0, sum_s + e_s)
        sum_t = tl.where(t > top_t, sum_t * e_t + 1.0, sum_t + e_t)
        top_s = tl.maximum(s, top_s)
        top_t = tl.maximum(t, top_t)
    max_s = tl.max(top_s, 0)
    max_t = tl.max(top_t, 0)
    log_s = tl.log2(tl.sum(sum_s * tl.exp2((top_s - max_s) * scale), 0))
    log_t = tl.log2(tl.sum(sum_t * tl.exp2((top_t - max_t) * scale), 0))

    # KL as the sum of p·log(p/q) + q - p: no term is negative, and what rounding does to the log-sum-exps cancels.
    ln2: tl.constexpr = 0.6931471805599453
    w = tl.load(weight + row)
    divergence = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        s = tl.load(student + start + cols).to(tl.float32)
        t = tl.load(teacher + start + cols).to(tl.float32)
        log_q = (s - max_s) * scale - log_s  # base 2
        log_p = (t - max_t) * scale - log_t
        p = tl.exp2(log_p)
        excess = tl.exp2(log_q) - p
        divergence += tl.where(start + cols < size, p * (log_p - log_q) * ln2 + excess, 0.0)
        if GRADIENT:
            gradient = tl.where(w == 0.0, 0.0, excess * (w * temperature))
            tl.store(student + start + cols, gradient.to(student.dtype.element_ty))
    kl = tl.sum(divergence, 0) * (temperature * temperature)
    tl.store(loss + row, tl.where(w == 0.0, 0.0, w * kl))


def _stride(size: int) -> int:
    """What lies between two rows of logits: the vocabulary, rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _chunk(tokens: int, head: Tensor, train_head: bool) -> int:
    """Tokens a chunk: as many as :data:`MEMORY` holds, spread evenly, in whole tiles."""
    room = MEMORY - (head.numel() * head.itemsize if train_head else 0)
    row = 2 * _stride(head.shape[0]) * head.itemsize
    most = max(room // (row * ROWS), 1) * ROWS
    chunks = -(-tokens // most)
    return -(-tokens // (chunks * ROWS)) * ROWS


def _parts(size: int) -> list[slice]:
    """The vocabulary, cut where the last few entries would keep all products from the fast path."""
    aligned = size - size % ALIGNED
    return [part for part in (slice(0, aligned), slice(aligned, size)) if part.start < part.stop]


@operator("kl")
def _kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    temperature: float,
    chunk: int,
    train_hidden: bool,
    train_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), its gradient to the student's hidden states and to its head; empty ones where not wanted."""
    (tokens, _), size = student_hidden.shape, student_head.shape[0]
    stride = _stride(size)
    student_rows, teacher_rows = student_hidden.new_empty(2, min(chunk, tokens), stride).unbind(0)
    losses = weight.new_empty(tokens)
    to_hidden = torch.empty_like(student_hidden if train_hidden else student_hidden[:0])
    to_head = torch.empty_like(student_head if train_head else student_head[:0])
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        rows = part.stop - start
        logits = student_rows[:rows, :size]
        for words in _parts(size):
            torch.mm(student_hidden[part], student_head[words].T, out=logits[:, words])
            torch.mm(teacher_hidden[part], teacher_head[words].T, out=teacher_rows[:rows, words])
        with on_device(logits):
            _kl_kernel[(rows,)](
                student_rows,
                teacher_rows,
                weight[part],
                losses[part],
                size,
                stride,
                math.log2(math.e) / temperature,
                temperature,
                GRADIENT=train_hidden or train_head,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        for words in _parts(size):
            if train_hidden:
                to_hidden[part].addmm_(logits[:, words], student_head[words], beta=min(words.start, 1))
            if train_head:
                to_head[words].addmm_(logits[:, words].T, student_hidden[part], beta=min(start, 1))
    return losses.sum(), to_hidden, to_head


@_kl.register_fake
def _(student_hidden, student_head, teacher_hidden, teacher_head, weight, temperature, chunk, train_hidden, train_head):
    return (
        weight.new_empty(()),
        torch.empty_like(student_hidden if train_hidden else student_hidden[:0]),
        torch.empty_like(student_head if train_head else student_head[:0]),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)  # or zeros of the head's size would be made for outputs that nothing reads
    ctx.train_hidden, ctx.train_head = inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    to_hidden, to_head = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    return to_hidden * grad if ctx.train_hidden else None, to_head * grad if ctx.train_head else None, *(None,) * 7


_kl.register_autograd(_scale, setup_context=_keep)


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
    """Sum over tokens of weight · KL(softmax(teacher/T) ‖ softmax(student/T)) · T², as ``mmmamba.ops.chunked_kl``.

    Statistics, divergence and sum are in float32; the logits and their gradients are rounded to the dtype of the
    products (autocast's, else the student's hidden states'). A token of weight 0 costs its products all the same: what
    knows on the host which tokens count leaves the others out.

    Args:
        student_hidden, teacher_hidden: (t, d) hidden states after the final norm; the teacher's d may differ.
        student_head, teacher_head: (v, d) output matrices.
        weight: (t,) float; ones when absent.
        temperature: T.
        chunk: tokens whose logits are alive at once; by default what 0.8 GB hold.

    Returns:
        a float32 scalar, with gradients to the student's hidden states and, if it requires one, its head.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, weight)
    tokens = len(student_hidden)
    if not tokens:
        return student_hidden.float().sum()
    if weight is None:
        weight = torch.ones(tokens, device=student_hidden.device)
    train_hidden, train_head = (torch.is_grad_enabled() and t.requires_grad for t in (student_hidden, student_head))
    dtype = compute_dtype(student_hidden)
    head = student_head.to(dtype)
    loss, _, _ = _kl(
        student_hidden.to(dtype),
        head,
        teacher_hidden.detach().to(dtype),
        teacher_head.detach().to(dtype),
        weight.detach().float().contiguous(),
        temperature,
        chunk or _chunk(tokens, head, train_head),
        train_hidden,
        train_head,
    )
    return loss
