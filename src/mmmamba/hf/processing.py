"""Text and pictures as model inputs, as a transformers processor that stands on our own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mmmamba.checkpoints.student import folder_from_json
from mmmamba.config import to_dict
from mmmamba.data.export import chat_template as jinja_of
from mmmamba.data.processor import UNSCORED, Encoded, Processor
from mmmamba.data.samples import GPT, HUMAN, IMAGE_MARK, SYSTEM, Turn
from mmmamba.data.template import OF_TOKENIZER, count_marks
from mmmamba.data.tiling import normalise
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.hf.image_processing import MMMambaImageProcessor, flat, in_order, open_image, refuse_unknown
from mmmamba.model.config import ModelConfig

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
        settings = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch")
        config = replace(config, **{name: getattr(image_processor, name) for name in settings})
        backend: Any = tokenizer.backend_tokenizer
        given = chat_template if chat_template is not None else tokenizer.chat_template
        ours = Processor(Tokenizer(backend.to_str(), {**tokenizer.special_tokens_map, "chat_template": given}), config)
        self._ours = ours
        self._header = "".join(piece.text for piece in ours.template.reply_header())
        self._specials = frozenset(ours.tokenizer.specials)
        longest_first = sorted({IMAGE_MARK, *self._specials}, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        of_tokenizer = config.template == OF_TOKENIZER and isinstance(given, str)
        self._own_template = given if of_tokenizer else jinja_of(ours)
        self.chat_template = chat_template if chat_template is not None else self._own_template
        image = config.img_context_token_id
        self.image_token_id = image if image >= 0 else None
        self.image_token = tokenizer.convert_ids_to_tokens(image) if image >= 0 else None

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        padding_side: Literal["left", "right"] | None = None,
        max_length: int | None = None,
        max_tiles: int | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Text and pictures → ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``.

        Special tokens in the text count as such (see :meth:`apply_chat_template` for text that must not be trusted),
        and nothing is added to it.

        Args:
            images: the pictures of the ``<image>`` marks, in order: one, a list, or a list a text. Pillow's pictures,
                arrays, paths, URLs or base64 text.
            text: one text or several.
            return_tensors: ``pt`` or ``np``; lists otherwise.
            padding: fill rows up to the longest (``True``, ``longest``) or to ``max_length``; done by default when
                tensors are asked for.
            padding_side: where (default: the tokenizer's, left).
            max_length: the length for ``padding="max_length"``.
            max_tiles: most tiles a picture may take, thumbnail not counted.
            add_special_tokens: has no effect: a prompt's first token is its template's business.

        Raises:
            UserError: when marks and pictures differ in number, or an option is not known.
        """
        refuse_unknown("the processor", kwargs)
        if text is None:
            if images is None:
                raise UserError("the processor needs text, images or both")
            return self.image_processor(images, return_tensors=return_tensors, max_tiles=max_tiles)
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(one, str) for one in texts):
            raise UserError("text must be a string or a list of strings")
        shown = _share_out(images, texts, single=isinstance(text, str))
        rows = [self._encode(one, pictures, max_tiles) for one, pictures in zip(texts, shown, strict=True)]
        return self._batch(rows, return_tensors, padding, padding_side, max_length)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages → the prompt as text or, with ``tokenize``, as ids (and tiles, with ``return_dict``).

        The ids are those of ``mmmamba``'s own processor: each text is tokenised by itself, and a special token's name
        in a message is text like any other.

        Args:
            conversation: messages of ``role`` (user, assistant; system first) and ``content`` (a text, or a list of
                ``{"type": "text", "text": …}`` and ``{"type": "image", "image" | "url" | "path" | "base64": …}``),
                or a list of such conversations.
            chat_template: Jinja text in place of the processor's own.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open, to be gone on with.
            tokenize: ids in place of text.
            return_dict: a :class:`BatchFeature` in place of the ids alone.
            return_tensors: ``pt`` or ``np``; lists otherwise.
            return_assistant_tokens_mask: also ``assistant_masks``: 1 at the tokens of answers and their end marks.
            processor_kwargs: options of :meth:`__call__`.
        """
        options = {**(processor_kwargs or {}), **kwargs}
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        if not conversation:
            raise UserError("the conversation has no messages")
        batched = not isinstance(conversation[0], Mapping)
        chats = [_turns(chat) for chat in (conversation if batched else [conversation])]
        rendered = chat_template or (self.chat_template if self.chat_template != self._own_template else None)
        if not tokenize or rendered is not None or continue_final_message:
            prompts = super().apply_chat_template(
                [_messages(turns) for turns, _ in chats],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            if not tokenize:
                return prompts if batched else prompts[0]
            if return_assistant_tokens_mask:
                raise UserError("assistant masks are made for the model's own chat template and whole messages only")
            out = self(text=prompts, images=[images for _, images in chats], **options)
        else:
            max_tiles = options.pop("max_tiles", None)
            rows = [self._chat(turns, images, add_generation_prompt, max_tiles) for turns, images in chats]
            out = self._batch(rows, **options, masks=return_assistant_tokens_mask)
        return out if return_dict else out["input_ids"]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        self.image_processor.save_pretrained(save_directory)  # also by itself, for AutoImageProcessor
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # ---------------------------------------------------------------------------------- rows and batches

    def _chat(self, turns: Sequence[Turn], images: Sequence[Any], reply: bool, max_tiles: int | None) -> Encoded:
        """A conversation, as our own processor encodes it."""
        return self._ours._conversation(turns, [open_image(i) for i in images], "messages", max_tiles, reply=reply)

    def _encode(self, text: str, images: Sequence[Any], max_tiles: int | None) -> Encoded:
        """A text in which special tokens count, with its pictures; stretches are tokenised as in :meth:`_chat`."""
        tiles = [self.image_processor.tiles(image, max_tiles) for image in images]
        pictures, tokenizer = iter(tiles), self._ours.tokenizer
        ids: list[int] = []
        text_before = False
        for stretch in self._stretches(text):
            is_text = stretch != IMAGE_MARK and stretch not in self._specials
            if is_text:
                after: Literal["start", "special", "text"] = "text" if text_before else "special" if ids else "start"
                ids += tokenizer.encode(stretch, allow_special=False, after=after)
            elif stretch == IMAGE_MARK:
                ids += self._ours._image_ids(next(pictures).shape[:-3])
            else:
                ids.append(tokenizer.token_id(stretch))
            text_before = is_text
        stacked = np.concatenate([in_order(picture) for picture in tiles]) if tiles else np.empty(0, np.uint8)
        return Encoded(np.array(ids, np.int32), np.full(len(ids), UNSCORED, np.int32), stacked)

    def _stretches(self, text: str) -> Iterator[str]:
        """Special tokens, ``<image>`` marks, and the texts between; an answer stands apart from its header."""
        for i, part in enumerate(text.split(self._header) if self._header else [text]):
            for whole in [self._header, part] if i else [part]:
                yield from filter(None, self._split.split(whole))

    def _batch(
        self,
        rows: Sequence[Encoded],
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        max_length: int | None = None,
        masks: bool = False,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        refuse_unknown("the processor", kwargs)
        side = padding_side or self.tokenizer.padding_side
        longest = max(len(row.input_ids) for row in rows)
        if padding == "max_length":
            if max_length is None or max_length < longest:
                raise UserError(f"padding to max_length {max_length}: the longest text takes {longest} tokens")
            longest = max_length
        elif padding not in (None, True, False, "longest", "do_not_pad"):
            raise UserError(f"padding must be True, False, 'longest' or 'max_length', got {padding!r}")
        elif max_length is not None:
            raise UserError("max_length goes with padding='max_length': a prompt is not cut")
        fill = padding in (True, "longest", "max_length") or (padding is None and return_tensors is not None)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

        def filled(values: np.ndarray, value: int) -> list[int]:
            blank = [value] * (longest - len(values) if fill else 0)
            return [*blank, *values.tolist()] if side == "left" else [*values.tolist(), *blank]

        data: dict[str, Any] = {
            "input_ids": [filled(row.input_ids, pad) for row in rows],
            "attention_mask": [filled(np.ones_like(row.input_ids), 0) for row in rows],
        }
        if masks:
            data["assistant_masks"] = [filled((row.labels != UNSCORED).astype(int), 0) for row in rows]
        if tiles := [row.tiles for row in rows if len(row.tiles)]:
            data["pixel_values"] = normalise(np.concatenate(tiles))
        return BatchFeature(data, tensor_type=return_tensors)


def _share_out(images: Any, texts: Sequence[str], *, single: bool) -> list[list[Any]]:
    """The pictures of each text, as many as it has marks."""
    marks = [text.count(IMAGE_MARK) for text in texts]
    nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
    if single or not nested:
        pool = flat(images)
        if not single and sum(marks) != len(pool):
            raise UserError(f"the texts have {sum(marks)} {IMAGE_MARK} marks for {len(pool)} pictures")
        shown = [pool] if single else [[pool.pop(0) for _ in range(count)] for count in marks]
    elif len(images) != len(texts):
        raise UserError(f"pictures are given for {len(images)} texts, there are {len(texts)}")
    else:
        shown = [flat(entry) for entry in images]
    for i, (count, pictures) in enumerate(zip(marks, shown, strict=True)):
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


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    names = {ours: theirs for theirs, ours in _ROLES.items()}
    return [{"role": names[turn.role], "content": turn.text} for turn in turns]
