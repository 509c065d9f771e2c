"""The one model class: embeddings → layers → norm → head. The teacher has "attention" in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.joined import join, joined, maps_of
from mmmamba.model.layer import Layer, Observer, RMSNorm, finish_layer
from mmmamba.model.mixers import LayerState, Mixer
from mmmamba.model.padding import Padding
from mmmamba.model.plain import device_of, weight_of
from mmmamba.model.positions import Places, places_of
from mmmamba.model.rope import Rotation
from mmmamba.model.state import State
from mmmamba.model.vision import PatchEmbedding, PatchRow, VisionEmbedding, check_slots
from mmmamba.ops import layout_of


@dataclass(frozen=True)
class Output:
    """What a pass gives: hidden states after the final norm, logits as asked for, the state if kept.

    ``layers``, if asked for: what enters each layer, and last what leaves the final norm, each (b, l, d).
    """

    hidden: Tensor
    logits: Tensor | None
    state: State | None
    layers: tuple[Tensor, ...] | None = None


class Model(nn.Module):
    """Decoder-only multimodal network; ``config.layer_map`` says of which kind each layer is."""

    layer_class: type[Layer] = Layer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.vision: VisionEmbedding | PatchEmbedding | None = None
        if config.vision is not None:
            kind = VisionEmbedding if config.vision.max_side is None else PatchEmbedding
            self.vision = kind(config.vision, d)
        self.text_embeddings = nn.Embedding(config.text_vocab_size or config.vocab_size, d)
        self.special_embeddings = nn.Embedding(len(config.special_token_maps), d) if config.special_token_maps else None
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(d, config.decoder.rms_norm_eps)
        self.head = nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.text_embeddings.weight
        self.int8_steps = False  # whether decoding steps read the matrices rounded to int8, half the bytes
        self.half_states = False  # whether they keep the SSM states in bfloat16, half the bytes

    def mixer(self, layer: int) -> Mixer[Any]:
        """The mixer of global layer ``layer``."""
        found: Any = self.layers[layer]
        mixer: Mixer[Any] = found.mixer
        return mixer

    @property
    def device(self) -> torch.device:
        """Where passes run, also when the weights are offloaded (accelerate)."""
        found = (device_of(module) for module in self._ends())
        return next((device for device in found if device is not None), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format; that of the embeddings where the head is quantised."""
        for module in self._ends():
            weight = weight_of(module)
            if weight is not None and weight.is_floating_point():
                return weight.dtype
        return torch.get_default_dtype()

    def _ends(self) -> list[nn.Module]:
        """The head, unless it was taken off, and the embeddings."""
        return [module for name in ("head", "text_embeddings") if (module := self._modules.get(name)) is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moved or cast, the weights are new tensors: what was laid out for decoding is again, on a GPU all."""
        ours = [layer for layer in self.layers if isinstance(layer, Layer)]
        laid_out = any(joined(maps) is not None for layer in ours for maps in maps_of(layer))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if laid_out or self.device.type == "cuda":
            join(self.layers)
        return self

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, *, spare_tiles: bool = False) -> Tensor:
        """Token embeddings (b, l, d), with the tiles' tokens written over the <IMG_CONTEXT> positions in order.

        Args:
            input_ids: (b, l).  pixel_values: (tiles, 3, H, W) normalised.
            spare_tiles: there may be more tiles than positions ask for, after those in use. Nothing is counted then,
                so that nothing waits for the device.

        Raises:
            ValueError: when the number of those positions is not the number of tokens of the tiles, or when the tiles
                become tokens after the embedding stack only (``pixel_shuffle_loc: post``).
        """
        if pixel_values is None or self.vision is None:
            return self._embed_text(input_ids)
        if self.merges_late:
            raise ValueError("with pixel_shuffle_loc 'post' pictures are no input embeddings: give ids and pixels")
        image = self.image(input_ids)
        return self._with_pictures(self._embed_text(input_ids), image, pixel_values, spare_tiles=spare_tiles)

    def _with_pictures(self, x: Tensor, image: Tensor, pixel_values: Tensor, *, spare_tiles: bool = False) -> Tensor:
        """Embeddings x (b, l, d) with the tiles' tokens written over the positions ``image`` (b, l), in order."""
        assert self.vision is not None
        tokens = self.vision(pixel_values).flatten(0, 1)
        if not spare_tiles:
            check_slots(int(image.sum()), tokens.shape[0], pixel_values.shape[0])
        # Every position reads the tile token that the positions up to it have come to; text then keeps its own.
        latest = (image.flatten().cumsum(0) - 1).clamp(min=0)
        pictures = tokens.to(x.dtype).index_select(0, latest).view_as(x)
        kept = x + pictures if isinstance(self.vision, PatchEmbedding) else pictures
        return torch.where(image[..., None], kept, x)

    @property
    def merges_late(self) -> bool:
        """Whether patches become image tokens after the embedding stack (``pixel_shuffle_loc: post``)."""
        return self.vision is not None and self.vision.config.pixel_shuffle_loc == "post"

    def image(self, input_ids: Tensor) -> Tensor:
        """Which ids (b, l) are <IMG_CONTEXT>, (b, l) bool."""
        return input_ids == self.config.img_context_token_id

    def image_positions(self, inputs_embeds: Tensor) -> Tensor:
        """Which embeddings (b, l, d) are still <IMG_CONTEXT>'s own, (b, l) bool: pictures are yet to go there."""
        mark = torch.tensor([self.config.img_context_token_id], device=inputs_embeds.device)
        return (inputs_embeds == self._embed_text(mark).to(inputs_embeds.dtype)).all(-1)

    def _embed_text(self, input_ids: Tensor) -> Tensor:
        if self.special_embeddings is None:
            embedded: Tensor = self.text_embeddings(input_ids)
            return embedded
        rows = self.text_embeddings.num_embeddings
        special = input_ids >= rows
        return torch.where(
            special[..., None],
            self.special_embeddings((input_ids - rows).clamp(min=0)),
            self.text_embeddings(input_ids.clamp(max=rows - 1)),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        logits: Literal["all", "last", "none"] = "all",
        return_state: bool = False,
        max_length: int | None = None,
        max_embedded: int | None = None,
        observe: Observer | None = None,
        return_layers: bool = False,
    ) -> Output:
        """One pass over new tokens.

        Args:
            input_ids: (b, l), or a packed row (1, total) with ``cu_seqlens``.
            pixel_values: (tiles, 3, H, W) normalised, in the order of the <IMG_CONTEXT> positions.
            attention_mask: (b, l), non-zero for real tokens (padding on either side never reaches a mixer).
            inputs_embeds: (b, l, d) in place of ids; pixels go where <IMG_CONTEXT>'s embedding is.
            cu_seqlens: (s+1,) borders of the sequences of a packed row.
            state: of earlier passes over these sequences; positions go on from there.
            logits: ``all`` → (b, l, v); ``last`` → (s, v) after each sequence's last token; ``none``.
            return_state: also return the new state, one row a sequence.
            max_length: length for which dynamic RoPE scaling is fixed when a state starts (default: this pass).
            max_embedded: the same in positions of the embedding stack, where that reads patches (default: this pass's,
                and as many more as ``max_length`` leaves room for).
            observe: called in every layer with the mixer's input and its heads' outputs.
            return_layers: also return what enters each layer.

        Returns:
            an :class:`Output`; at padded positions hidden states and logits are zero.

        With ``pixel_shuffle_loc: post`` all of this still counts the prompt's tokens; the embedding stack alone runs
        over a longer row, with positions of its own, in which each tile's patches take the place of its tokens.
        """
        x, image = self._embedded(input_ids, pixel_values, inputs_embeds)
        x, image, cu_seqlens, padding = _packed(x, image, attention_mask, cu_seqlens)
        row = None
        if image is not None:
            _refuse_looks(observe is not None, return_layers)
            assert pixel_values is not None and cu_seqlens is not None
            row = self._patch_row(image, cu_seqlens, pixel_values)
        wide, borders = (x, cu_seqlens) if row is None else (row.widen(x), row.cu_seqlens)
        places = places_of(
            self.config,
            x,
            cu_seqlens,
            state,
            patches=(wide, borders) if self.merges_late else None,
            max_length=max_length,
            max_embedded=max_embedded,
        )
        states: list[LayerState | None] = []
        entered: list[Tensor] = []

        def through(layers: Sequence[nn.Module], x: Tensor, rotation: Rotation, cu_seqlens: Tensor | None) -> Tensor:
            for layer in layers:
                if return_layers:
                    entered.append(x)
                old = None if state is None else state.layers[len(states)]
                x, new = layer(
                    x, old, rotation=rotation, cu_seqlens=cu_seqlens, keep_state=return_state, observe=observe
                )
                states.append(new)
            return x

        layers, first = list(self.layers), self.config.embedding.num_layers
        x = through(layers[:first], wide, places.embedding, borders)
        if row is not None:
            assert isinstance(self.vision, VisionEmbedding)
            x = row.narrow(x, self.vision.merge)
        hidden = self.norm(through(layers[first:], x, places.decoder, cu_seqlens))
        found = self._logits(hidden, logits, cu_seqlens)
        if padding is not None:
            hidden, *entered = (padding.restore(one) for one in (hidden, *entered))
            found = padding.restore(found) if logits == "all" and found is not None else found
        after = _state_after(states, places) if return_state else None
        return Output(hidden, found, after, (*entered, hidden) if return_layers else None)

    def _embedded(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the layers read (b, l, d), and where pictures go whose patches become tokens later, if any (b, l)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds")
            if self.merges_late and pixel_values is not None:
                return self._embed_text(input_ids), self.image(input_ids)
            return self.embed(input_ids, pixel_values), None
        if pixel_values is None or self.vision is None:
            return inputs_embeds, None
        image = self.image_positions(inputs_embeds)
        return (
            (inputs_embeds, image)
            if self.merges_late
            else (self._with_pictures(inputs_embeds, image, pixel_values), None)
        )

    def _patch_row(self, image: Tensor, cu_seqlens: Tensor, pixel_values: Tensor) -> PatchRow:
        """The row that the embedding stack reads, in which each tile's patches are in place of its tokens."""
        assert isinstance(self.vision, VisionEmbedding)
        patches, _ = self.vision(pixel_values, with_patches=True)
        return PatchRow(image[0], cu_seqlens, patches, self.vision.config.shuffle**2)

    def _logits(
        self, hidden: Tensor, which: Literal["all", "last", "none"], cu_seqlens: Tensor | None
    ) -> Tensor | None:
        if which == "none":
            return None
        if which == "last":
            hidden = hidden[:, -1] if cu_seqlens is None else hidden[0].index_select(0, layout_of(cu_seqlens).last)
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def dynamic_rope(self) -> bool:
        """Whether a stack's RoPE base depends on how long the text will get."""
        return self.config.dynamic_rope


def _packed(
    x: Tensor, image: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Padding | None]:
    """The tokens without padding: x, image and borders of the packed row, and the way back; as they are without any."""
    if mask is None and image is not None and cu_seqlens is None:
        mask = torch.ones_like(image)  # with patches, rows may come to differ in length: they are packed
    if mask is None or (image is None and bool((mask != 0).all())):
        return x, image, cu_seqlens, None
    if cu_seqlens is not None:
        raise ValueError("give attention_mask or cu_seqlens, not both")
    padding = Padding(mask)
    return padding.remove(x), None if image is None else padding.remove(image), padding.cu_seqlens, padding


def _refuse_looks(observe: bool, return_layers: bool) -> None:
    """Refuse to show single tokens of layers that read patches."""
    for asked, what in ((observe, _NO_HEADS), (return_layers, _NO_LAYERS)):
        if asked:
            raise UserError(f"pixel_shuffle_loc 'post': the embedding stack reads patches, not tokens, so that {what}")


_NO_HEADS = "its heads cannot be aligned token by token (stages 1 and 2)"
_NO_LAYERS = "its layers have no hidden state for each token"


def _state_after(layers: Sequence[LayerState | None], places: Places) -> State:
    kept = tuple(layer for layer in layers if layer is not None)
    return State(kept, places.seen, places.max_length, places.embedded, places.max_embedded)


def compile_layers(model: Model) -> Model:
    """Compile what surrounds the mixers (projections with rotation; W_o, norm and MLP), once for all layers of a shape.

    Values change by rounding only. Row lengths stay dynamic.
    """
    finish = torch.compile(finish_layer, dynamic=True)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.finish = finish
        layer.mixer.compile_parts()
    return model


@torch.no_grad()
def initialise(model: Model, seed: int = 0) -> Model:
    """Random weights for training from scratch, with every part of the residual stream at a scale near one.

    Matrices are N(0, 1/inputs), residual outputs divided by sqrt(2 · layers), the head by three; embeddings and the
    position table are N(0, 1): where a patch lies must weigh as much as what it shows. (Beside the usual
    N(0, 0.02) for everything, a small teacher learnt easy-VQA markedly faster: docs/results/nano.md.)
    """
    generator = torch.Generator().manual_seed(seed)
    shrink = (2 * model.config.num_layers) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            scale = module.weight[0].numel() ** -0.5
            scale *= shrink if name.endswith(("o_proj", "mlp.down")) else 1 / 3 if name == "head" else 1.0
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, VisionEmbedding):
            module.position_embedding.copy_(torch.randn(module.position_embedding.shape, generator=generator))
        elif isinstance(module, Mixer):
            module.reset_new_parameters(generator)
    return model
