"""What one stack of layers is made of, and the bounds within which a stranger's config is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# A config may be a stranger's. No model is near these, and what is past them takes hours or all memory to build.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20  # of hidden states and of what an MLP makes of them
MAX_HEADS = 1 << 13
MAX_POSITIONS = 1 << 40


def within(config: object, **bounds: tuple[float, float]) -> None:
    """Refuse numbers outside of (least, most); None, the default of some, is not a number."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # NaN is nowhere
            bound = f"at most {most:,}" if value > most else f"at least {least:g}"
            raise ValueError(f"{name} must be {bound}, got {value}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling of a stack.

    ``linear`` divides positions by ``factor``, ``dynamic`` raises the base (NTK). ``llama3`` divides by ``factor`` the
    frequencies that turn less than ``low_freq_factor`` times over ``original_max_position_embeddings`` tokens, leaves
    those alone that turn more than ``high_freq_factor`` times, and blends in between; only it has these three fields.
    """

    type: Literal["linear", "dynamic", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1e9:
            raise ValueError(f"factor must be positive and at most 1e9, got {self.factor}")
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if self.type != "llama3":
            if (low, high, length) != (None, None, None):
                raise ValueError(f"{self.type} scaling has a factor and nothing else")
        elif low is None or high is None or length is None:
            raise ValueError("llama3 needs low_freq_factor, high_freq_factor and original_max_position_embeddings")
        elif not 0 < low < high <= 1e9 or not 1 <= length <= MAX_POSITIONS:
            raise ValueError(
                f"llama3 needs 0 < low_freq_factor ({low}) < high_freq_factor ({high}) and "
                f"original_max_position_embeddings ({length}) of at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One stack of layers with its own geometry (HoVLE has two: the embedding stack and the decoder)."""

    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 8192
    qkv_bias: bool = False
    o_bias: bool = False

    def __post_init__(self) -> None:
        within(
            self,
            num_layers=(0, MAX_LAYERS),
            intermediate_size=(1, MAX_WIDTH),
            num_heads=(1, MAX_HEADS),
            num_kv_heads=(1, MAX_HEADS),
            head_dim=(1, MAX_HEADS),
            rms_norm_eps=(0, 1),
            rope_theta=(1e-9, 1e30),
            max_position_embeddings=(1, MAX_POSITIONS),
        )
        if self.num_layers and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.num_layers and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for RoPE")

    def rotates_like(self, other: StackConfig) -> bool:
        """Whether both stacks rotate equal positions equally."""
        keys = ("head_dim", "rope_theta", "rope_scaling", "max_position_embeddings")
        return all(getattr(self, key) == getattr(other, key) for key in keys)
