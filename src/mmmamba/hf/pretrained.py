"""The common base of our transformers models: the network under its own names, its folders, its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import GENERATION_CONFIG_NAME

from mmmamba.checkpoints import load
from mmmamba.errors import UserError
from mmmamba.hf.argument_checks import refuse_unknown
from mmmamba.hf.configuration import MMMambaConfig
from mmmamba.hf.state_cache import CACHE_NAMES
from mmmamba.model.mixers import float32_names
from mmmamba.model.model import Model, initialise
from mmmamba.model.vision import VisionEmbedding

HEAD = "head"
_HALVES = (torch.float16, torch.bfloat16)


class MMMambaPreTrainedModel(PreTrainedModel):
    """A transformers model whose children are those of :class:`~mmmamba.model.model.Model`, under the same names."""

    config: MMMambaConfig
    network: Model
    config_class = MMMambaConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state can't be rolled back: no assisted generation
    _supports_sdpa = True
    _no_split_modules = ["CheckpointedLayer", "VisionEmbedding", "PatchEmbedding"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012

    def __init__(self, config: MMMambaConfig) -> None:
        super().__init__(config)
        # Not at the top: this module would import the Auto classes, whose registration needs this module.
        from mmmamba.hf.gradient_checkpointing import CheckpointedModel

        network = CheckpointedModel(config.model_config())
        for name, parameter in network.named_parameters():
            if name.endswith(float32_names()) and parameter.dtype in _HALVES:
                parameter.data = parameter.data.float()
        if isinstance(network.vision, VisionEmbedding):
            for parameter in network.vision.unused():
                parameter.requires_grad_(False)  # it never gets a gradient, and distributed training would wait for one
        own = {name.rsplit(".", 1)[-1] for name, _ in network.named_parameters()}
        self._keep_in_fp32_modules_strict = own.intersection(float32_names())
        self._take(network)

    def _take(self, network: Model) -> None:
        # Both share one dict of modules: what is replaced here (by an adapter, say) is also replaced in the network.
        self._modules = network._modules
        object.__setattr__(self, "network", network)  # not as a module, which would put a prefix before every name

    # ---------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as any transformers model does, but refuse tensors that are missing, left over or of another shape.

        If a folder stores only what differs from its teacher, the rest is read from the teacher.
        """
        where, config = pretrained_model_name_or_path, kwargs.get("config")
        asked = kwargs.pop("output_loading_info", False)
        if where is not None:
            if not isinstance(config, MMMambaConfig):
                places = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
                options = {name: kwargs[name] for name in places if name in kwargs}
                config = MMMambaConfig.from_pretrained(where if config is None else config, **options)
            if config.delta:
                folder = Path(where) / (kwargs.pop("subfolder", None) or "")
                if kwargs.get("generation_config") is None and (folder / GENERATION_CONFIG_NAME).is_file():
                    kwargs["generation_config"] = GenerationConfig.from_pretrained(folder, local_files_only=True)
                kwargs["state_dict"], kwargs["config"], where = cls._completed(folder), whole(config), None
        base: Any = super()
        model, found = base.from_pretrained(where, *model_args, output_loading_info=True, **kwargs)
        _refuse_incomplete(pretrained_model_name_or_path, found)
        return (model, found) if asked else model

    @classmethod
    def _completed(cls, folder: Path) -> dict[str, Tensor]:
        """Every tensor of a student that stores only what differs from its teacher."""
        if not folder.is_dir():
            raise UserError(
                f"{folder}: this student stores only what differs from its teacher: download it, and write it whole "
                "with 'mmmamba convert FOLDER WHOLE --to mmmamba'"
            )
        return load(folder).state_dict()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a complete folder, which ``mmmamba.load`` reads too."""
        self.config = whole(self.config)
        super().save_pretrained(save_directory, *args, **kwargs)

    def init_weights(self) -> None:
        """Initialise a network that has no weights yet.

        torch's generator is used, so ``set_seed`` decides the weights.
        """
        started = getattr(self, "_is_hf_initialized", False)  # or it was loaded
        if not started and not any(parameter.is_meta for parameter in self.parameters()):
            initialise(self.network, int(torch.randint(2**62, ())))
        super().init_weights()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: :meth:`init_weights` initialises the whole network."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep parameters in float32 that set decays close to 1, even after ``model.to(torch.bfloat16)``."""
        kept = [(p, p.data) for name, p in self.named_parameters() if name.endswith(float32_names())]
        super()._apply(fn, recurse)
        for parameter, data in kept:
            if parameter.dtype in _HALVES and data.dtype == torch.float32:
                parameter.data = data.to(parameter.device)
        return self

    # ---------------------------------------------------------------------------------- pictures

    def get_image_features(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """The embeddings of pictures at the network's entrance.

        Args:
            pixel_values: (tiles, 3, H, W) normalised.
            **kwargs: ``output_hidden_states`` and ``output_attentions``. There is one layer, and it has no attention.

        Returns:
            ``last_hidden_state``, the patches (tiles, patches, d), and ``pooler_output``, the tokens (tiles, n, d) that
            are written over the ``<IMG_CONTEXT>`` positions.
        """
        shown = {name: kwargs.pop(name, None) for name in ("output_hidden_states", "output_attentions")}
        refuse_unknown("get_image_features", kwargs)
        vision = self.network.vision
        if vision is None:
            raise UserError("this model reads no pictures")
        if self.network.merges_late:
            raise UserError("pixel_shuffle_loc 'post': pictures become tokens after the embedding stack, with the text")
        if isinstance(vision, VisionEmbedding):
            grid, merged = vision(pixel_values, with_patches=True)
            patches, tokens = grid.flatten(1, 2), merged if vision.config.pixel_shuffle_loc == "pre" else None
        else:
            patches, tokens = vision(pixel_values), None
        found = BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=tokens,
            hidden_states=(patches,) if self._shows("output_hidden_states", shown) else None,
            attentions=() if self._shows("output_attentions", shown) else None,
        )
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return found if wanted else found.to_tuple()

    def _shows(self, name: str, given: dict[str, Any]) -> bool:
        return bool(getattr(self.config, name, None) if given[name] is None else given[name])

    # ---------------------------------------------------------------------------------- embeddings

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.network.text_embeddings

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.text_embeddings = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        ours = self.config.model_config()
        if ours.special_token_maps or ours.text_vocab_size is not None:
            raise UserError("a vocabulary whose special tokens have separate embeddings can't be resized")
        resized = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.network.config = self.config.model_config()
        return resized


def whole(config: MMMambaConfig) -> MMMambaConfig:
    """The config of a model that stores all its tensors."""
    config = copy.deepcopy(config)
    config.delta, config.tensors = False, None
    return config


def _refuse_incomplete(where: Any, found: dict[str, Any]) -> None:
    """Refuse to initialise what should have been read, and to drop what was read."""
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(one if isinstance(one, str) else one[0] for one in found.get(f"{kind}_keys") or ())
        if names:
            more = ", …" if len(names) > 3 else ""
            raise UserError(f"{where}: {len(names)} {kind} tensors ({', '.join(names[:3])}{more})")
