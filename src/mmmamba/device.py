"""Which device, which number format and how many cores a verb works with."""

from __future__ import annotations

import os

import torch

from mmmamba.errors import UserError


def pick_device(device: str = "auto") -> torch.device:
    """``auto``: the GPU if there is one, else the CPU.

    Raises:
        UserError: for a device that PyTorch does not know or that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise UserError(f"--device {device}: must be auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: PyTorch sees {torch.cuda.device_count() or 'no'} CUDA GPU here")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Of the weights, to ask a model: ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    found: torch.dtype = getattr(torch, dtype)
    return found


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """Of a training pass: ``auto`` is bf16 passes over float32 weights on a GPU, fp32 on a CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
