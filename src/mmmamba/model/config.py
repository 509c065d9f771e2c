"""What a network is made of: the stacks, the layer map, the mixer's named options, the image settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ATTENTION = "attention"
MAMBA2 = "mamba2"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling of a stack: ``linear`` divides positions by ``factor``, ``dynamic`` raises the base (NTK)."""

    type: Literal["linear", "dynamic"]
    factor: float


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

    def __post_init__(self) -> None:
        if self.num_layers and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.num_layers and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for RoPE")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Patch embedding of one square tile, in pixels, and the pixel shuffle that shortens it."""

    image_size: int
    patch_size: int
    downsample_ratio: float = 0.5
    pixel_shuffle_loc: Literal["pre", "post", "none"] = "pre"
    use_pixel_shuffle_proj: bool = True

    @property
    def shuffle(self) -> int:
        """How many patches per side are merged into one token (2 for a ratio of 0.5)."""
        return 1 if self.pixel_shuffle_loc == "none" else round(1 / self.downsample_ratio)

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """``<IMG_CONTEXT>`` positions that one tile takes in the prompt."""
        side = self.patches_per_side
        return (side // self.shuffle) ** 2 if self.pixel_shuffle_loc == "pre" else side**2


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Named options of the Mamba-2 mixer. The published mixer is this class with every default.

    Attributes:
        conv_kernel: width of the depthwise causal convolution over v | k | q.
        conv_activation: what follows the convolution: ``silu`` as published, or ``none``, which keeps the inherited
            attention features exactly.
        rope: rotate B (k) and C (q) after conv and activation, as the teacher's layer rotates k and q.
        qk_norm: normalise B and C of each head to unit length before the rotation.
        qkv_bias: keep the teacher's q/k/v biases (the published mixer drops them).
        gate_bias: give the gate a bias that opens it at the start (the published gate starts near zero).
        decay: how A and dt start. ``published``: A = -e and dt log-uniform in [dt_min, dt_max], drawn per head.
            ``spread``: A = -1 and dt log-spaced over the heads, so that their memories last from 1/dt_max to 1/dt_min
            tokens.
        dt_min, dt_max: range of the initial step size dt.
        norm_eps: epsilon of the per-head RMSNorm.
    """

    conv_kernel: int = 2
    conv_activation: Literal["silu", "none"] = "silu"
    rope: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    gate_bias: bool = False
    decay: Literal["published", "spread"] = "published"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 2 <= self.conv_kernel <= 4:
            raise ValueError(f"conv_kernel must be 2, 3 or 4, got {self.conv_kernel}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min ({self.dt_min}) and dt_max ({self.dt_max}) must satisfy 0 < dt_min <= dt_max")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the network's shape and how pictures and prompts become its input."""

    hidden_size: int
    vocab_size: int
    embedding: StackConfig
    decoder: StackConfig
    vision: VisionConfig | None = None
    layer_map: tuple[str, ...] = ()
    mixer: MixerConfig = field(default_factory=MixerConfig)
    tie_word_embeddings: bool = False
    img_context_token_id: int = -1
    special_token_maps: dict[str, int] = field(default_factory=dict)
    text_vocab_size: int | None = None
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 2
    template: str = "internlm2-chat"
    system_message: str | None = None
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12

    def __post_init__(self) -> None:
        if not self.layer_map:
            object.__setattr__(self, "layer_map", (ATTENTION,) * self.num_layers)
        if len(self.layer_map) != self.num_layers:
            raise ValueError(f"layer_map has {len(self.layer_map)} entries for {self.num_layers} layers")
        wrong = sorted(set(self.layer_map) - {ATTENTION, MAMBA2})
        if wrong:
            raise ValueError(f"layer_map entries must be '{ATTENTION}' or '{MAMBA2}', got {wrong}")

    @property
    def num_layers(self) -> int:
        return self.embedding.num_layers + self.decoder.num_layers

    def stack_of(self, layer: int) -> StackConfig:
        """The stack that global layer ``layer`` belongs to."""
        return self.embedding if layer < self.embedding.num_layers else self.decoder

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_map) if kind == ATTENTION)

    @property
    def mamba2_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_map) if kind == MAMBA2)
