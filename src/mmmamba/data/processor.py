"""Turns samples and chat turns into what the model reads: token ids, labels and tiles."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from PIL import Image

from mmmamba.data.chat_template import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    OF_TOKENIZER,
    Piece,
    Template,
    add_missing_marks,
    count_marks,
    get_template,
)
from mmmamba.data.image_decoding import load_image, upright_rgb
from mmmamba.data.lazy_pictures import Picture, PictureFile, Tiles, Unread
from mmmamba.data.patches import PATCH, PATCH_END, fitted_size, patch_marks, patch_rows
from mmmamba.data.sample import GPT, HUMAN, BadSample, NothingScored, Sample, Turn
from mmmamba.data.tiling import check_tiles, grid, tile
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.tokenizer_template import PLAIN, JinjaTemplate
from mmmamba.data.transformers_files import write_transformers_files
from mmmamba.data.video import Frame
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig, VisionConfig

#: The label of a token that no loss counts.
UNSCORED = -100

# White space as the tokenizers library defines it: Unicode's. Python's has four more separators.
_SPACE_AT_START, _SPACE_AT_END = re.compile(r"\A[^\S\x1c-\x1f]+"), re.compile(r"[^\S\x1c-\x1f]+\Z")


@dataclass
class Encoded:
    """One sample, ready to be batched.

    Attributes:
        input_ids: int32 (l,)
        labels: int32 (l,), unshifted. The assistant's answers and their end marks are scored; the rest is -100.
        tiles: uint8 (t, H, W, 3), in the order of the ``<IMG_CONTEXT>`` positions. :class:`Tiles` if pictures are
            decoded only when they are read.
        cut: tokens at the end of the text that did not fit into ``max_length``.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray | Tiles
    id: str = ""
    where: str = ""
    cut: int = 0


