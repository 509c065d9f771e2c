"""How the kernels of a recurrence are held against its reference: results, gradients, and how far off they are."""

from __future__ import annotations

import torch

WIDE = torch.float64


def everything(function, args, state, cu, dtype=WIDE, device="cpu", *, narrow, **options):
    """y, the final state, and all gradients of a random function of both.

    The arguments at the places ``narrow`` are in ``dtype``, the rest in float32 (float64 where ``dtype`` is that).
    """
    rest = WIDE if dtype == WIDE else torch.float32
    leaves = [t.to(device, dtype if i in narrow else rest).requires_grad_() for i, t in enumerate(args)]
    leaves += [] if state is None else [state.to(device, rest).requires_grad_()]
    y, final = function(
        *leaves[: len(args)],
        initial_state=None if state is None else leaves[-1],
        cu_seqlens=None if cu is None else cu.to(device),
        return_final_state=True,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    # The same gradients for every dtype: bfloat16's values.
    dy, d_final = (torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in (y, final))
    return y, final, *torch.autograd.grad([y, final], leaves, [dy, d_final])


def errors(names, ours, truth):
    """‖ours − truth‖ / ‖truth‖ of each result (of nothing but zeros: ‖ours‖)."""
    found = {}
    for name, a, b in zip(names, ours, truth, strict=False):
        assert a.shape == b.shape, name
        difference, size = (a.to(b) - b).norm().item(), b.norm().item()
        found[name] = difference / size if size else difference
    return found
