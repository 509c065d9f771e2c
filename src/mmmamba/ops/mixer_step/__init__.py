"""One token through a recurrent mixer's heads, from the projections to the gated norm; states change in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.mixer_step.reference import mixer_step_torch

__all__ = ["mixer_step", "mixer_step_torch"]


def mixer_step(
    vkq: Tensor,
    gate: Tensor,
    dt_raw: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    slots: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    qk_norm: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    frequencies: Tensor | None = None,
    seed: Tensor | None = None,
    squares: Tensor | None = None,
    beta_raw: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """Take one token of each row of a running batch through conv, rotation, recurrence, norm and gate.

    Args:
        vkq: (b, (h+2g)p) projections v | k | q, in this order.  gate: (b, h·p).  dt_raw: (b, h) before its bias.
        conv_weight: (c, k) with k from 2 to 4, c = (h+2g)p.  conv_bias: (c,) or None.
        dt_bias, A_log: (h,); dt = softplus(dt_raw + dt_bias), A = -exp(A_log).  norm_weight: (p,).
        conv_state: (pool, k-1, c), changed in place.
        ssm_state: (pool, h, p, p) float32 or bfloat16, changed in place. The output is read before it is rounded.
        slots: (b,) int32 or int64, each row's place in the pool, no two the same; row i has place i when absent. A
            negative slot marks a row that only fills the batch: it gives zeros and changes nothing.
        eps: of the per-head RMSNorm.
        activation: of the convolution, ``silu`` or ``none``.
        qk_norm: bring k and q of each head to unit length before the rotation.
        rotation: cosines and sines (b, p/2) that k and q are rotated by.
        positions, frequencies: instead of the rotation, (b,) and (p/2,): the angles are their products.
        seed: (1,) int64 on the device: a bfloat16 ssm_state is rounded stochastically, with other noise for every other
            seed (change it every step, also between the replays of a graph). None rounds to the nearest.
        squares: (b, h, parts) float32 at least, written: each head's sum of squares, in parts that add up to it. Where
            given, the norm's division is left to who reads the heads (``linear_step``), so that no part of a head has
            to wait for the others.
        beta_raw: (b, h) before its sigmoid: the recurrence is the gated delta rule (``ops.gated_delta``) with this
            strength, else the state space recurrence (``ops.ssd``).
        chained: only vkq, gate, dt_raw and beta_raw may come from the kernel launched last; see ``linear_step``.

    Returns:
        the gated heads (b, h·p) in vkq's dtype. With ``squares`` they are not divided by their root mean square, and
        float32 instead of float16, whose range they may leave.

    Raises:
        ValueError: for shapes that do not fit together, or a float16 ssm_state; the message names the tensor.
    """
    parameters: dict[str, Any] = {
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "dt_bias": dt_bias,
        "A_log": A_log,
        "norm_weight": norm_weight,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "slots": slots,
    }
    angles: dict[str, Any] = {"rotation": rotation, "positions": positions, "frequencies": frequencies}
    options: dict[str, Any] = {
        "eps": eps,
        "activation": activation,
        "qk_norm": qk_norm,
        "seed": seed,
        "squares": squares,
        "beta_raw": beta_raw,
    }
    if serves(vkq, gate, dt_raw, beta_raw, *parameters.values(), *(rotation or ()), positions, frequencies):
        from mmmamba.ops.mixer_step.kernels import mixer_step as kernel

        return kernel(vkq, gate, dt_raw, **parameters, **angles, **options, chained=chained)
    return mixer_step_torch(vkq, gate, dt_raw, **parameters, **angles, **options)
