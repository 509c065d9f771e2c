"""A transformers processor on top of our own: text and pictures to model inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from mmmamba.checkpoints.student import folder_from_json
from mmmamba.config_files import to_dict
from mmmamba.data.chat_template import OF_TOKENIZER
from mmmamba.data.jinja_chat import ChatJinja
from mmmamba.data.processor import UNSCORED, Encoded, Processor
from mmmamba.data.sample import IMAGE_MARK, Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.transformers_files import chat_template as jinja_of
from mmmamba.data.transformers_files import without_generation
from mmmamba.errors import UserError
from mmmamba.hf.chat_messages import (
    Message,
    as_mapping,
    left_open,
    plain_messages,
    share_out,
    tool_schemas,
    turns_of,
)
from mmmamba.hf.image_processing import (
    IMAGE_OPTIONS,
    PIXEL_OPTIONS,
    MMMambaImageProcessor,
    in_order,
    open_image,
    refuse_changes,
    refuse_unknown,
    tensors,
)
from mmmamba.hf.padding import padded
from mmmamba.model.config import ModelConfig

#: Options for the text; see :meth:`MMMambaProcessor.__call__`.
TEXT_OPTIONS = ("add_special_tokens", "device", "max_length", "pad_to_multiple_of", "padding", "padding_side",
                "return_attention_mask", "return_mm_token_type_ids", "return_tensors", "truncation")  # fmt: skip
_OF_TOKENIZER_INIT = ("max_length", "padding", "truncation", "pad_to_multiple_of")
_NESTED = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")
_ALWAYS = ("messages", "add_generation_prompt", "tools", "documents")
_TILES = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch")


class MMMambaProcessor(ProcessorMixin):
    """Tokenizer, chat template and image settings of one model.

    Args:
        image_processor: cuts pictures into tiles.
        tokenizer: the model's fast tokenizer.
        model: the model's config (ours, or its nested dict). It gives the template, the marks, and the tokens of a
            tile.
        chat_template: Jinja text that replaces the model's own template.
    """

    def __init__(
        self,
        image_processor: MMMambaImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        model: ModelConfig | Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        config = folder_from_json({} if model is None else {"model": to_dict(model)}, "processor_config.json").model
        self.model: dict[str, Any] = to_dict(config)
        super().__init__(image_processor, tokenizer)
        self._given = chat_template
        self._known: tuple[Any, Processor] | None = None
        ours = self._ours
        template = chat_template if chat_template is not None else tokenizer.chat_template
        of_tokenizer = config.template == OF_TOKENIZER and isinstance(template, str)
        self._own_template: str = template if of_tokenizer else jinja_of(ours.tokenizer, ours.template, ours.config)
        if chat_template is None or chat_template == without_generation(self._own_template):
            chat_template = self._own_template
        self.chat_template = chat_template
        image = config.img_context_token_id
        self.image_token_id = image if image >= 0 else None
        self.image_token = str(tokenizer.convert_ids_to_tokens(image)) if image >= 0 else None

    @property
    def _ours(self) -> Processor:
        """Our own processor, with the tokenizer as it is now: tokens may have been added to it."""
        tokenizer, image_processor = self.tokenizer, self.image_processor
        added = repr(sorted(tokenizer.added_tokens_decoder.items()))
        tiles = {name: getattr(image_processor, name) for name in _TILES}
        state = (id(tokenizer), added, tokenizer.special_tokens_map, tiles)
        if self._known is None or self._known[0] != state:
            config = folder_from_json({"model": self.model}, "processor_config.json").model
            config = replace(config, vocab_size=max(config.vocab_size, len(tokenizer)), **tiles)
            given = self._given if self._given is not None else tokenizer.chat_template
            given = given if isinstance(given, str) else (given or {}).get("default")
            named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
            backend: Any = tokenizer.backend_tokenizer
            ours = Processor(Tokenizer(backend.to_str(), {**named, "chat_template": given}), config)
            self._known = state, ours
        return self._known[1]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Text and pictures → ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``.

        The names of special tokens in the text become special tokens (use :meth:`apply_chat_template` for text that you
        do not trust), and nothing is added to it. An ``<image>`` mark or ``image_token`` marks the place of a picture.

        Args:
            images: the pictures for the marks, in order: one picture, a list, or a list for each text. A picture is a
                Pillow picture, an array, a path, a URL or base64 text.
            text: one text or several.
            kwargs: options for the text (:data:`TEXT_OPTIONS`) and for the pictures (those of the image processor),
                given directly or in ``text_kwargs``, ``images_kwargs``, ``common_kwargs``: ``return_tensors`` (``pt``,
                ``np``; otherwise lists), ``device``; ``padding`` (``True``, ``longest``, ``max_length``; the default if
                tensors are asked for), ``padding_side``, ``pad_to_multiple_of``, ``max_length``, ``truncation`` (with
                ``truncation_side`` of the tokenizer; never within a picture), ``return_mm_token_type_ids`` (1 for the
                tokens of pictures), ``max_tiles``. ``add_special_tokens`` has no effect: the template decides the first
                token of a prompt.

        Raises:
            UserError: the numbers of marks and pictures differ, or an option is unknown.
        """
        text_options, image_options = self._options(kwargs)
        if text is None:
            if images is None:
                raise UserError("the processor needs text, images or both")
            shared: dict[str, Any] = {n: text_options[n] for n in ("return_tensors", "device") if n in text_options}
            shared.update(image_options)
            return self.image_processor(images, **shared)
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(one, str) for one in texts):
            raise UserError("text must be a string or a list of strings")
        marks = (IMAGE_MARK,) if images is None or self.image_token is None else (IMAGE_MARK, self.image_token)
        shown = share_out(images, texts, single=isinstance(text, str), marks=marks)
        rows = [self._encode(one, pictures, image_options, marks)
                for one, pictures in zip(texts, shown, strict=True)]  # fmt: skip
        return self._batch(rows, text_options, image_options)

    def _options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options for the text and for the pictures, from all places where transformers allows them.

        Raises:
            UserError: an option is unknown, or is given twice.
        """
        flat_options = {name: value for name, value in kwargs.items() if name not in (*_NESTED, "videos", "audio")}
        made: dict[str, Any] = {n: v for n, v in self.tokenizer.init_kwargs.items() if n in _OF_TOKENIZER_INIT}
        options: tuple[dict[str, Any], dict[str, Any]] = (made, {})
        for name in ("videos", "audio", "videos_kwargs", "audio_kwargs"):
            if kwargs.get(name) is not None and kwargs[name] != {}:
                raise UserError(f"'{name}': this model reads text and pictures only")
        groups: list[tuple[str, Mapping[str, Any]]] = [(name, kwargs.get(name) or {}) for name in _NESTED[:3]]
        for group, values in [*groups, ("", flat_options)]:
            for name, value in values.items():
                kinds = [kind for kind, known in (("text_kwargs", TEXT_OPTIONS), ("images_kwargs", IMAGE_OPTIONS))
                         if name in known and group in ("", "common_kwargs", kind)]  # fmt: skip
                if name in ("return_tensors", "device") and group == "images_kwargs":
                    kinds = ["images_kwargs"]
                if not kinds:
                    refuse_unknown("the processor", {name: value})
                for kind in kinds:
                    if not group and name in (kwargs.get(kind) or {}):
                        raise UserError(f"'{name}' is set both in '{kind}' and directly")
                    options[kind == "images_kwargs"][name] = value
        return options

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """How many tokens and tiles pictures of these sizes (height, width) take."""
        if video_sizes is not None:
            raise UserError("'video_sizes': this model reads text and pictures only")
        if image_sizes is None:
            return MultiModalData()
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        vision = self._ours.config.vision
        each = 1 if vision is None or vision.max_side is not None else vision.tokens_per_tile
        return MultiModalData(num_image_tokens=[count * each for count in patches], num_image_patches=patches)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages → the prompt as text or, with ``tokenize``, as ids (and tiles, with ``return_dict``).

        With the model's own template, the ids are those of ``mmmamba``'s own processor: each text is tokenised
        separately, and the name of a special token in a message is plain text. Any other template is rendered within a
        budget, and its prompt is read as :meth:`__call__` reads a text.

        Args:
            conversation: messages of ``role`` (user, assistant; system first) and ``content`` (a text, or a list of
                ``{"type": "text", "text": …}`` and ``{"type": "image", "image" | "url" | "path" | "base64": …}``),
                or a list of such conversations.
            chat_template: Jinja text that replaces the processor's own, or the name of one of several templates.
            tools, documents: for templates that read them: JSON (or functions, as transformers describes them).
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open, so that the model continues it.
            return_assistant_tokens_mask: also return ``assistant_masks``: 1 for the tokens of answers and their end
                marks (in another template: for what ``{% generation %}`` marks).
            tokenize: return ids, not text.
            return_tensors: ``pt`` or ``np``; otherwise lists.
            return_dict: return a :class:`BatchFeature`, not only the ids.
            processor_kwargs: options of :meth:`__call__`.
            kwargs: variables that the template reads (plain data), and options of :meth:`__call__`.

        Raises:
            UserError: the messages have another form, or an argument would not be used.
        """
        if not conversation:
            raise UserError("the conversation has no messages")
        if continue_final_message and add_generation_prompt:
            raise UserError("continue_final_message and add_generation_prompt exclude each other")
        chats, batched = _chats(conversation)
        jinja = self._jinja(chat_template, tools)
        variables, options = self._arguments(
            jinja, {"tools": tool_schemas(tools), "documents": documents}, kwargs, processor_kwargs
        )
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        own = jinja.source == self._own_template
        turns = [turns_of(chat) for chat in chats] if own else []
        if own and tokenize and not continue_final_message and not any(variables.values()):
            text_options, image_options = self._options(options)
            rows = [self._chat(said, images, add_generation_prompt, image_options) for said, images in turns]
        else:
            plain = [plain_messages(chat) for chat in chats]
            names = {**self.tokenizer.special_tokens_map, **variables}
            rendered = [
                jinja.spans(messages, add_generation_prompt=add_generation_prompt, **names) for messages, _ in plain
            ]
            prompts = [text for text, _ in rendered]
            if continue_final_message:
                prompts = [left_open(text, chat) for text, chat in zip(prompts, chats, strict=True)]
            if not tokenize:
                return prompts if batched else prompts[0]
            text_options, image_options = self._options(options)
            if return_assistant_tokens_mask and "generation" not in jinja.source:
                raise UserError("the chat template does not mark answers with {% generation %}: no masks can be made")
            answers = [spans for _, spans in rendered]
            rows = self._read(prompts, [images for _, images in plain], answers, image_options)
        out = self._batch(rows, text_options, image_options, masks=return_assistant_tokens_mask)
        return out if return_dict else out["input_ids"]

    def _arguments(
        self,
        jinja: ChatJinja,
        variables: Mapping[str, Any],
        given: Mapping[str, Any],
        processor_kwargs: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variables that the template reads, and the options of :meth:`__call__`.

        Raises:
            UserError: an argument would not be used.
        """
        read, options = dict(variables), dict(processor_kwargs or {})
        for name, value in given.items():
            if name in jinja.variables and name not in _ALWAYS:
                read[name] = value
            elif name in (*TEXT_OPTIONS, *IMAGE_OPTIONS, *_NESTED):
                options[name] = value
            elif name == "sanitize_control_tokens" and value and jinja.source != self._own_template:
                raise UserError("sanitize_control_tokens: only the model's own chat template keeps text apart")
            elif name not in ("sanitize_control_tokens", "load_audio_from_video") and value is not None:
                raise UserError(f"'{name}': the chat template does not read it, and the processor has no such option")
        for name, value in read.items():
            if value and name not in jinja.variables:
                raise UserError(f"'{name}': the chat template does not read it")
        return read, options

    def _read(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Any]],
        answers: Sequence[Sequence[tuple[int, int]]],
        options: Mapping[str, Any],
    ) -> list[Encoded]:
        """Prompts that a template has written, with their pictures; ``answers`` are scored, (start, end) each."""
        marks = (IMAGE_MARK,) if self.image_token is None else (IMAGE_MARK, self.image_token)
        shown = share_out(images, prompts, single=False, marks=marks)
        return [
            self._encode(text, pictures, options, marks, [(start, min(end, len(text))) for start, end in spans])
            for text, pictures, spans in zip(prompts, shown, answers, strict=True)
        ]

    def _jinja(self, chat_template: str | None, tools: Any) -> ChatJinja:
        """The template that the caller asks for, by text or name; by default the processor's own."""
        known = self.chat_template
        source: Any = chat_template
        if isinstance(known, Mapping):
            source = known.get(chat_template or ("tool_use" if tools and "tool_use" in known else "default"), source)
        elif source is None:
            source = known
        if not isinstance(source, str):
            raise UserError("the processor has no chat template of that name")
        return _compiled(source)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        self.image_processor.save_pretrained(save_directory)  # also separately, for AutoImageProcessor
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # ---------------------------------------------------------------------------------- rows and batches

    def _chat(self, turns: Sequence[Turn], images: Sequence[Any], reply: bool, options: Mapping[str, Any]) -> Encoded:
        """A conversation, as our own processor encodes it."""
        pictures, most = [open_image(i) for i in images], options.get("max_tiles")
        return self._ours.conversation(turns, pictures, "messages", most, reply=reply)

    def _encode(
        self,
        text: str,
        images: Sequence[Any],
        options: Mapping[str, Any],
        marks: tuple[str, ...],
        answers: Sequence[tuple[int, int]] = (),
    ) -> Encoded:
        """Encode a text with special tokens, and its pictures. An answer is tokenised separately from its header.

        Args:
            marks: the marks of a picture.
            answers: (start, end) of the scored parts, in characters.
        """
        ours = self._ours
        tiles = [
            self.image_processor.tiles(image, options.get("max_tiles"), options.get("do_convert_rgb"))
            for image in images
        ]
        pictures = iter(tiles)
        ids: list[int] = []
        labels: list[int] = []
        after: Literal["start", "special", "text"] = "start"
        cuts = sorted({0, len(text), *(at for span in answers for at in span)})
        for start, end in pairwise(cuts):
            scored = any(first <= start and end <= last for first, last in answers)
            for stretch in self._stretches(text[start:end], marks):
                if stretch in marks:
                    found = ours.image_ids(next(pictures).shape[:-3])
                else:
                    found = ours.tokenizer.encode(stretch, after=after)
                if found:
                    ends_special = stretch in marks or stretch.endswith(ours.tokenizer.specials)
                    after = "special" if ends_special else "text"
                ids += found
                labels += found if scored else [UNSCORED] * len(found)
        stacked = np.concatenate([in_order(picture) for picture in tiles]) if tiles else np.empty(0, np.uint8)
        return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), stacked)

    def _stretches(self, text: str, marks: tuple[str, ...]) -> Iterator[str]:
        """The marks of pictures and the texts between them. An answer is separate from its header."""
        header = "".join(piece.text for piece in self._ours.template.reply_header())
        split = re.compile("(" + "|".join(map(re.escape, marks)) + ")")
        for i, part in enumerate(text.split(header) if header else [text]):
            for whole in [header, part] if i else [part]:
                yield from filter(None, split.split(whole))

    def _batch(
        self,
        rows: Sequence[Encoded],
        options: Mapping[str, Any],
        image_options: Mapping[str, Any],
        masks: bool = False,
    ) -> BatchFeature:
        data = padded(rows, self.tokenizer, options, self.image_token_id, masks=masks)
        if tiles := [row.tiles for row in rows if len(row.tiles)]:
            pixels = {name: image_options[name] for name in PIXEL_OPTIONS if name in image_options}
            refuse_changes(dict(image_options), self.image_processor.image_size)
            data["pixel_values"] = self.image_processor.pixels(np.concatenate(tiles), **pixels)
        return tensors(data, options.get("return_tensors"), options.get("device"))


def _chats(conversation: Any) -> tuple[list[list[Message]], bool]:
    """The messages of each conversation as dicts, and whether several conversations were given."""
    conversation = getattr(conversation, "messages", conversation)
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    chats = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
    return [[as_mapping(message) for message in chat] for chat in chats], batched


@lru_cache(maxsize=32)
def _compiled(source: str) -> ChatJinja:
    return ChatJinja(source, "chat_template")
