"""The depthwise causal convolution as one Triton kernel each way; the twin is ``mmmamba.ops.causal_conv``.

Rows are taken flat: token t of b rows of length l belongs to sequence t // l, and in a packed row to the sequence that
a search in ``cu_seqlens`` finds, so nothing about the sequences is ever read back from the device. A program takes a
tile of tokens × channels; the last programs of a launch serve the states instead, a tile of sequences × channels.

With a rotation a forward program takes *pairs* of channels, the first half of a head and the second: see
``tile_channels``. Backward a channel needs no more of its partner than the gradient that arrives there, and reads it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.causal_conv.backward_kernels import backward_kernel
from mmmamba.ops.causal_conv.forward_kernels import forward_kernel
from mmmamba.ops.causal_conv.shapes import check_shapes
from mmmamba.ops.dispatch import on_device, operator
from mmmamba.ops.sum_kernels import sum_partial

TOKENS, CHANNELS, WARPS = 32, 64, 4  # forward tile
RUNS, RUN, BACKWARD_CHANNELS = 8, 16, 128  # backward tile: runs of tokens, and the tokens of a run
SEQUENCES = 16  # sequences of a tile of states


def _flat(x: Tensor) -> Tensor:
    """(b, l, c) → (b·l, c), channels side by side; a slice of a wider projection stays where it is."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _sizes(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, cos: Tensor | None, silu: bool) -> dict[str, Any]:
    """What both kernels' launches share."""
    b, length, c = x.shape
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return {
        "total": b * length,
        "length": length,
        "rows": rows,
        "steps": rows.bit_length(),
        "C": c,
        "SILU": silu,
        "HALF": 0 if cos is None else cos.shape[-1],
        "K": weight.shape[1],
        "SEQUENCES": SEQUENCES,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
    }


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


@operator("causal_conv")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_from: int,
    silu: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    sizes = _sizes(x, weight, cu_seqlens, cos, silu)
    flat = _flat(x)
    weight, bias, state, cu_seqlens, cos, sin = _dense(weight, bias, initial_state, cu_seqlens, cos, sin)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = sizes["rows"] if return_final_state else 0
    final = x.new_empty(rows, sizes["K"] - 1, x.shape[2])
    blocks = triton.cdiv(sizes["total"], TOKENS)
    programs = blocks + triton.cdiv(rows, SEQUENCES)
    if programs:
        columns = triton.cdiv(x.shape[2] // (2 if sizes["HALF"] else 1), CHANNELS)
        with on_device(x):
            forward_kernel[(programs, columns)](
                flat, weight, bias, state, cu_seqlens, cos, sin, y, final, stride=flat.stride(0), blocks=blocks,
                rotate_from=rotate_from, TOKENS=TOKENS, CHANNELS=CHANNELS, **sizes,
            )  # fmt: skip
    return y, final


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_from: int,
    silu: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    rows = _rows(x, cu_seqlens) if return_final_state else 0
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


@operator("causal_conv_backward")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_from: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(x, weight, cu_seqlens, cos, silu)
    flat, k, c = _flat(x), weight.shape[1], x.shape[2]
    dy, dfinal, weight, bias, state = _dense(dy, dfinal, weight, bias, initial_state)
    cu_seqlens, cos, sin = _dense(cu_seqlens, cos, sin)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = 0 if state is None else sizes["rows"]
    dstate = x.new_empty(rows, k - 1, c, dtype=x.dtype if state is None else state.dtype)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    blocks = triton.cdiv(sizes["total"], RUNS * RUN)
    programs = blocks + triton.cdiv(rows, SEQUENCES)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(blocks, k if bias is None else k + 1, c, dtype=wide)
    columns = triton.cdiv(c, BACKWARD_CHANNELS)
    if programs:
        with on_device(x):
            backward_kernel[(programs * columns,)](
                dy, dfinal, flat, weight, bias, state, cu_seqlens, cos, sin, dx, partial, dstate,
                stride=flat.stride(0), blocks=blocks, columns=columns, rotate_from=rotate_from, RUNS=RUNS, RUN=RUN,
                CHANNELS=BACKWARD_CHANNELS, **sizes,
            )  # fmt: skip
    sum_partial(partial, dweight, dbias)
    return dx, dweight, x.new_empty(0) if dbias is None else dbias, dstate


@_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_from: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, k = weight.shape
    rows = 0 if initial_state is None else _rows(x, cu_seqlens)
    dstate = x.new_empty(rows, k - 1, c, dtype=x.dtype if initial_state is None else initial_state.dtype)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(c)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.rotate_from, ctx.silu, ctx.final = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(dy, dfinal if ctx.final else None, *tensors, ctx.rotate_from, ctx.silu)
    _, _, bias, state, *_ = tensors
    rest = [None] * 6
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, *rest


_forward.register_autograd(_autograd, setup_context=_setup_context)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "silu",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    rotate_from: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """y_t = rotate(activation(bias + sum_j weight[:, j] · x_{t-(k-1)+j})), every product in float32.

    Args:
        x: (b, l, c).  weight: (c, k) with k from 2 to 4.  bias: (c,) or None.
        activation: ``silu`` or ``none``.
        initial_state: (b, k-1, c), or (s, k-1, c) with ``cu_seqlens``: the inputs that precede; zeros when absent.
        cu_seqlens: (s+1,) borders of the sequences in a packed row (then b = 1), from 0 to l and never falling. They
            stay on the device: nothing checks them.
        return_final_state: also return the last k-1 inputs of each sequence.
        rotation: cosines and sines of each token, (b, l, p/2) or (b, l, 1, p/2), for heads of p channels whose first
            half is paired with the second. They get no gradient.
        rotate_from: the first channel that is rotated (v comes before k and q), a multiple of p.

    Returns:
        y (b, l, c) and the final state in x's dtype, or None. Gradients go to x, weight, bias and the initial state;
        two runs give the same bits.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    check_shapes(x, weight, bias, initial_state, cu_seqlens, activation)
    b, length, c = x.shape
    k = weight.shape[1]
    if not 2 <= k <= 4:
        raise ValueError(f"conv: weight has shape {tuple(weight.shape)}, expected ({c}, 2 to 4)")
    cos = sin = None
    if rotation is not None:
        half = rotation[0].shape[-1]
        if c % (2 * half) or rotate_from % (2 * half):
            raise ValueError(f"conv: {c} channels, rotated from {rotate_from}, are not whole heads of {2 * half}")
        if any(t.numel() != b * length * half for t in rotation):
            raise ValueError(f"conv: rotation has shape {tuple(rotation[0].shape)}, expected {(b, length, half)}")
        cos, sin = (t.reshape(b, length, half) for t in rotation)
    y, final = _forward(
        x, weight, bias, initial_state, cu_seqlens, cos, sin, rotate_from, activation == "silu", return_final_state
    )
    return y, final if return_final_state else None
