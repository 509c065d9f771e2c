"""Text and pictures as model inputs, as a transformers processor that stands on our own."""

from __future__ import annotations

import json
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
from transformers.utils.chat_template_utils import get_json_schema

from mmmamba.checkpoints.student import folder_from_json
from mmmamba.config_files import to_dict
from mmmamba.data.chat_template import OF_TOKENIZER, count_marks
from mmmamba.data.jinja_chat import ChatJinja
from mmmamba.data.processor import UNSCORED, Encoded, Processor
from mmmamba.data.sample import GPT, HUMAN, IMAGE_MARK, SYSTEM, Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.transformers_files import chat_template as jinja_of
from mmmamba.data.transformers_files import without_generation
from mmmamba.errors import UserError
from mmmamba.hf.image_processing import (
    IMAGE_OPTIONS,
    PIXEL_OPTIONS,
    MMMambaImageProcessor,
    flat,
    in_order,
    open_image,
    refuse_changes,
    refuse_unknown,
    tensors,
)
from mmmamba.model.config import ModelConfig

#: Options that are the text's; see :meth:`MMMambaProcessor.__call__`.
TEXT_OPTIONS = ("add_special_tokens", "device", "max_length", "pad_to_multiple_of", "padding", "padding_side",
                "return_attention_mask", "return_mm_token_type_ids", "return_tensors", "truncation")  # fmt: skip
_OF_TOKENIZER_INIT = ("max_length", "padding", "truncation", "pad_to_multiple_of")
_NESTED = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")
_ALWAYS = ("messages", "add_generation_prompt", "tools", "documents")
_TILES = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch")
_ROLES = {"user": HUMAN, "assistant": GPT, "system": SYSTEM}

Message = Mapping[str, Any]


