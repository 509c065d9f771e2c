"""Encoded texts as a batch: cut where they are too long, and padded to one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from mmmamba.data.processor import UNSCORED, Encoded
from mmmamba.errors import UserError


def padded(
    rows: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerFast,
    options: Mapping[str, Any],
    image_token_id: int | None,
    *,
    masks: bool = False,
) -> dict[str, Any]:
    """``input_ids`` and what else is asked for, as lists (b of l numbers); no pixels.

    Args:
        options: those of the text; see :meth:`mmmamba.hf.processing.MMMambaProcessor.__call__`.
        masks: also ``assistant_masks``, 1 at scored tokens.

    Raises:
        UserError: for a padding, a length or a side that cannot be, and where a picture would be cut.
    """
    side = options.get("padding_side") or tokenizer.padding_side
    if side not in ("left", "right"):
        raise UserError(f"padding_side must be 'left' or 'right', got {side!r}")
    if options.get("truncation") not in (None, False, "do_not_truncate"):
        most = options.get("max_length")
        most = tokenizer.model_max_length if most is None else most
        rows = [_cut(row, most, tokenizer.truncation_side, image_token_id) for row in rows]
    length = _common_length(rows, options)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def filled(values: np.ndarray, value: int) -> list[int]:
        blank = [value] * (length - len(values) if length is not None else 0)
        return [*blank, *values.tolist()] if side == "left" else [*values.tolist(), *blank]

    data: dict[str, Any] = {"input_ids": [filled(row.input_ids, pad) for row in rows]}
    if options.get("return_attention_mask") is not False:
        data["attention_mask"] = [filled(np.ones_like(row.input_ids), 0) for row in rows]
    if masks:
        data["assistant_masks"] = [filled((row.labels != UNSCORED).astype(int), 0) for row in rows]
    if options.get("return_mm_token_type_ids"):
        data["mm_token_type_ids"] = [filled((row.input_ids == image_token_id).astype(int), 0) for row in rows]
    if not rows and options.get("return_tensors") is not None:
        data = {name: np.zeros((0, 0), np.int64) for name in data}
    return data


def _common_length(rows: Sequence[Encoded], options: Mapping[str, Any]) -> int | None:
    """The length that all rows are padded to; None where they are not padded."""
    padding, max_length = options.get("padding"), options.get("max_length")
    longest = max((len(row.input_ids) for row in rows), default=0)
    if padding == "max_length":
        if max_length is None or max_length < longest:
            raise UserError(f"padding to max_length {max_length}: the longest text takes {longest} tokens")
        longest = max_length
    elif padding not in (None, True, False, "longest", "do_not_pad"):
        raise UserError(f"padding must be True, False, 'longest' or 'max_length', got {padding!r}")
    elif max_length is not None and not options.get("truncation"):
        raise UserError("max_length goes with padding='max_length' or truncation=True: a prompt is not cut unasked")
    by_default = padding is None and options.get("return_tensors") is not None
    if padding not in (True, "longest", "max_length") and not by_default:
        return None
    multiple = options.get("pad_to_multiple_of")
    return -(-longest // multiple) * multiple if multiple else longest


def _cut(row: Encoded, most: int, side: str, image_token_id: int | None) -> Encoded:
    """The row with at most ``most`` tokens, cut on ``side``, never within pictures."""
    length = len(row.input_ids)
    if length <= most:
        return row
    kept = slice(most) if side == "right" else slice(length - most, None)
    cut = Encoded(row.input_ids[kept], row.labels[kept], row.tiles)
    if image_token_id is not None:
        before, after = ((one.input_ids == image_token_id).sum() for one in (row, cut))
        if after < before:
            raise UserError(f"truncation to {most} tokens would cut a picture: the text takes {length}")
    return cut
