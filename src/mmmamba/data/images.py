"""A picture file as 8-bit RGB, upright, with its size bounded before anything is decoded."""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmmamba.data.samples import BadSample

MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000

# What Pillow's decoders raise on damaged files, by its source and by experience.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, MemoryError,
)  # fmt: skip
_TOO_LARGE = f"larger than {MAX_SIDE:,} pixels a side or {MAX_PIXELS // 1_000_000} megapixels"


def load_image(path: str | Path, where: str) -> Image.Image:
    """Read ``path`` as an upright RGB picture; the first frame of an animation.

    Colours are converted as the published data path does: alpha is *dropped*, not composited (a transparent pixel
    keeps the colour stored under it), palettes are looked up, grey is repeated, CMYK is inverted by Pillow. Sixteen-bit
    grey is scaled to 8 bits, not clipped.

    Args:
        where: ``file:line`` or another place name that opens the error message.

    Raises:
        BadSample: the file is missing, is no picture, is damaged, or its header asks for too many pixels.
    """
    file = Path(path)
    if not os.path.exists(file):  # unlike Path.exists, also for a name that no file system takes
        shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:300]}..."
        raise BadSample(f"{where}: 'image': no such file: {shown}")
    if not file.is_file():
        raise BadSample(f"{where}: 'image': not a file: {path}")
    if file.stat().st_size == 0:
        raise BadSample(f"{where}: 'image': empty file (zero bytes): {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, on large or odd files: what matters is said by the error
        with _open_header(file, where) as image:
            width, height = image.size
            if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
                raise BadSample(f"{where}: 'image': {width}x{height} is {_TOO_LARGE}: {path}")
            try:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
            except _DECODE_ERRORS as error:
                raise BadSample(f"{where}: 'image': damaged or unsupported picture ({error}): {path}") from error


def _open_header(file: Path, where: str) -> Image.Image:
    """Only the header is read here; Pillow refuses the very largest by itself."""
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise BadSample(f"{where}: 'image': {_TOO_LARGE}: {file}") from error
    except Image.UnidentifiedImageError as error:
        raise BadSample(f"{where}: 'image': not a picture that can be read: {file}") from error
    except _DECODE_ERRORS as error:
        raise BadSample(f"{where}: 'image': damaged or unsupported picture ({error}): {file}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB. 16-bit grey is scaled so that 65,535 becomes 255."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # "I;16" and its byte orders; some Pillow versions open 16-bit PNG as "I"
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    return image.convert("RGB")
