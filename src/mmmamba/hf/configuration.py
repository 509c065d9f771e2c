"""Our ``config.json`` as transformers reads it: the network's config, nested under ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from mmmamba.checkpoints.student import folder_from_json
from mmmamba.config_files import to_dict
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig

ARCHITECTURE = "MMMambaForConditionalGeneration"
_NONE = -1  # in our config, this means that there is no such token


def _field(name: str) -> Any:
    """A field of the nested config, under transformers' name."""

    def get(config: MMMambaConfig) -> Any:
        return config.model[name]

    def change(config: MMMambaConfig, value: Any) -> None:
        config.model = {**config.model, name: value}

    return property(get, change)


def _token(name: str) -> Any:
    """A token id of the nested config. None if there is no such token."""

    def get(config: MMMambaConfig) -> int | None:
        token: int = config.model[name]
        return None if token == _NONE else token

    def change(config: MMMambaConfig, value: int | None) -> None:
        if not isinstance(value, int | None):
            raise UserError(f"config.json: 'model.{name}' must be one token id or None, got {value!r}")
        config.model = {**config.model, name: _NONE if value is None else value}

    return property(get, change)


def _of_decoder(name: str) -> Any:
    return property(lambda config: config.model["decoder"][name])


class MMMambaConfig(PretrainedConfig):
    """The ``config.json`` of a folder of ours.

    Args:
        model: our :class:`~mmmamba.model.config.ModelConfig`, or its nested dict.
        delta: whether the folder stores only what differs from the teacher.
        tensors: how many tensors are stored (None: unknown).
        teacher: the name and fingerprint of a student's teacher.

    Raises:
        UserError: naming the field that is missing, unknown or wrong.
    """

    model_type = "mmmamba"
    has_no_defaults_at_init = True
    use_cache = True

    vocab_size = _field("vocab_size")
    hidden_size = _field("hidden_size")
    tie_word_embeddings = _field("tie_word_embeddings")
    bos_token_id = _token("bos_token_id")
    eos_token_id = _token("eos_token_id")
    pad_token_id = _token("pad_token_id")
    image_token_id = _token("img_context_token_id")
    num_attention_heads = _of_decoder("num_heads")
    num_key_value_heads = _of_decoder("num_kv_heads")
    head_dim = _of_decoder("head_dim")
    intermediate_size = _of_decoder("intermediate_size")
    max_position_embeddings = _of_decoder("max_position_embeddings")

    def __init__(
        self,
        model: ModelConfig | Mapping[str, Any] | None = None,
        delta: bool = False,
        tensors: int | None = None,
        teacher: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {"model": to_dict(model), "delta": delta, "tensors": tensors, "teacher": to_dict(teacher)}
        folder = folder_from_json({k: v for k, v in given.items() if v is not None}, "config.json")
        self.model: dict[str, Any] = to_dict(folder.model)
        self.delta = folder.delta
        self.tensors = folder.tensors
        self.teacher: dict[str, Any] | None = to_dict(folder.teacher)
        # No code in a folder makes the model. Some trainers look for such code, and for a class name, and need both
        # fields.
        super().__init__(**{"auto_map": {}, "architectures": [ARCHITECTURE]} | kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return self.model_config().num_layers

    def model_config(self) -> ModelConfig:
        """The config of the network."""
        return folder_from_json({"model": self.model}, "config.json").model

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``, in our layout, which has no version of transformers in it."""
        data: dict[str, Any] = super().to_dict()
        data.pop("transformers_version", None)
        if not data.get("auto_map"):
            data.pop("auto_map", None)
        return data
