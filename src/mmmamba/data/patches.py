"""Pictures as rows of patches (SOLO): any shape, nothing cut off, one token for each patch, a mark between rows.

The size rule, the resampling and the marks are those of the published inference code. Its fine-tuning script stretches
every picture to 1024×1024 instead. We have not checked on a released checkpoint which of the two its weights have seen.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from PIL import Image

PATCH_START = "<vision>"
PATCH = "<vpatch>"
ROW_SEPARATOR = "<vrow_sep>"
#: The published code closes a picture with the opening mark; the tokenizer's ``</vision>`` is never written.
PATCH_END = PATCH_START


def fitted_size(width: int, height: int, patch_size: int, max_side: int) -> tuple[int, int]:
    """(width, height) that a picture is resized to: multiples of ``patch_size``, the longer side at most ``max_side``.

    The longer side is rounded up to a multiple and bounded. The shorter side follows in proportion and is rounded up.
    """
    longer = min(ceil(max(width, height) / patch_size) * patch_size, max_side)
    in_proportion = int(longer * min(width, height) / max(width, height))
    shorter = max(1, ceil(in_proportion / patch_size)) * patch_size  # the published rule gives 0 for the narrowest
    return (longer, shorter) if height <= width else (shorter, longer)


def patch_rows(image: Image.Image, patch_size: int, max_side: int) -> np.ndarray:
    """The patches of an RGB picture, in its rows and columns.

    Returns:
        uint8 (rows, columns, patch_size, patch_size, 3)
    """
    width, height = fitted_size(image.width, image.height, patch_size, max_side)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    grid = pixels.reshape(height // patch_size, patch_size, width // patch_size, patch_size, 3)
    return np.ascontiguousarray(grid.swapaxes(1, 2))


def patch_marks(rows: int, columns: int) -> list[str]:
    """The special tokens of a picture: rows of ``<vpatch>`` with ``<vrow_sep>`` between them."""
    marks = [PATCH_START]
    for row in range(rows):
        marks += [ROW_SEPARATOR] * (row > 0) + [PATCH] * columns
    return [*marks, PATCH_END]
