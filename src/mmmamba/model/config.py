"""What a network is made of: the stacks, the layer map, the mixer's named options, the image settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

ATTENTION = "attention"
MAMBA2 = "mamba2"

# A config may be a stranger's. No model is near these, and what is past them takes hours or all memory to build.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20  # of hidden states and of what an MLP makes of them
MAX_HEADS = 1 << 13
MAX_VOCABULARY = 1 << 25
MAX_POSITIONS = 1 << 40
MAX_SIDE = 1 << 14  # pixels of a tile
MAX_TILES = 1024  # of a picture


def _within(config: object, **bounds: tuple[float, float]) -> None:
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
        _within(
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


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Patch embedding of one square tile, in pixels, and the pixel shuffle that shortens it.

    Attributes:
        image_size, patch_size: sides in pixels.
        downsample_ratio: side of a tile in tokens over its side in patches.
        pixel_shuffle_loc: where patches become tokens: ``pre``, before the layers; ``post``, between the embedding
            stack, which reads the patches, and the decoder; ``none``, nowhere: a patch is a token.
        use_pixel_shuffle_proj: whether there is the projection that follows the shuffle; there is no shuffle without.
        max_side: a picture of any shape is read as rows of patches (SOLO), its longer side at most this many pixels;
            each patch is a tile of its own, through one linear map. None for square tiles of many patches.
    """

    image_size: int
    patch_size: int
    downsample_ratio: float = 0.5
    pixel_shuffle_loc: Literal["pre", "post", "none"] = "pre"
    use_pixel_shuffle_proj: bool = True
    max_side: int | None = None

    def __post_init__(self) -> None:
        _within(self, image_size=(1, MAX_SIDE), patch_size=(1, MAX_SIDE), max_side=(1, MAX_SIDE))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) is not a multiple of patch_size ({self.patch_size})")
        if not 1e-3 <= self.downsample_ratio <= 1:
            raise ValueError(f"downsample_ratio must lie in (0, 1], got {self.downsample_ratio}")
        if self.patches_per_side % self.shuffle:
            raise ValueError(f"{self.patches_per_side} patches a side are not merged by {self.shuffle}")
        if self.max_side is not None:
            alone = self.image_size == self.patch_size and self.pixel_shuffle_loc == "none"
            if not alone or self.use_pixel_shuffle_proj:
                raise ValueError("max_side makes each patch a tile: image_size must be patch_size, with no shuffle")
            if self.max_side < self.patch_size or self.max_side % self.patch_size:
                raise ValueError(f"max_side ({self.max_side}) is not a multiple of patch_size ({self.patch_size})")
        if self.pixel_shuffle_loc == "post" and not self.use_pixel_shuffle_proj:
            raise ValueError("pixel_shuffle_loc 'post' needs use_pixel_shuffle_proj: without it nothing is shuffled")

    @property
    def shuffle(self) -> int:
        """How many patches per side are merged into one token (2 for a ratio of 0.5)."""
        merged = self.pixel_shuffle_loc != "none" and self.use_pixel_shuffle_proj
        return round(1 / self.downsample_ratio) if merged else 1

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """``<IMG_CONTEXT>`` positions that one tile takes in the prompt, the decoder's (also with ``post``)."""
        return (self.patches_per_side // self.shuffle) ** 2


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Named options of the Mamba-2 mixer. The published mixer is this class with every default.

    Attributes:
        rule: how the state takes a token in. ``ssd`` as published: v k^T is added, as much of it as dt says.
            ``gated_delta``: what the state holds under the key gives way first, as much as a learned beta says (the
            gated delta rule, arXiv 2412.06464); it needs keys of unit length: ``qk_norm``.
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

    rule: Literal["ssd", "gated_delta"] = "ssd"
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
        if self.rule not in ("ssd", "gated_delta"):
            raise ValueError(f"rule must be 'ssd' or 'gated_delta', got {self.rule!r}")
        if self.rule == "gated_delta" and not self.qk_norm:
            raise ValueError("rule 'gated_delta' needs keys of unit length: set qk_norm to true")
        if not 2 <= self.conv_kernel <= 4:
            raise ValueError(f"conv_kernel must be 2, 3 or 4, got {self.conv_kernel}")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise ValueError(f"dt_min ({self.dt_min}) and dt_max ({self.dt_max}) must satisfy 0 < dt_min <= dt_max")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the network's shape and how pictures and prompts become its input.

    A token id of -1 says that there is none. Beside ``eos_token_id``, an answer ends with any of ``stop_token_ids`` and
    with what ends a turn in the template.
    """

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
    stop_token_ids: tuple[int, ...] = ()
    template: str = "internlm2-chat"
    system_message: str | None = None
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12

    def __post_init__(self) -> None:
        _within(
            self,
            hidden_size=(1, MAX_WIDTH),
            vocab_size=(1, MAX_VOCABULARY),
            text_vocab_size=(1, MAX_VOCABULARY),
            min_dynamic_patch=(1, MAX_TILES),
            max_dynamic_patch=(1, MAX_TILES),
        )
        self._check_tokens()
        if not self.layer_map:
            object.__setattr__(self, "layer_map", (ATTENTION,) * self.num_layers)
        if len(self.layer_map) != self.num_layers:
            raise ValueError(f"layer_map has {len(self.layer_map)} entries for {self.num_layers} layers")
        wrong = sorted(set(self.layer_map) - {ATTENTION, MAMBA2})
        if wrong:
            raise ValueError(f"layer_map entries must be '{ATTENTION}' or '{MAMBA2}', got {wrong}")

    def _check_tokens(self) -> None:
        """Refuse token ids that no embedding has."""
        ids = {
            name: getattr(self, name)
            for name in ("img_context_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        }
        ids |= {f"stop_token_ids[{i}]": token for i, token in enumerate(self.stop_token_ids)}
        ids |= {f"special_token_maps[{name!r}]": token for name, token in self.special_token_maps.items()}
        for name, token in ids.items():
            if type(token) is not int:
                raise ValueError(f"{name} must be the id of a token, got {token!r}")
            if not -1 <= token < self.vocab_size:
                raise ValueError(f"{name} is {token}, but vocab_size is {self.vocab_size}")

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
