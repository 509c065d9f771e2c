"""Softmax attention over some of the keys, with what it takes to merge it with attention over the others.

Keys may be attended in parts: a part's output and the log-sum-exp of its scores are all that the whole needs of it. So
new tokens that follow a cache need no mask: they attend to all of the cache, and causally among themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

# Pairs of a query and a key from which cuDNN's attention is taken. On Hopper it needs little more than half of flash's
# time, but a plan is made for each new shape, which a short row would not pay back.
LONG = 1 << 26


class Part(NamedTuple):
    """Attention over a part of the keys: outputs (b, l, h, p), and log-sum-exps of the scores (b, h, l)."""

    y: Tensor
    lse: Tensor


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both parts, which have none in common: in the log-sum-exps' dtype, given in y's."""
    share = (one.lse - other.lse).sigmoid().transpose(1, 2)[..., None]  # of all weight: (b, l, h, 1)
    y = torch.lerp(other.y.to(share.dtype), one.y.to(share.dtype), share)
    return Part(y.to(one.y.dtype), torch.logaddexp(one.lse, other.lse))


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Part | None:
    """The fastest fused attention that there is for these tensors; None where there is none (use another then).

    The output has gradients, the log-sum-exp has none: what is merged is for inference.

    Args:
        q: (b, l, h, p).  k, v: (b, m, g, p); group j serves heads j·h/g … (j+1)·h/g-1.
        causal: query i sees keys 0 … i only (l = m then); else all.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        return None
    long = q.shape[1] * k.shape[1] >= LONG
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    params = SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    if long and _prefers_cudnn(q.device) and can_use_cudnn_attention(params):
        y, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    elif can_use_flash_attention(params):
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    else:
        return None
    return Part(y.transpose(1, 2), lse.reshape(q.shape[:3]))


def attend_torch(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Part:
    """The same by its definition, for any device and dtype. Contract as :func:`attend` has it."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("blhp,bmhp->bhlm", q, k) * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    lse = scores.logsumexp(-1)
    return Part(torch.einsum("bhlm,bmhp->blhp", (scores - lse[..., None]).exp(), v), lse)


def _prefers_cudnn(device: torch.device) -> bool:
    """Hopper and later, where cuDNN's attention is made for the hardware and flash's is not."""
    return torch.cuda.get_device_capability(device)[0] >= 9