class MMMambaProcessor(ProcessorMixin):
    """Tokenizer, chat template and image settings of one model.

    Args:
        image_processor: cuts pictures into tiles.
        tokenizer: the model's fast tokenizer.
        model: the model's config (ours, or its nested dict): its template, its marks, the tokens of a tile.
        chat_template: Jinja text in place of the model's own template.
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
        """Our own processor on the tokenizer as it is now: tokens may have been added to it."""
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

        Special tokens in the text count as such (see :meth:`apply_chat_template` for text that must not be trusted),
        and nothing is added to it. A picture's place is an ``<image>`` mark or ``image_token``.

        Args:
            images: the pictures of the marks, in order: one, a list, or a list a text. Pillow's pictures, arrays,
                paths, URLs or base64 text.
            text: one text or several.
            kwargs: options of the text (:data:`TEXT_OPTIONS`) and of the pictures (those of the image processor), as
                they are or within ``text_kwargs``, ``images_kwargs``, ``common_kwargs``:
                ``return_tensors`` (``pt``, ``np``; lists otherwise), ``device``;
                ``padding`` (``True``, ``longest``, ``max_length``; done by default when tensors are asked for),
                ``padding_side``, ``pad_to_multiple_of``, ``max_length``, ``truncation`` (with ``truncation_side`` of
                the tokenizer; never within a picture), ``return_mm_token_type_ids`` (1 where a token is a picture's),
                ``max_tiles``. ``add_special_tokens`` has no effect: a prompt's first token is its template's business.

        Raises:
            UserError: when marks and pictures differ in number, or an option is not known.
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
        shown = _share_out(images, texts, single=isinstance(text, str), marks=marks)
        rows = [self._encode(one, pictures, image_options, marks)
                for one, pictures in zip(texts, shown, strict=True)]  # fmt: skip
        return self._batch(rows, text_options, image_options)

    def _options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of the text and of the pictures, from where transformers lets them stand.

        Raises:
            UserError: for one that is not known, or stands twice.
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
                        raise UserError(f"'{name}' stands both in '{kind}' and by itself")
                    options[kind == "images_kwargs"][name] = value
        return options

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """How many tokens and tiles pictures of these (height, width) take, without the pictures."""
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

        With the model's own template the ids are those of ``mmmamba``'s own processor: each text is tokenised by
        itself, and a special token's name in a message is text like any other. Another template is rendered in bounds,
        and its prompt is read as :meth:`__call__` reads a text.

        Args:
            conversation: messages of ``role`` (user, assistant; system first) and ``content`` (a text, or a list of
                ``{"type": "text", "text": …}`` and ``{"type": "image", "image" | "url" | "path" | "base64": …}``),
                or a list of such conversations.
            chat_template: Jinja text in place of the processor's own, or the name of one of several.
            tools, documents: for templates that read them: JSON (or functions, as transformers describes them).
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open, to be gone on with.
            return_assistant_tokens_mask: also ``assistant_masks``: 1 at the tokens of answers and their end marks (in
                another template: of what ``{% generation %}`` marks).
            tokenize: ids in place of text.
            return_tensors: ``pt`` or ``np``; lists otherwise.
            return_dict: a :class:`BatchFeature` in place of the ids alone.
            processor_kwargs: options of :meth:`__call__`.
            kwargs: variables that the template reads (plain data), and options of :meth:`__call__`.

        Raises:
            UserError: for messages of another form, and for an argument that nothing would read.
        """
        if not conversation:
            raise UserError("the conversation has no messages")
        conversation = getattr(conversation, "messages", conversation)
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        chats = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
        given = [[_mapping(message) for message in chat] for chat in chats]
        jinja = self._jinja(chat_template, tools)
        variables: dict[str, Any] = {"tools": _schemas(tools), "documents": documents}
        options = dict(processor_kwargs or {})
        for name, value in kwargs.items():
            if name in jinja.variables and name not in _ALWAYS:
                variables[name] = value
            elif name in (*TEXT_OPTIONS, *IMAGE_OPTIONS, *_NESTED):
                options[name] = value
            elif name == "sanitize_control_tokens" and value and jinja.source != self._own_template:
                raise UserError("sanitize_control_tokens: only the model's own chat template keeps text apart")
            elif name not in ("sanitize_control_tokens", "load_audio_from_video") and value is not None:
                raise UserError(f"'{name}': the chat template does not read it, and the processor has no such option")
        for name, value in variables.items():
            if value and name not in jinja.variables:
                raise UserError(f"'{name}': the chat template does not read it")
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        if continue_final_message and add_generation_prompt:
            raise UserError("continue_final_message and add_generation_prompt exclude each other")
        if (
            jinja.source == self._own_template
            and tokenize
            and not continue_final_message
            and not any(variables.values())
        ):
            text_options, image_options = self._options(options)
            turns = [_turns(chat) for chat in given]
            rows = [self._chat(said, images, add_generation_prompt, image_options) for said, images in turns]
            out = self._batch(rows, text_options, image_options, masks=return_assistant_tokens_mask)
            return out if return_dict else out["input_ids"]
        if jinja.source == self._own_template:
            for chat in given:
                _turns(chat)
        plain = [_plain(chat) for chat in given]
        rendered = [jinja.spans(messages, add_generation_prompt=add_generation_prompt,
                                **{**self.tokenizer.special_tokens_map, **variables})
                    for messages, _ in plain]  # fmt: skip
        prompts = [_left_open(text, chat) if continue_final_message else text
                   for (text, _), chat in zip(rendered, given, strict=True)]  # fmt: skip
        if not tokenize:
            return prompts if batched else prompts[0]
        text_options, image_options = self._options(options)
        if return_assistant_tokens_mask and "generation" not in jinja.source:
            raise UserError("the chat template does not mark answers with {% generation %}: no masks can be made")
        marks = (IMAGE_MARK,) if self.image_token is None else (IMAGE_MARK, self.image_token)
        shown = _share_out([images for _, images in plain], prompts, single=False, marks=marks)
        rows = [self._encode(text, images, image_options, marks, [(a, min(b, len(text))) for a, b in spans])
                for text, images, (_, spans) in zip(prompts, shown, rendered, strict=True)]  # fmt: skip
        out = self._batch(rows, text_options, image_options, masks=return_assistant_tokens_mask)
        return out if return_dict else out["input_ids"]

    def _jinja(self, chat_template: str | None, tools: Any) -> ChatJinja:
        """The template that is asked for, by its text or its name; the processor's own otherwise."""
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
        self.image_processor.save_pretrained(save_directory)  # also by itself, for AutoImageProcessor
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # ---------------------------------------------------------------------------------- rows and batches

    def _chat(self, turns: Sequence[Turn], images: Sequence[Any], reply: bool, options: Mapping[str, Any]) -> Encoded:
        """A conversation, as our own processor encodes it."""
        pictures, most = [open_image(i) for i in images], options.get("max_tiles")
        return self._ours._conversation(turns, pictures, "messages", most, reply=reply)

    def _encode(
        self,
        text: str,
        images: Sequence[Any],
        options: Mapping[str, Any],
        marks: tuple[str, ...],
        answers: Sequence[tuple[int, int]] = (),
    ) -> Encoded:
        """A text in which special tokens count, with its pictures; an answer stands apart from its header.

        Args:
            marks: what stands for a picture.
            answers: (start, end) of what is scored, in characters.
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
                    found = ours._image_ids(next(pictures).shape[:-3])
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
        """The marks of pictures, and the texts between; an answer stands apart from its header."""
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
        padding, max_length = options.get("padding"), options.get("max_length")
        return_tensors = options.get("return_tensors")
        side = options.get("padding_side") or self.tokenizer.padding_side
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            most = max_length if max_length is not None else self.tokenizer.model_max_length
            rows = [self._cut(row, most) for row in rows]
        longest = max((len(row.input_ids) for row in rows), default=0)
        if padding == "max_length":
            if max_length is None or max_length < longest:
                raise UserError(f"padding to max_length {max_length}: the longest text takes {longest} tokens")
            longest = max_length
        elif padding not in (None, True, False, "longest", "do_not_pad"):
            raise UserError(f"padding must be True, False, 'longest' or 'max_length', got {padding!r}")
        elif max_length is not None and not options.get("truncation"):
            raise UserError("max_length goes with padding='max_length' or truncation=True: a prompt is not cut unasked")
        if side not in ("left", "right"):
            raise UserError(f"padding_side must be 'left' or 'right', got {side!r}")
        fill = padding in (True, "longest", "max_length") or (padding is None and return_tensors is not None)
        if (multiple := options.get("pad_to_multiple_of")) and fill:
            longest = -(-longest // multiple) * multiple
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

        def filled(values: np.ndarray, value: int) -> list[int]:
            blank = [value] * (longest - len(values) if fill else 0)
            return [*blank, *values.tolist()] if side == "left" else [*values.tolist(), *blank]

        data: dict[str, Any] = {"input_ids": [filled(row.input_ids, pad) for row in rows]}
        if options.get("return_attention_mask") is not False:
            data["attention_mask"] = [filled(np.ones_like(row.input_ids), 0) for row in rows]
        if masks:
            data["assistant_masks"] = [filled((row.labels != UNSCORED).astype(int), 0) for row in rows]
        if options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = [filled((row.input_ids == self.image_token_id).astype(int), 0) for row in rows]
        if not rows and return_tensors is not None:
            data = {name: np.zeros((0, 0), np.int64) for name in data}
        if tiles := [row.tiles for row in rows if len(row.tiles)]:
            pixels = {name: image_options[name] for name in PIXEL_OPTIONS if name in image_options}
            refuse_changes(dict(image_options), self.image_processor.image_size)
            data["pixel_values"] = self.image_processor.pixels(np.concatenate(tiles), **pixels)
        return tensors(data, return_tensors, options.get("device"))

    def _cut(self, row: Encoded, most: int) -> Encoded:
        """The row, at most ``most`` tokens long: cut on the tokenizer's ``truncation_side``, never within pictures."""
        if len(row.input_ids) <= most:
            return row
        kept = slice(most) if self.tokenizer.truncation_side == "right" else slice(len(row.input_ids) - most, None)
        cut = Encoded(row.input_ids[kept], row.labels[kept], row.tiles)
        if (
            self.image_token_id is not None
            and (cut.input_ids == self.image_token_id).sum() < (row.input_ids == self.image_token_id).sum()
        ):
            raise UserError(f"truncation to {most} tokens would cut a picture: the text takes {len(row.input_ids)}")
        return cut


