"""GPUs as their makers state them, and how much of that a training step reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its maker states it: memory in bytes, dense bfloat16 FLOP/s, bytes/s of its memory."""

    memory: float
    rate: float
    bandwidth: float


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(memory=80e9, rate=989e12, bandwidth=3.35e12),  # SXM5
    "h200": Gpu(memory=141e9, rate=989e12, bandwidth=4.8e12),
    "a100": Gpu(memory=80e9, rate=312e12, bandwidth=2.04e12),  # SXM4, 80 GB
    "rtx4090": Gpu(memory=24e9, rate=165e12, bandwidth=1.01e12),  # with sums in float32
}
# Shares of those rates that a step is assumed to reach; large products alone reach 0.76 and copies 0.90 on an H100.
RATE_USED, BANDWIDTH_USED = 0.6, 0.7
# Seconds that a host takes to launch a layer's kernels for a row, in all passes (HoVLE's stage 1 on an H200's host);
# and a GPU to run them for a row of a small model when they are replayed from a graph (nano's stage 3 on an H100).
LAUNCH, REPLAY = 5e-3, 1.2e-3
OVERHEAD = 1.5e9  # bytes of GPU memory that the driver, cuBLAS and the allocator's gaps take
