"""Which shapes and formats fit together in one step of a mixer's heads."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(
    vkq: Tensor,
    gate: Tensor,
    dt_raw: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    squares: Tensor | None,
    activation: str,
    beta_raw: Tensor | None = None,
) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    b, h, p = vkq.shape[0], A_log.shape[0], norm_weight.shape[0]
    c, k, pool = vkq.shape[1], conv_weight.shape[-1], ssm_state.shape[0]
    g = (c // p - h) // 2
    if g < 1 or h % g or c != (h + 2 * g) * p:
        raise ValueError(f"mixer_step: vkq has {c} channels, which {h} heads of {p} and their groups do not make up")
    expected = {
        "gate": (gate, (b, h * p)),
        "dt_raw": (dt_raw, (b, h)),
        "beta_raw": (beta_raw, (b, h)),
        "conv_weight": (conv_weight, (c, k)),
        "conv_bias": (conv_bias, (c,)),
        "dt_bias": (dt_bias, (h,)),
        "conv_state": (conv_state, (pool, k - 1, c)),
        "ssm_state": (ssm_state, (pool, h, p, p)),
        "slots": (slots, (b,)),
        "positions": (positions, (b,)),
        "frequencies": (frequencies, (p // 2,)),
        "squares": (squares, (b, h, 0 if squares is None else squares.shape[-1])),
        **{f"rotation[{i}]": (t, (b, p // 2)) for i, t in enumerate(rotation or ())},
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"mixer_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not 2 <= k <= 4:
        raise ValueError(f"mixer_step: conv_weight has a kernel of {k}, expected 2 to 4")
    if slots is None and pool < b:
        raise ValueError(f"mixer_step: {b} rows and no slots, but ssm_state holds {pool}")
    if (positions is None) != (frequencies is None) or (positions is not None and rotation is not None):
        raise ValueError("mixer_step: give rotation, or positions and frequencies, or none of them")
    if squares is not None and squares.dtype != torch.promote_types(torch.float32, vkq.dtype):
        raise ValueError(f"mixer_step: squares is {str(squares.dtype)[6:]}, sums of squares need float32 at least")
    if ssm_state.dtype == torch.float16:
        raise ValueError("mixer_step: ssm_state is float16, whose range a state can leave; give float32 or bfloat16")
    if activation not in ("silu", "none"):
        raise ValueError(f"conv activation must be 'silu' or 'none', got {activation!r}")


def heads_dtype(vkq: Tensor, squares: Tensor | None) -> torch.dtype:
    """The format in which :func:`mixer_step` gives the heads."""
    return torch.float32 if squares is not None and vkq.dtype == torch.float16 else vkq.dtype