def _share_out(images: Any, texts: Sequence[str], *, single: bool, marks: Sequence[str]) -> list[list[Any]]:
    """The pictures of each text, as many as it has of ``marks``."""
    counts = [sum(text.count(mark) for mark in marks) for text in texts]
    nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
    if single or not nested:
        pool = flat(images)
        if not single and sum(counts) != len(pool):
            raise UserError(f"the texts have {sum(counts)} {IMAGE_MARK} marks for {len(pool)} pictures")
        shown = [pool] if single else [[pool.pop(0) for _ in range(count)] for count in counts]
    elif len(images) != len(texts):
        raise UserError(f"pictures are given for {len(images)} texts, there are {len(texts)}")
    else:
        shown = [flat(entry) for entry in images]
    for i, (count, pictures) in enumerate(zip(counts, shown, strict=True)):
        if count != len(pictures):
            raise UserError(f"text {i} has {count} {IMAGE_MARK} marks for {len(pictures)} pictures")
    return shown


def _turns(messages: Sequence[Message]) -> tuple[list[Turn], list[Any]]:
    """The turns of a conversation, with a mark in the text for each picture, and the pictures."""
    turns, images = [], []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or (role == "system" and i > 0):
            raise UserError(f"message {i}: 'role' must be user or assistant (or system, first), got {role!r}")
        text = ""
        parts = [{"type": "text", "text": content or ""}] if not isinstance(content, (list, tuple)) else content
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                text += part["text"]
            elif part.get("type") in ("image", "image_url") and role == "user":
                images.append(_picture(part, i))
                text += IMAGE_MARK if part is parts[-1] else f"{IMAGE_MARK}\n"
            else:
                raise UserError(f"message {i}: a part must be text or, in a user's message, an image; got {part!r:.80}")
        turns.append(Turn(_ROLES[role], text))
    if count_marks(turns) != len(images):
        raise UserError(f"the messages have {count_marks(turns)} {IMAGE_MARK} marks for {len(images)} pictures")
    return turns, images


