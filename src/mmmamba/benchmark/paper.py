"""The paper's own figures, to be marked beside ours (arXiv:2502.13145, the comparison of efficiency).

One RTX 4090, HoVLE-2.6B's geometry, one sequence. The teacher ran FlashAttention-2 without CUDA graphs, the students
with them; from that the headline's 20.6 and 13.5 times, and 75.8 % and 60.2 % less memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmmamba.model.config import ModelConfig
from mmmamba.model.geometries import GEOMETRIES

CONTEXT = 103_424  # tokens: the paper's "103K"
DEVICE = "RTX 4090"


@dataclass(frozen=True, kw_only=True)
class PaperPoint:
    """Next-token latency in milliseconds and memory in gigabytes (1e9 bytes) at :data:`CONTEXT` tokens."""

    model: str
    kind: str
    ms: float
    gigabytes: float


POINTS = (
    PaperPoint(model="HoVLE, FlashAttention-2", kind="teacher", ms=142.65, gigabytes=21.69),
    PaperPoint(model="mmMamba-linear", kind="linear", ms=6.94, gigabytes=5.22),
    PaperPoint(model="mmMamba-hybrid", kind="hybrid", ms=10.54, gigabytes=8.64),
)


def same_size(config: ModelConfig) -> bool:
    """Whether the paper's points speak of networks of this size."""
    paper = GEOMETRIES["hovle-2.6b"]
    return all(
        getattr(config, name) == getattr(paper, name) for name in ("hidden_size", "vocab_size", "num_layers")
    ) and all(
        getattr(config.decoder, name) == getattr(paper.decoder, name)
        for name in ("intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    )
