"""transformers' ``generate()``, with our state as its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from mmmamba.data.transformers_files import generation_settings
from mmmamba.errors import UserError
from mmmamba.hf.configuration import MMMambaConfig
from mmmamba.hf.state_cache import CACHE, CACHE_NAMES, StateCache
from mmmamba.inference.steps import fixed_length
from mmmamba.model.model import Model

# Arguments that generate reads itself, but also passes on to every pass.
_READ_BY_GENERATE = ("tokenizer",)


class StateGeneration(GenerationMixin):
    """transformers' generation, with :class:`~mmmamba.hf.state_cache.StateCache` as the cache."""

    network: Model

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass pictures with the prompt only, or at every step if there is no cache.

        Positions are passed with the prompt only: later tokens follow it.
        """
        for name in _READ_BY_GENERATE:
            kwargs.pop(name, None)
        if not is_first_iteration:
            kwargs.pop("position_ids", None)
        base: Any = super()
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: the network counts positions itself."""

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise UserError(
                f"cache_implementation is '{generation_config.cache_implementation}': this model's cache is its state, "
                "and there is only one kind of it"
            )
        given = {name: model_kwargs.pop(name) for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        if generation_config.use_cache is False:
            if given:
                raise UserError("use_cache=False reads the whole sequence for every token, so no cache can be given")
            return
        start = StateCache(max_length=fixed_length(self.network, generation_config.max_length or 0))
        model_kwargs[CACHE] = StateCache.of(**given) if given else start

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse (UserError): continuous batching keeps pages of keys and values, which cannot hold a state."""
        raise UserError(
            "continuous batching keeps keys and values in pages, but this model keeps a state: mmmamba.generate takes "
            "any number of prompts and starts the next one when an answer ends"
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Repeat each prompt for several sequences, with its tiles (a row may have any number of them)."""
        base: Any = super()
        if expand_size > 1 and pixel_values is not None:
            embeds, network = model_kwargs.get("inputs_embeds"), self.network
            if embeds is not None:
                image = network.image_positions(embeds)
            else:
                assert input_ids is not None
                image = network.image(input_ids)
            pixel_values = _repeat_tiles(network, image, pixel_values, expand_size)
        input_ids, model_kwargs = base._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if pixel_values is None else {**model_kwargs, "pixel_values": pixel_values}


def generation_config(config: MMMambaConfig) -> GenerationConfig:
    """The generation settings that follow from the network's config alone."""
    ours = config.model_config()
    return GenerationConfig(**generation_settings(ours, (ours.eos_token_id, *ours.stop_token_ids)))


def _repeat_tiles(network: Model, image: Tensor, pixel_values: Tensor, times: int) -> Tensor:
    """The tiles (t, 3, H, W) of each row, by its ``image`` positions (b, l), ``times`` times in a row."""
    vision = network.config.vision
    tiles = image.sum(1) // (1 if vision is None else vision.tokens_per_tile)
    if int(tiles.sum()) != len(pixel_values):
        raise UserError(
            f"the prompts have <IMG_CONTEXT> positions for {int(tiles.sum())} tiles, not {len(pixel_values)}"
        )
    return torch.cat([part for row in pixel_values.split(tiles.tolist()) for part in [row] * times])
