"""A linear map of one token, with what stands before and behind it: a decoding step is little else.

With a single row a product reads its whole matrix for two operations an element. Whatever else the step does with the
row (norm, bias, residual, SwiGLU) is then free, if it is done in the same launch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.norm import rms_norm
from mmmamba.ops.triton import serves

WIDEST = 16_384  # inputs of a map: a program of the kernel holds whole rows


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """residual + W·rms_norm(x) + bias; with ``swiglu``, SiLU(gate)·up of the two halves of its rows.

    Args:
        x: (b, k).  weight: (n, k).  bias: (n,) or None.
        norm: (k,) weight of the RMSNorm in front, none when absent.  eps: of the norm.
        residual: (b, n) that is added.
        swiglu: ``weight`` holds n/2 rows of the gate, then n/2 of the other half; there is no residual then.

    Returns:
        (b, n), or (b, n/2) with ``swiglu``.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    (b, k), n = x.shape, weight.shape[0]
    expected = {
        "weight": (weight, (n, k)),
        "bias": (bias, (n,)),
        "norm": (norm, (k,)),
        "residual": (residual, (b, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"linear_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if swiglu and (n % 2 or residual is not None):
        raise ValueError("linear_step: swiglu needs an even number of rows and no residual")
    # From two rows on, the library's products are as good.
    if b == 1 and k <= WIDEST and x.is_cuda and x.dtype == weight.dtype and serves(x, weight, bias, norm, residual):
        from mmmamba.ops.triton.linear import linear_step as kernel

        return kernel(x, weight, bias, norm=norm, eps=eps, residual=residual, swiglu=swiglu)
    return linear_step_torch(x, weight, bias, norm=norm, eps=eps, residual=residual, swiglu=swiglu)


def linear_step_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """The same in PyTorch's operators, for any number of rows. Same contract as :func:`linear_step`."""
    y = F.linear(x if norm is None else rms_norm(x, norm, eps), weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y if residual is None else residual + y
