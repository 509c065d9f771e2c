"""What a network is made of: the layer map, the options of each kind of layer, the image settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from mmmamba.model.mixers import ATTENTION, Mixer, Options, default_options, kind_named, kind_of, kinds, options_for
from mmmamba.model.stack import MAX_WIDTH, StackConfig, within

MAX_VOCABULARY = 1 << 25
MAX_SIDE = 1 << 14  # pixels of a tile
MAX_TILES = 1024  # of a picture


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
        within(self, image_size=(1, MAX_SIDE), patch_size=(1, MAX_SIDE), max_side=(1, MAX_SIDE))
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


def student_layer_map(num_layers: int, softmax: Collection[int], new: Options) -> tuple[str, ...]:
    """The layer map in which some layers keep softmax attention, and all others are of the kind that ``new`` is of."""
    return tuple(ATTENTION if layer in softmax else kind_of(new).name for layer in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the network's shape and how pictures and prompts become its input.

    ``layer_map`` names the kind of each layer (by default softmax attention, as a teacher has it). ``mixer`` has the
    options of a kind, or of several as a list.

    A token id of -1 says that there is none. Beside ``eos_token_id``, an answer ends with any of ``stop_token_ids`` and
    with what ends a turn in the template.
    """

    hidden_size: int
    vocab_size: int
    embedding: StackConfig
    decoder: StackConfig
    vision: VisionConfig | None = None
    layer_map: tuple[str, ...] = ()
    mixer: Options | tuple[Options, ...] = field(default_factory=default_options)
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
        within(
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
        wrong = sorted(set(self.layer_map) - set(kinds()))
        if wrong:
            raise ValueError(f"layer_map entries must be {' or '.join(map(repr, kinds()))}, got {wrong}")
        whose = [kind_of(options).name for options in self._options]
        if len(set(whose)) < len(whose):
            raise ValueError(f"mixer has the options of one kind more than once ({', '.join(whose)})")

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

    @property
    def dynamic_rope(self) -> bool:
        """Whether a stack's RoPE base depends on how long the text will get."""
        scalings = (self.embedding.rope_scaling, self.decoder.rope_scaling)
        return any(scaling is not None and scaling.type == "dynamic" for scaling in scalings)

    def stack_of(self, layer: int) -> StackConfig:
        """The stack that global layer ``layer`` belongs to."""
        return self.embedding if layer < self.embedding.num_layers else self.decoder

    @property
    def _options(self) -> tuple[Options, ...]:
        return self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)

    def options(self, kind: str) -> Any:
        """The options of the layers of a kind; its defaults where ``mixer`` has none for it."""
        return options_for(kind, self._options)

    def build_mixer(self, layer: int) -> Mixer[Any]:
        """A new mixer for global layer ``layer``."""
        kind = self.layer_map[layer]
        return kind_named(kind)(self.hidden_size, self.stack_of(layer), self.options(kind))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers as a teacher has them."""
        return tuple(i for i, kind in enumerate(self.layer_map) if not kind_named(kind).seeded)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The layers that distillation makes, of whatever kind."""
        return tuple(i for i, kind in enumerate(self.layer_map) if kind_named(kind).seeded)
