"""Which shapes and options fit together in a linear step."""

from __future__ import annotations

from torch import Tensor


def check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    squares: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    (b, k), n = x.shape, weight.shape[0]
    expected = {
        "weight": (weight, (n, k)),
        "bias": (bias, (n,)),
        "scale": (scale, (n,)),
        "norm": (norm, (k,)),
        "residual": (residual, (b, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"linear_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if squares is not None:
        heads = squares.shape[1]
        if squares.ndim != 3 or len(squares) != b or not heads or k % heads:
            raise ValueError(f"linear_step: squares has shape {tuple(squares.shape)}, x {(b, k)}")
        if norm is not None or residual is None:
            raise ValueError("linear_step: squares replace the norm, and need a residual")
    if swiglu and (n % 2 or residual is not None):
        raise ValueError("linear_step: swiglu needs an even number of rows and no residual")
    if (scale is None) != weight.is_floating_point():
        raise ValueError(f"linear_step: weight is {str(weight.dtype)[6:]}, a scale belongs to int8 weights only")