class Processor:
    """Tokenizer, template and image settings of one model.

    The text between two special tokens is tokenised separately, and so are an answer and its header. So the ids of a
    conversation are the ids of its first prompt, followed by each generated answer and each :meth:`continuation`.
    """

    def __init__(self, tokenizer: Tokenizer | tokenizers.Tokenizer, config: ModelConfig) -> None:
        given = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_bpe(tokenizer)
        reads_rows = config.vision is not None and config.vision.max_side is not None
        self._context, self._image_end = (PATCH, PATCH_END) if reads_rows else (IMAGE_CONTEXT, IMAGE_END)
        of_code = () if config.template == OF_TOKENIZER else get_template(config.template).marks()
        # The marks of our templates and pictures are never read from text, whatever the tokenizer calls them.
        self.tokenizer = given.withholding((*of_code, *((self._context, self._image_end) if config.vision else ())))
        self.config = config
        self.template = _template(config.template, self.tokenizer)
        self._mark_ids = {mark: self.tokenizer.token_id(mark) for mark in self.template.marks()}
        self._strips = {mark: self.tokenizer.strips(mark) for mark in self._mark_ids}
        if config.img_context_token_id not in (-1, self._mark_ids.get(self._context)):
            raise UserError(
                f"the model's img_context_token_id is {config.img_context_token_id}, "
                f"but its tokenizer gives {self._context} the id {self._mark_ids.get(self._context)}"
            )
        if self.tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model's vocab_size is {config.vocab_size}"
            )
        if self.template.adds_bos and config.bos_token_id < 0:
            raise UserError(f"{self.tokenizer.where}: texts begin with a bos token, but the model has no bos_token_id")
        largest = max(self.tokenizer.largest_id, config.bos_token_id if self.template.adds_bos else -1)
        if largest >= config.vocab_size:
            raise UserError(
                f"{self.tokenizer.where}: the prompt's tokens have ids of up to {largest}, the model's vocab_size is "
                f"{config.vocab_size}"
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Processor:
        """The processor of a checkpoint folder or a built-in model."""
        from mmmamba.checkpoints import read_config, resolve  # a lazy import: checkpoints are above data

        path = resolve(folder)
        return cls(Tokenizer.from_folder(path), read_config(path))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, and those that transformers needs to load this processor.

        :meth:`from_folder` itself reads only the tokenizer's files and the model's ``config.json``.
        """
        write_transformers_files(folder, self.tokenizer, self.template, self.config, self.stop_token_ids)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: first the end mark, then the end of text and the start of another turn."""
        marks = [self.tokenizer.token_id(mark) for mark in self.template.stop_marks()]
        ids = (*marks[:1], self.config.eos_token_id, *self.config.stop_token_ids, *marks[1:])
        return tuple(token for token in dict.fromkeys(ids) if token >= 0)

    @property
    def appends(self) -> bool:
        """Whether a conversation only grows at its end. Then :meth:`continuation` can be used."""
        return self.template.appends(self.config.system_message)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special)

    def encode(
        self,
        sample: Sample,
        *,
        max_length: int | None = None,
        max_tiles: int | None = None,
        answer: bool = True,
    ) -> Encoded:
        """A whole conversation to train on or, with ``answer=False``, the prompt for its last answer.

        Args:
            max_length: longest sequence. The text of a conversation is cut at its end (``cut`` counts the tokens). A
                prompt, or a picture, that does not fit is a :class:`BadSample`.
            max_tiles: most tiles for a picture, without the thumbnail. Default: the model's own setting.
        """
        turns = sample.turns
        if not answer and turns[-1].role == GPT:
            turns = turns[:-1]
        if answer and not any(turn.role == GPT for turn in turns):
            raise NothingScored(f"{sample.where}: 'conversations' has no 'gpt' turn, so nothing is scored")
        encoded = self.conversation(turns, sample.images, sample.where, max_tiles, reply=not answer)
        encoded.id = sample.id
        return encoded if max_length is None else self._fit(encoded, max_length, cut_tail=answer)

    def prompt(self, turns: Sequence[Turn], images: Sequence[Picture] = (), *, max_tiles: int | None = None) -> Encoded:
        """The prompt of a conversation that ends with a human turn.

        A :class:`PictureFile` or a :class:`Frame` is decoded when the prompt is read. A frame is one tile.
        """
        if not turns or turns[-1].role != HUMAN:
            raise UserError("a prompt must end with a human turn")
        return self.conversation(turns, images, "prompt", max_tiles, reply=True)

    def continuation(self, turn: Turn, images: Sequence[Picture] = (), *, max_tiles: int | None = None) -> Encoded:
        """What follows a finished answer when the human says ``turn``. Pictures without a mark go before its text.

        (prompt ids) + (answer ids with the end mark) + (these ids) are the ids of the prompt of the whole conversation,
        if each picture's mark is in its own turn.

        Raises:
            UserError: the template changes what came before (``appends`` is False).
        """
        if not self.appends:
            raise UserError("this model's chat template changes what came before: read the whole conversation again")
        tiles = self._tiles([turn], images, "turn", max_tiles)
        (marked,) = add_missing_marks([turn], len(images))
        pieces = self.template.continuation(marked, self.config.system_message)
        return self._encoded(pieces, tiles, "turn", bos=False)

    def conversation(
        self,
        turns: Sequence[Turn],
        images: Sequence[Picture],
        where: str,
        max_tiles: int | None,
        *,
        reply: bool,
    ) -> Encoded:
        """A conversation with its pictures; with ``reply`` the header of the next answer follows.

        Raises:
            BadSample: naming ``where``, for a conversation that the template or the model cannot take.
        """
        tiles = self._tiles(turns, images, where, max_tiles)
        marked = add_missing_marks(turns, len(images))
        try:
            pieces = self.template.pieces(marked, system_message=self.config.system_message, reply=reply)
        except UserError as error:
            raise BadSample(f"{where}: 'conversations': {error}") from error
        return self._encoded(pieces, tiles, where, bos=self.template.adds_bos)

    def _encoded(self, pieces: Sequence[Piece], tiles: Tiles, where: str, *, bos: bool) -> Encoded:
        ids = array("i", [self.config.bos_token_id] if bos else [])
        scored: list[tuple[int, int]] = []
        grids = iter(tiles.grids)
        text_before = False
        for piece in self._stripped(pieces):
            start = len(ids)
            if piece.kind == "mark":
                ids.append(self._mark_ids[piece.text])
            elif piece.kind == "text":
                after: Literal["start", "special", "text"] = "text" if text_before else "special" if ids else "start"
                try:
                    ids.extend(self.tokenizer.encode(piece.text, allow_special=False, after=after))
                except UserError as error:
                    raise BadSample(f"{where}: 'conversations': {error}") from error
            else:
                ids.extend(self.image_ids(next(grids)))
            text_before = piece.kind == "text"
            if piece.scored:
                scored.append((start, len(ids)))
        input_ids = np.array(ids, dtype=np.int32)
        labels = np.full(len(ids), UNSCORED, dtype=np.int32)
        for start, stop in scored:
            labels[start:stop] = input_ids[start:stop]
        return Encoded(input_ids, labels, np.asarray(tiles) if tiles.decoded else tiles, where=where)

    def _stripped(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces, without the white space that marks remove (``lstrip``, ``rstrip``).

        An answer is left as it is: what was generated must be exactly what is read again.
        """
        if not any(map(any, self._strips.values())):
            yield from pieces
            return
        for before, piece, after in zip([None, *pieces], pieces, [*pieces[1:], None], strict=False):
            if piece.kind == "text" and not piece.scored:
                text = piece.text
                if before is not None and before.kind == "mark" and self._strips[before.text][1]:
                    text = _SPACE_AT_START.sub("", text)
                if after is not None and after.kind == "mark" and self._strips[after.text][0]:
                    text = _SPACE_AT_END.sub("", text)
                if not text:
                    continue
                piece = replace(piece, text=text)
            yield piece

    def image_ids(self, tiles: tuple[int, ...]) -> list[int]:
        """The tokens of a picture that takes ``tiles``: (t,), or (rows, columns) of patches."""
        assert self.config.vision is not None  # _tiles refuses pictures without it
        if self.config.vision.max_side is not None:
            return [self._mark_ids[mark] for mark in patch_marks(*tiles)]
        context = [self._mark_ids[IMAGE_CONTEXT]] * (tiles[0] * self.config.vision.tokens_per_tile)
        return [self._mark_ids[IMAGE_START], *context, self._mark_ids[IMAGE_END]]

    def _tiles(
        self,
        turns: Sequence[Turn],
        images: Sequence[Picture],
        where: str,
        max_tiles: int | None,
    ) -> Tiles:
        """The tiles of each picture: (t,), or (rows, columns) if the model reads rows of patches."""
        marks = count_marks(turns)
        if marks > len(images):
            raise BadSample(f"{where}: 'conversations' has {marks} <image> marks for {len(images)} images")
        vision = self.config.vision
        if vision is None and images:
            raise BadSample(f"{where}: 'image': this model reads text only")
        side = vision.image_size if vision else 0
        if vision is None:
            return Tiles((), (), lambda image, picture: np.asarray(image), (side, side, 3), where)
        if vision.max_side is not None and max_tiles is not None:
            raise UserError("max_tiles: this model reads a picture as rows of patches, not as tiles")
        most = self.config.max_dynamic_patch if max_tiles is None else max_tiles
        check_tiles(most)
        cut = partial(self._cut, vision, most)
        found: list[np.ndarray | Unread] = []
        grids: list[tuple[int, ...]] = []
        for image in images:
            if isinstance(image, (PictureFile, Frame)):
                found.append(image)
                grids.append(self._grid(vision, most, image))
            else:
                opened = upright_rgb(image, where) if isinstance(image, Image.Image) else load_image(image, where)
                tiles = cut(opened, None)
                found.append(tiles)
                grids.append(tiles.shape[:-3])
        return Tiles(found, grids, cut, (side, side, 3), where)

    def _limits(self, most: int, picture: Unread | None) -> tuple[int, int]:
        """The least and most tiles that a picture may be cut into. A frame of a video is always one tile."""
        if isinstance(picture, Frame) or not self.config.dynamic_image_size:
            return 1, 1
        return min(self.config.min_dynamic_patch, most), most

    def _cut(self, vision: VisionConfig, most: int, image: Image.Image, picture: Unread | None) -> np.ndarray:
        """The tiles of an RGB picture, uint8 (t, H, W, 3), or (rows, columns, H, W, 3) for rows of patches."""
        if vision.max_side is not None:
            return patch_rows(image, vision.patch_size, vision.max_side)
        least, most = self._limits(most, picture)
        return tile(image, vision.image_size, most, least, self.config.use_thumbnail)

    def _grid(self, vision: VisionConfig, most: int, picture: Unread) -> tuple[int, ...]:
        """How many tiles :meth:`_cut` will return. This is known from the picture's size."""
        if vision.max_side is not None:
            width, height = fitted_size(*picture.size, vision.patch_size, vision.max_side)
            return height // vision.patch_size, width // vision.patch_size
        least, most = self._limits(most, picture)
        columns, rows = grid(*picture.size, vision.image_size, least, most)
        return (columns * rows + (self.config.use_thumbnail and columns * rows > 1),)

    def _fit(self, encoded: Encoded, max_length: int, *, cut_tail: bool) -> Encoded:
        cut = len(encoded.input_ids) - max_length
        if cut <= 0:
            return encoded
        where, length = encoded.where, len(encoded.input_ids)
        if not cut_tail:
            raise BadSample(f"{where}: the prompt takes {length} tokens, more than max_length {max_length}")
        image_ids = [self._mark_ids[mark] for mark in (self._context, self._image_end) if mark in self._mark_ids]
        if np.isin(encoded.input_ids[max_length:], image_ids).any():
            raise BadSample(f"{where}: 'image': the image tokens do not fit into max_length {max_length}")
        labels = encoded.labels[:max_length]
        if (labels == UNSCORED).all():
            raise NothingScored(
                f"{where}: nothing is scored within max_length {max_length} (the sample takes {length})"
            )
        ids = encoded.input_ids[:max_length]
        return Encoded(ids, labels, encoded.tiles, encoded.id, where, encoded.cut + cut)


def _template(name: str, tokenizer: Tokenizer) -> Template | JinjaTemplate:
    """The template ``name``, or the tokenizer's own (a plain one, if it has none)."""
    if name != OF_TOKENIZER:
        return get_template(name)
    source, tokens = tokenizer.chat_template, tokenizer.named_tokens
    if source is None:
        source, tokens = PLAIN, {**tokens, "bos_token": tokens.get("bos_token", "") if tokenizer.adds_bos else ""}
    return JinjaTemplate(source, tokens, tokenizer.specials, tokenizer.where, tokenizer.others)
