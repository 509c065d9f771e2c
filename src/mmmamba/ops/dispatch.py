"""Whether a call goes to the Triton kernels, and how they are launched and shown to PyTorch.

Nothing here imports Triton. The files that hold kernels do, and they are imported when a kernel is first wanted: a
machine without Triton (or without a GPU) loses the kernels and nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

R = TypeVar("R")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {"head_dim": (32, 64, 128), "state_dim": (32, 64, 128), "conv_kernel": (2, 3, 4)}
PLAIN = (Tensor, torch.nn.Parameter)  # other classes of tensors appear while something is traced
CAPABILITY = (8, 0)  # the first with bfloat16 in the matrix units


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (``TRITON_INTERPRET=1`` before Triton's import)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not(*tensors: Tensor | None, **sizes: int) -> str | None:
    """Say in a few words why the kernels can't serve these tensors; None if they can.

    Args:
        tensors: all tensors of the call (None for those left out).
        sizes: ``head_dim``, ``state_dim``, ``conv_kernel``: the kernels are built for some values only (:data:`SIZES`).

    With the interpreter on, CPU tensors are served too, slowly: that is for tests. :func:`serves` asks for the device
    first.
    """
    if not available():
        return "Triton is not installed"
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if any(tensor.device != device for tensor in given):
        devices = sorted({str(tensor.device) for tensor in given})
        return f"the tensors lie on several devices ({', '.join(devices)})"
    for tensor in given:
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"the kernels have no {str(tensor.dtype).removeprefix('torch.')}"
    for name, size in sizes.items():
        if size not in SIZES[name]:
            return f"the kernels are built for {name} {', '.join(map(str, SIZES[name]))}, not {size}"
    if device.type != "cuda":
        return None if device.type == "cpu" and interpreted() else f"the kernels need a GPU, not {device.type}"
    if torch.version.hip is None and _capability(device) < CAPABILITY:
        major, minor = _capability(device)
        return f"the kernels need a GPU of compute capability 8.0, not {major}.{minor}"
    return None


@functools.cache
def fallback(reason: str) -> None:
    """Warn, once for each reason (see :func:`why_not`), that PyTorch's own operators are used in place of a kernel."""
    warnings.warn(f"slower PyTorch operators are used: {reason}", RuntimeWarning, stacklevel=3)


def serves(first: Tensor, *tensors: Tensor | None, **sizes: int) -> bool:
    """Whether a call goes to the kernels: on a GPU, unless :func:`why_not` has a reason; the reason is warned of."""
    if not first.is_cuda:
        return False
    reason = why_not(first, *tensors, **sizes)
    if reason is not None:
        fallback(reason)
    return reason is None


class Operator(Generic[R]):
    """A function that launches kernels, and the PyTorch operator that a compiler sees in its place.

    If nothing is traced, the function is called directly. PyTorch's wrappers around an operator that is written in
    Python take the host longer than several launches, and the pass of a short row would wait for them. ``traced`` is
    the operator that a compiler sees.
    """

    def __init__(self, function: Callable[..., R], name: str, mutates_args: Sequence[str]) -> None:
        self._function = function
        self.traced = torch.library.custom_op(f"mmmamba::{name}", function, mutates_args=tuple(mutates_args))
        self._differentiable: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``fake``, which gives a tracer results of the right shapes and dtypes."""
        self.traced.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Register the gradients (first order only).

        ``setup_context(ctx, inputs, output)`` keeps what ``backward(ctx, *gradients)`` reads.
        """
        self.traced.register_autograd(backward, setup_context=setup_context)
        methods = {
            "forward": staticmethod(self._function),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(once_differentiable(backward)),
        }
        self._differentiable = type(self._function.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> R:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        if torch.compiler.is_compiling() or any(type(one) not in PLAIN for one in tensors):
            traced: R = self.traced(*arguments)
            return traced
        if self._differentiable is not None and torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
            result: R = self._differentiable.apply(*arguments)
            return result
        return self._function(*arguments)


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., R]], Operator[R]]:
    """Make a function of positional arguments an :class:`Operator`; its annotations are the operator's schema."""
    return lambda function: Operator(function, name, mutates_args)


def chain(tensor: Tensor, chained: bool) -> dict[str, bool]:
    """Give the options of a launch that may be part of a chain (programmatic dependent launch).

    ``CHAINS``: the kernel may let the next launch begin, and may wait for the one before it. ``launch_pdl``: this
    launch begins before the one before it has ended (``chained``).
    """
    can = tensor.is_cuda and torch.version.hip is None and _capability(tensor.device) >= (9, 0)
    return {"CHAINS": True, "launch_pdl": chained} if can else {"CHAINS": False}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """The context to launch a kernel in: Triton launches on the current GPU, which may not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
