"""Our network as a transformers model: the same modules under the same names, with ``generate()`` over our state."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from mmmamba.checkpoints import load
from mmmamba.checkpoints.io import FLOAT32_PARAMETERS
from mmmamba.data.export import generation_settings
from mmmamba.errors import UserError
from mmmamba.hf.configuration import MMMambaConfig
from mmmamba.inference.steps import fixed_length
from mmmamba.model.attention import Attention
from mmmamba.model.config import ModelConfig
from mmmamba.model.model import Model, initialise
from mmmamba.model.state import State

# What transformers calls what a pass leaves behind, from 5.24 on and before; callers may use either name.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in CACHE_NAMES)  # the installed one's

_HALVES = (torch.float16, torch.bfloat16)


class StateCache:
    """Our :class:`~mmmamba.model.state.State` as transformers' ``cache`` (``past_key_values`` before 5.24).

    A pass returns a new one and leaves the one it was given as it was, so that a prompt's can be used again.

    Attributes:
        state: what the sequences left behind; None before the first pass.
        columns: tokens seen by a row of the batch, padding counted.
        max_length: length for which dynamic RoPE scaling is fixed at the first pass.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # of any layer: generate then asks get_seq_length which tokens are new

    def __init__(self, state: State | None = None, columns: int = 0, max_length: int | None = None) -> None:
        self.state = state
        self.columns = columns
        self.max_length = max_length

    @classmethod
    def of(
        cls, cache: StateCache | State | None = None, past_key_values: StateCache | State | None = None
    ) -> StateCache:
        """What a caller may give, by either name."""
        if cache is not None and past_key_values is not None:
            raise UserError("cache and past_key_values are two names of one argument: give one of them")
        past = past_key_values if cache is None else cache
        if past is None:
            return cls()
        if isinstance(past, State):
            return cls(past, int(past.positions.max()), past.max_length)
        if not isinstance(past, cls):
            raise UserError(f"a cache must be a StateCache or a State of this model, got {type(past).__name__}")
        return past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows of the batch, as beam search asks after each step."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)


class MMMambaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """:class:`~mmmamba.model.model.Model` with transformers' manners.

    The network's modules are this model's own children, so that parameters have the names that they have on disk.
    """

    config: MMMambaConfig
    network: Model
    config_class = MMMambaConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _is_stateful = True  # a state can't be rolled back: no assisted generation
    _supports_sdpa = True
    _no_split_modules = ["Layer", "VisionEmbedding"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _keep_in_fp32_modules_strict = list(FLOAT32_PARAMETERS)  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "text_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MMMambaConfig) -> None:
        super().__init__(config)
        ours = config.model_config()
        self.generation_config = _generation_config(config)
        network = Model(ours)
        for name, parameter in network.named_parameters():
            if name.endswith(FLOAT32_PARAMETERS) and parameter.dtype in _HALVES:
                parameter.data = parameter.data.float()
        # One dict of modules, seen by both: whatever is replaced here (by an adapter, say) is replaced in the network.
        self._modules = network._modules
        object.__setattr__(self, "network", network)  # not as a module, which would put a prefix before every name
        self.post_init()

    # ---------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in every transformers model, but no tensor may be missing, left over or of another shape.

        A folder that stores only what differs from its teacher is completed from the teacher, if that is there.
        """
        where, config = pretrained_model_name_or_path, kwargs.get("config")
        asked = kwargs.pop("output_loading_info", False)
        if where is not None:
            if not isinstance(config, MMMambaConfig):
                places = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
                options = {name: kwargs[name] for name in places if name in kwargs}
                config = MMMambaConfig.from_pretrained(where if config is None else config, **options)
            if config.delta:
                if kwargs.get("generation_config") is None and (Path(where) / GENERATION_CONFIG_NAME).is_file():
                    kwargs["generation_config"] = GenerationConfig.from_pretrained(where)
                kwargs["state_dict"], kwargs["config"], where = _completed(where), _whole(config), None
        base: Any = super()
        model, found = base.from_pretrained(where, *model_args, output_loading_info=True, **kwargs)
        _refuse_incomplete(pretrained_model_name_or_path, found)
        if model.generation_config.eos_token_id is None:  # the folder has no generation_config.json
            model.generation_config = _generation_config(model.config)
        return (model, found) if asked else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a whole folder of ours, which ``mmmamba.load`` reads as well."""
        self.config = _whole(self.config)
        super().save_pretrained(save_directory, *args, **kwargs)

    def init_weights(self) -> None:
        if not any(parameter.is_meta for parameter in self.parameters()):
            initialise(self.network)
        super().init_weights()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: :meth:`init_weights` starts the network as a whole."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Also ``model.to(torch.bfloat16)`` leaves in float32 what sets decays close to 1."""
        kept = [(p, p.data) for name, p in self.named_parameters() if name.endswith(FLOAT32_PARAMETERS)]
        super()._apply(fn, recurse)
        for parameter, data in kept:
            if parameter.dtype in _HALVES and data.dtype == torch.float32:
                parameter.data = data.to(parameter.device)
        return self

    # ---------------------------------------------------------------------------------- embeddings

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.network.text_embeddings

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.text_embeddings = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.network.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        self.head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        ours = self.config.model_config()
        if ours.special_token_maps or ours.text_vocab_size is not None:
            raise UserError("a vocabulary whose special tokens have embeddings of their own can't be resized")
        resized = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.network.config = self.config.model_config()
        return resized

    # ---------------------------------------------------------------------------------- passes

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache: StateCache | State | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: StateCache | State | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass over new tokens.

        Args:
            input_ids: (b, l).
            pixel_values: (tiles, 3, H, W) normalised, in the order of the ``<IMG_CONTEXT>`` positions.
            attention_mask: (b, l) or (b, past + l), non-zero for real tokens.
            inputs_embeds: (b, l, d) in place of ids and pixels.
            labels: (b, l), unshifted; -100 is not scored.
            cache: what the sequences left behind before.
            use_cache: also return what they leave behind now (default: the config's, and not while training).
            logits_to_keep: 0 for logits everywhere; n for the last n positions; indices (n,) for those. 1 gives those
                behind each row's last real token, on whichever side it is padded.
            return_dict: a tuple instead, when False.
            past_key_values: ``cache``, by its older name.
            **kwargs: ``num_items_in_batch`` for the loss.

        Returns:
            loss, logits (b, n, v; zero at padding) and the cache, by transformers' name for it (``CACHE``).
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("forward needs either input_ids or inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise UserError("pixel_values go with input_ids; inputs_embeds hold the pictures already")
        _refuse_replaced(self.network)
        past = StateCache.of(cache, past_key_values)
        rows, new = (input_ids if input_ids is not None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if attention_mask is not None:
            if attention_mask.shape not in ((rows, new), (rows, past.columns + new)):
                raise UserError(
                    f"attention_mask is {tuple(attention_mask.shape)}, expected {(rows, new)}"
                    + (f" or {(rows, past.columns + new)}" if past.columns else "")
                )
            attention_mask = attention_mask[:, -new:]
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        everywhere = isinstance(logits_to_keep, int) and logits_to_keep == 0
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        out = self.network(
            input_ids,
            pixel_values,
            attention_mask,
            inputs_embeds=inputs_embeds,
            state=past.state,
            logits="all" if everywhere else "last" if last else "none",
            return_state=use_cache,
            max_length=past.max_length,
        )
        if everywhere:
            logits = out.logits
        elif last:
            logits = out.logits[:, None]
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.network.head(out.hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        left: dict[str, Any] = {}
        if use_cache:
            left[CACHE] = StateCache(out.state, past.columns + new, past.max_length)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **left)
        return result.to_tuple() if return_dict is False else result

    # ---------------------------------------------------------------------------------- generation

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pictures are read with the prompt; without a cache, at every step."""
        base: Any = super()
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise UserError(
                f"cache_implementation is '{generation_config.cache_implementation}': this model's cache is its state"
            )
        given = {name: model_kwargs.pop(name) for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        if generation_config.use_cache is False:
            if given:
                raise UserError("use_cache=False reads the whole sequence for every token: it goes without a cache")
            return
        start = StateCache(max_length=fixed_length(self.network, generation_config.max_length or 0))
        model_kwargs[CACHE] = StateCache.of(**given) if given else start

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Several sequences a prompt: each has the prompt's tiles, which are not one a row."""
        base: Any = super()
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            pixel_values = _repeat_tiles(self.config.model_config(), input_ids, pixel_values, expand_size)
        input_ids, model_kwargs = base._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if pixel_values is None else {**model_kwargs, "pixel_values": pixel_values}


def _generation_config(config: MMMambaConfig) -> GenerationConfig:
    """What the network's config alone says about generating."""
    ours = config.model_config()
    return GenerationConfig(**generation_settings(ours, (ours.eos_token_id, *ours.stop_token_ids)))


def _whole(config: MMMambaConfig) -> MMMambaConfig:
    """The config of a model all of whose tensors are stored."""
    config = copy.deepcopy(config)
    config.delta, config.tensors = False, None
    return config


def _completed(folder: Any) -> dict[str, Tensor]:
    """Every tensor of a student that stored only what differs from its teacher."""
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: this student stores only what differs from its teacher: download it and write a whole one "
            "with 'mmmamba convert FOLDER WHOLE --to mmmamba'"
        )
    return load(folder).state_dict()


def _refuse_incomplete(where: Any, found: dict[str, Any]) -> None:
    """Nothing is started at random that should have been read, and nothing that was read is dropped."""
    for kind in ("missing", "unexpected"):
        names = sorted(found.get(f"{kind}_keys") or ())
        if names:
            more = ", …" if len(names) > 3 else ""
            raise UserError(f"{where}: {len(names)} {kind} tensors ({', '.join(names[:3])}{more})")


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Arguments that would change nothing, but for those by which callers say that they want nothing."""
    for name, value in kwargs.items():
        if name != "num_items_in_batch" and value is not None and value is not False:
            raise UserError(f"this model's forward has no argument '{name}'")


def _refuse_replaced(network: Model) -> None:
    """The layers read some matrices without calling their modules: an adapter put in place of one would do nothing."""
    for i in range(network.config.num_layers):
        layer: Any = network.layers[i]
        read = {"mixer.o_proj": layer.mixer.o_proj}
        read |= {f"mlp.{name}": getattr(layer.mlp, name) for name in ("gate", "up", "down")}
        if isinstance(layer.mixer, Attention):
            read |= {f"mixer.{name}": getattr(layer.mixer, name) for name in ("q_proj", "k_proj", "v_proj")}
        for name, module in read.items():
            if not isinstance(module, torch.nn.Linear):
                raise UserError(
                    f"layers.{i}.{name} is a {type(module).__module__}.{type(module).__name__}, which would have no "
                    "effect: of a layer, only the projections into a Mamba-2 mixer can be replaced (by an adapter, say)"
                )


def _repeat_tiles(config: ModelConfig, input_ids: Tensor, pixel_values: Tensor, times: int) -> Tensor:
    """The tiles (t, 3, H, W) of each row of ids, ``times`` times in a row."""
    per_tile = 1 if config.vision is None else config.vision.tokens_per_tile
    tiles = (input_ids == config.img_context_token_id).sum(1) // per_tile
    if int(tiles.sum()) != len(pixel_values):
        raise UserError(
            f"the prompts have <IMG_CONTEXT> positions for {int(tiles.sum())} tiles, not {len(pixel_values)}"
        )
    return torch.cat([part for row in pixel_values.split(tiles.tolist()) for part in [row] * times])