def _picture(part: Message, message: int) -> Any:
    if (url := part.get("image_url")) is not None:
        return url["url"] if isinstance(url, Mapping) else url
    if (encoded := part.get("base64")) is not None:
        return encoded if str(encoded).startswith("data:") else f"data:image/png;base64,{encoded}"
    for source in ("image", "url", "path"):
        if part.get(source) is not None:
            return part[source]
    raise UserError(f"message {message}: an image part has no 'image', 'url', 'path' or 'base64'")


def _mapping(entry: Any) -> Message:
    """A message, or a part of one, that is given as an object (a dataclass, a pydantic model), as its dict."""
    if isinstance(entry, str):
        raise UserError(f"a message must have a role and a content, got {entry!r:.80}")
    found = entry
    if not isinstance(entry, Mapping):
        fields = (
            entry.model_dump() if hasattr(entry, "model_dump") else vars(entry) if hasattr(entry, "__dict__") else {}
        )
        found = {name: value for name, value in fields.items() if value is not None}
    if isinstance(content := found.get("content"), (list, tuple)):
        found = {**found, "content": [part if isinstance(part, (str, Mapping)) else _mapping(part) for part in content]}
    return dict(found)


def _plain(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages as plain data, for a template: without the pictures themselves, which come second.

    A template is somebody else's program: what has methods would lend them to it.
    """
    found, images = [], []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind in ("image", "image_url"):
                    images.append(_picture(part, i))
                    named = {"url": images[-1], **part}
                    parts.append(
                        {n: named[n] for n in ("url", "path") if isinstance(named.get(n), str)} | {"type": "image"}
                    )
                elif kind == "text" and isinstance(part.get("text"), str):
                    parts.append(dict(part))
                else:
                    raise UserError(f"message {i}: a part must be text or an image; got {part!r:.80}")
            content = parts
        texts = [part.get("text", "") for part in content] if isinstance(content, list) else [content]
        if any(isinstance(text, str) and IMAGE_MARK in text for text in texts):
            raise UserError(f"message {i}: {IMAGE_MARK} in a text: give pictures as parts of a message")
        found.append({**message, "content": content})
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise UserError(f"messages must be plain data ({error})") from error
    return found, images


def _schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    """Tools as JSON: functions are described by their signature and docstring, as transformers does."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise UserError("tools must be a list of functions or of JSON schemas")
    found = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
    try:
        return list(json.loads(json.dumps(found)))
    except (TypeError, ValueError) as error:
        raise UserError(f"tools must be functions or plain data ({error})") from error


def _left_open(prompt: str, messages: Sequence[Message]) -> str:
    """The prompt up to the end of the last message's text."""
    content = messages[-1].get("content")
    if isinstance(content, (list, tuple)):
        content = next((part["text"] for part in reversed(content) if part.get("type") == "text"), None)
    for text in (content, content.strip()) if isinstance(content, str) else ():
        at = prompt.rfind(text)
        if text and at >= 0:
            return prompt[: at + len(text)]
    raise UserError("continue_final_message: the prompt does not hold the last message's text as it is")


@lru_cache(maxsize=32)
def _compiled(source: str) -> ChatJinja:
    return ChatJinja(source, "chat_template")
