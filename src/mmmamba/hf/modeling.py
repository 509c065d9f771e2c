"""Our network as transformers models: the same modules under the same names, with transformers' interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mmmamba.errors import UserError
from mmmamba.hf.configuration import MMMambaConfig
from mmmamba.hf.forward_pass import run
from mmmamba.hf.generation import StateGeneration, generation_config
from mmmamba.hf.pretrained import HEAD, MMMambaPreTrainedModel
from mmmamba.hf.state_cache import StateCache
from mmmamba.model.state import State


class MMMambaModel(MMMambaPreTrainedModel):
    """:class:`~mmmamba.model.model.Model` without its head: ids and pictures to hidden states.

    A folder of a whole model loads as one of these; the head is left on disk.
    """

    _keys_to_ignore_on_load_unexpected = [rf"^{HEAD}\."]  # noqa: RUF012

    def __init__(self, config: MMMambaConfig) -> None:
        super().__init__(config)
        del self.network._modules[HEAD]
        self.post_init()

    @classmethod
    def of(cls, model: MMMambaForConditionalGeneration) -> MMMambaModel:
        """A view of a model: the same config and modules, without the head."""
        view = cls.__new__(cls)
        PreTrainedModel.__init__(view, model.config)
        view._take(model.network)
        view._modules = {name: module for name, module in model._modules.items() if name != HEAD}
        view._is_hf_initialized = True
        return view

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StateCache | State | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | State | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """One pass over new tokens; the arguments are those of :class:`MMMambaForConditionalGeneration`."""
        done = run(
            self,
            input_ids,
            pixel_values,
            attention_mask,
            inputs_embeds,
            StateCache.of(cache, past_key_values),
            use_cache,
            position_ids=position_ids,
            **kwargs,
        )
        return done.result(BaseModelOutputWithPast, return_dict, last_hidden_state=done.hidden)


class MMMambaForConditionalGeneration(StateGeneration, MMMambaPreTrainedModel, GenerationMixin):
    """:class:`~mmmamba.model.model.Model` with transformers' interface, including ``generate``."""

    _tied_weights_keys = {f"{HEAD}.weight": "text_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MMMambaConfig) -> None:
        super().__init__(config)
        self.generation_config = generation_config(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        found = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if model.generation_config.eos_token_id is None:  # the folder has no generation_config.json
            model.generation_config = generation_config(model.config)
        return found

    @property
    def base_model(self) -> MMMambaModel:
        """Everything but the head: the same modules, including replaced ones."""
        view = self.__dict__.get("_base")
        if view is None:
            view = MMMambaModel.of(self)
            object.__setattr__(self, "_base", view)  # not as a module, which would hold every tensor twice
        view._modules = {name: module for name, module in self._modules.items() if name != HEAD}
        view.training, view.config = self.training, self.config
        return view

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

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
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass over new tokens.

        Args:
            input_ids: (b, l).
            pixel_values: (tiles, 3, H, W) normalised, in the order of the ``<IMG_CONTEXT>`` positions.
            attention_mask: (b, l) or (b, past + l), non-zero for real tokens.
            inputs_embeds: (b, l, d) in place of ids; pictures go where ``<IMG_CONTEXT>``'s own embedding is.
            labels: (b, l), unshifted; -100 is not scored.
            cache: the cache of the sequences so far.
            use_cache: also return the new cache (default: the config's setting, and never while training).
            logits_to_keep: 0 for logits everywhere; n for the last n positions; indices (n,) for those positions. 1
                gives the logits after each row's last real token, on whichever side it is padded.
            return_dict: False returns a tuple (default: the config's setting).
            past_key_values: ``cache``, by its older name.
            position_ids: (b, l) or (1, l), rising by one. Where they start again at 0, the next sequence of a packed
                row begins.
            **kwargs: ``shift_labels`` (b, l), which need no shifting, in place of ``labels``; ``num_items_in_batch``
                for the loss; ``cu_seq_lens_q`` and ``cu_seq_lens_k``, or ``seq_idx``, for packed rows
                (:mod:`~mmmamba.hf.sequence_borders`); ``output_hidden_states``; ``output_attentions``, of a teacher.

        Returns:
            loss, logits (b, n, v; zero at padding), the cache, by transformers' name for it (``CACHE``), and what
            else was asked for.
        """
        shift_labels, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        done = run(
            self,
            input_ids,
            pixel_values,
            attention_mask,
            inputs_embeds,
            StateCache.of(cache, past_key_values),
            use_cache,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        logits, loss = done.logits, None
        assert logits is not None
        scored = labels if shift_labels is None else shift_labels
        if scored is not None:
            if scored.shape != logits.shape[:2]:
                name = "labels" if shift_labels is None else "shift_labels"
                raise UserError(f"{name} are {tuple(scored.shape)}, the logits {tuple(logits.shape[:2])}")
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                shift_labels=shift_labels,
                num_items_in_batch=items,
            )
        return done.result(CausalLMOutputWithPast, return_dict, loss=loss, logits=logits)
