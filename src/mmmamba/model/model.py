"""The one model class: embeddings → layers → norm → head. The teacher has "attention" in every layer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.joined import join, joined, maps_of
from mmmamba.model.layer import Layer, Observer, RMSNorm, finish_layer
from mmmamba.model.mixers import LayerState, Mixer
from mmmamba.model.plain import device_of, weight_of
from mmmamba.model.rope import Rotation, rotation
from mmmamba.model.state import State
from mmmamba.model.vision import PatchEmbedding, PatchRow, VisionEmbedding, check_slots
from mmmamba.ops import compute_dtype, layout_of
from mmmamba.ops.packing import DeviceLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What a pass gives: hidden states behind the final norm, logits as asked for, the state if kept.

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
            spare_tiles: there may be more tiles than positions ask for, behind those in use. Nothing is counted then,
                so that nothing waits for the device.

        Raises:
            ValueError: when the number of those positions is not the number of tokens of the tiles, or when the tiles
                become tokens behind the embedding stack only (``pixel_shuffle_loc: post``).
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
        """Whether patches become image tokens behind the embedding stack (``pixel_shuffle_loc: post``)."""
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
            state: what the sequences left behind before; positions go on from there.
            logits: ``all`` → (b, l, v); ``last`` → (s, v) behind each sequence's last token; ``none``.
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
        image: Tensor | None = None  # where pictures go, when their patches become tokens later
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds")
            if self.merges_late and pixel_values is not None:
                image, inputs_embeds = self.image(input_ids), self._embed_text(input_ids)
            else:
                inputs_embeds = self.embed(input_ids, pixel_values)
        elif pixel_values is not None and self.vision is not None:
            image = self.image_positions(inputs_embeds)
            if not self.merges_late:
                inputs_embeds, image = self._with_pictures(inputs_embeds, image, pixel_values), None
        kept: Tensor | None = None
        batch_shape = inputs_embeds.shape[:2]
        if image is not None and attention_mask is None and cu_seqlens is None:
            attention_mask = torch.ones_like(image)  # a packed row, for with patches they may differ in length
        if attention_mask is not None and (image is not None or not bool((attention_mask != 0).all())):
            if cu_seqlens is not None:
                raise ValueError("give attention_mask or cu_seqlens, not both")
            real = attention_mask != 0
            kept = real.flatten().nonzero()[:, 0]
            inputs_embeds = inputs_embeds.flatten(0, 1).index_select(0, kept)[None]
            image = None if image is None else image.flatten()[kept][None]
            cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        positions, seen, longest = self._positions(
            inputs_embeds, cu_seqlens, None if state is None else state.positions
        )
        fixed = state.max_length if state is not None else max(max_length or 0, longest)
        self._warn_if_outgrown("text", longest, "tokens", fixed)
        x, row = inputs_embeds, None
        if image is not None:
            assert isinstance(self.vision, VisionEmbedding) and pixel_values is not None and cu_seqlens is not None
            if observe is not None:
                raise UserError(
                    "pixel_shuffle_loc 'post': the embedding stack reads patches, not tokens, so that its heads cannot "
                    "be aligned token by token (stages 1 and 2)"
                )
            if return_layers:
                raise UserError(
                    "pixel_shuffle_loc 'post': the embedding stack reads patches, not tokens, so that its layers have "
                    "no hidden state for each token"
                )
            patches, _ = self.vision(pixel_values, with_patches=True)
            row = PatchRow(image[0], cu_seqlens, patches, self.vision.config.shuffle**2)
            x = row.widen(x)
        # Each stack's base follows from the positions that this stack reads.
        embedding_positions, embedded, embedding_fixed = positions, None, fixed
        if self.merges_late:
            borders = cu_seqlens if row is None else row.cu_seqlens
            past = None if state is None else state.embedded
            embedding_positions, embedded, widest = self._positions(x, borders, past)
            if state is None:
                embedding_fixed = max(max_embedded or widest + fixed - longest, widest)
            elif state.max_embedded is not None:
                embedding_fixed = state.max_embedded
            self._warn_if_outgrown("row of patches", widest, "positions", embedding_fixed)
        turns = self._rotations(embedding_positions, positions, embedding_fixed, fixed, compute_dtype(inputs_embeds))
        new, entered = [], []
        for layer in self.layers:
            if layer.index == self.config.embedding.num_layers and row is not None:
                assert isinstance(self.vision, VisionEmbedding)
                x, row = row.narrow(x, self.vision.merge), None
            old: LayerState | None = None if state is None else state.layers[layer.index]  # type: ignore[index]
            turn = turns[layer.index >= self.config.embedding.num_layers]  # type: ignore[operator]
            if return_layers:
                entered.append(x)
            x, kept_state = layer(
                x,
                old,
                rotation=turn,
                cu_seqlens=cu_seqlens if row is None else row.cu_seqlens,
                keep_state=return_state,
                observe=observe,
            )
            new.append(kept_state)
        hidden = self.norm(x)
        result: Tensor | None = None
        if logits == "last":
            result = self.head(
                hidden[:, -1] if cu_seqlens is None else hidden[0].index_select(0, layout_of(cu_seqlens).last)
            )
        elif logits == "all":
            result = self.head(hidden)
        if kept is not None:
            hidden = _repad(hidden, kept, batch_shape)
            result = _repad(result, kept, batch_shape) if logits == "all" and result is not None else result
            entered = [_repad(x, kept, batch_shape) for x in entered]
        state = (
            State(tuple(new), seen, fixed, embedded, None if embedded is None else embedding_fixed)
            if return_state
            else None
        )
        return Output(hidden, result, state, (*entered, hidden) if return_layers else None)

    def _positions(self, x: Tensor, cu_seqlens: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """Positions (b, l) of the new tokens, tokens ``seen`` per sequence (s,) after them, the longest sequence."""
        if cu_seqlens is None:
            rows, length = x.shape[:2]
            offset = torch.arange(length, device=x.device).expand(rows, length)
            past = torch.zeros(rows, dtype=torch.long, device=x.device) if seen is None else seen
            longest = length if seen is None or not self.dynamic_rope else length + int(past.max())
            return offset + past[:, None], past + length, longest
        layout = layout_of(cu_seqlens)
        if layout.total != x.shape[1] or x.shape[0] != 1:
            raise ValueError(f"cu_seqlens ends at {layout.total}, the packed row is {tuple(x.shape[:2])}")
        if self.dynamic_rope and isinstance(layout, DeviceLayout):
            raise UserError("dynamic RoPE scaling needs lengths that the host knows: train without graph")
        past = torch.zeros_like(layout.sizes) if seen is None else seen
        longest = layout.longest if seen is None or not self.dynamic_rope else layout.longest + int(past.max())
        return (layout.offset + past[layout.sequence])[None], past + layout.sizes, longest

    @property
    def dynamic_rope(self) -> bool:
        """Whether a stack's RoPE base depends on how long the text will get."""
        stacks = (self.config.embedding, self.config.decoder)
        return any(s.rope_scaling is not None and s.rope_scaling.type == "dynamic" for s in stacks)

    def _warn_if_outgrown(self, what: str, longest: int, unit: str, fixed: int) -> None:
        if longest > fixed and self.dynamic_rope:
            log.warning(
                "the %s grew to %d %s, past the %d that dynamic RoPE scaling was fixed for", what, longest, unit, fixed
            )

    def _rotations(
        self, embedding: Tensor, decoder: Tensor, max_embedded: int, max_length: int, dtype: torch.dtype
    ) -> tuple[Rotation, Rotation]:
        """The rotation of each stack's positions (one, where stacks and positions agree)."""
        config = self.config
        found = rotation(config.decoder, decoder, max_length, dtype)
        keys = ("head_dim", "rope_theta", "rope_scaling", "max_position_embeddings")
        if embedding is decoder and all(getattr(config.embedding, k) == getattr(config.decoder, k) for k in keys):
            return found, found
        return rotation(config.embedding, embedding, max_embedded, dtype), found


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


def _repad(packed: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """(1, total, …) back to (b, l, …), zeros at the padding."""
    out = packed.new_zeros(shape[0] * shape[1], packed.shape[-1])
    return out.index_copy(0, kept, packed[0]).view(*shape, -1)


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
