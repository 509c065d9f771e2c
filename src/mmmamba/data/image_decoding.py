"""Decode any picture to 8-bit RGB, upright. Only known formats are read, and sizes are bounded before decoding."""

from __future__ import annotations

import base64
import importlib.util
import io
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageFile

from mmmamba.data.exif import check_tiff, orientation, without_exif
from mmmamba.data.sample import BadSample
from mmmamba.errors import UserError
from mmmamba.input_files import read_bytes

MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 29  # of a file: the largest picture with 16 bits a channel

#: The formats that are read, by Pillow's names. Other formats may start programs (EPS), decode before their size is
#: known (ICO), or are rare and little tested.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_TOO_LARGE = f"larger than {MAX_SIDE:,} pixels a side or {MAX_PIXELS // 1_000_000} megapixels"
_BAND = 1 << 20  # pixels whose 16 bits are scaled at once
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path, where: str) -> Image.Image:
    """Read ``path`` as an upright RGB picture. Of an animation, the first frame is read.

    Colours are converted as in the published data path: alpha is *dropped*, not composited (a transparent pixel
    keeps the colour stored under it), palettes are looked up, grey is repeated, CMYK is inverted by Pillow. Sixteen-bit
    grey is scaled to 8 bits, not clipped.

    Args:
        where: ``file:line`` or another place. Error messages start with it.

    Raises:
        BadSample: the file is missing, is not a picture, is damaged, or its header announces too many pixels.
    """
    prefix = f"{where}: 'image': "
    try:
        # Decode from memory. If a header says that gigabytes follow, Python would reserve them before it reads a file.
        content = read_bytes(path, MAX_BYTES, "file", prefix)
    except UserError as error:
        raise BadSample(str(error)) from error
    if not content:
        raise BadSample(f"{prefix}empty file (zero bytes): {path}")
    return decode_image(content, where, str(path))


def decode_image(content: bytes, where: str, name: str = "picture") -> Image.Image:
    """Decode the bytes of a picture file, as :func:`load_image` does. Messages give ``name`` instead of a path.

    Raises:
        BadSample: as :func:`load_image`.
    """
    if not content:
        raise BadSample(f"{where}: 'image': empty (zero bytes): {name}")
    return _read(io.BytesIO(content), len(content), where, name)


def decode_text(text: str, where: str) -> Image.Image:
    """Decode a ``data:image/…;base64,…`` URL, as :func:`load_image` does.

    Raises:
        BadSample: as :func:`load_image`, or the text is not base64.
    """
    _, comma, encoded = text.partition(",")
    if not comma or len(encoded) > MAX_BYTES // 3 * 4:
        raise BadSample(f"{where}: 'image': a data URL that holds no picture, or more than {MAX_BYTES:,} bytes")
    try:
        content = base64.b64decode("".join(unquote(encoded).split()), validate=True)
    except ValueError as error:
        raise BadSample(f"{where}: 'image': a data URL that is not base64 ({error})") from error
    return decode_image(content, where, "data URL")


def from_array(values: np.ndarray, where: str, channels_first: bool = False) -> Image.Image:
    """An array (H, W), (H, W, c) or (c, H, W) as an RGB picture; c is 1, 3 or 4 (the fourth is alpha and dropped).

    Values are bytes, floats in [0, 1], 16-bit integers, or other numbers that are whole and in [0, 255]. 16-bit values
    are read as in a file of 16 bits: grey is rounded, and of colours the upper byte is taken, as Pillow does.

    Args:
        channels_first: how to read a shape that may be either.

    Raises:
        BadSample: the array has another shape or other values, or is too large.
    """
    prefix = f"{where}: 'image': an array of shape {tuple(values.shape)}, {values.dtype}"
    if values.ndim == 2:
        values = values[..., None]
    likely = {1: 2, 3: 2, 4: 1}  # 4 is more likely the side of a small picture
    first, last = (likely.get(values.shape[end], 0) if values.ndim == 3 else 0 for end in (0, -1))
    if not first and not last:
        raise BadSample(f"{prefix}: must be (H, W), or have 1, 3 or 4 channels first or last")
    if first > last or (first == last and channels_first):
        values = np.moveaxis(values, 0, -1)
    height, width, channels = values.shape
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS or not width or not height:
        raise BadSample(f"{prefix}: empty, or {_TOO_LARGE}")
    values = values[..., :3]
    if values.dtype == np.uint16:
        values = scale_16_bits(values) if channels == 1 else (values >> 8).astype(np.uint8)
    elif values.dtype != np.uint8:
        values = _as_bytes(values, prefix)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (height, width, 3))))


def _as_bytes(values: np.ndarray, prefix: str) -> np.ndarray:
    """Floats in [0, 1], booleans, or whole numbers in [0, 255], as bytes."""
    kind = values.dtype.kind
    if kind not in "biuf":
        raise BadSample(f"{prefix}: holds no real numbers")
    least, most = values.min(), values.max()
    if kind == "b" or (kind == "f" and 0 <= least and most <= 1):
        return np.rint(values * np.float32(255)).astype(np.uint8)
    if not (0 <= least and most <= 255) or (kind == "f" and (values != np.trunc(values)).any()):  # also for NaN
        raise BadSample(f"{prefix}: has values of {least} to {most}; must be bytes, 16-bit, or floats in [0, 1]")
    return values.astype(np.uint8)


def upright_rgb(image: Image.Image, where: str) -> Image.Image:
    """A Pillow picture as upright RGB.

    A picture that Pillow opened from a file is treated like its file: its size is bounded, its format must be one that
    is read, and it is turned as its orientation says. A picture that was made in memory is taken to be upright.

    Raises:
        BadSample: as :func:`load_image`.
    """
    if not isinstance(image, ImageFile.ImageFile):
        _check_size(image, where, "picture")
        try:
            return to_rgb(image)
        except Exception as error:
            raise BadSample(f"{where}: 'image': a picture that cannot be used ({_said(error)})") from error
    name = str(getattr(image, "filename", "") or "picture")
    if image.format not in (*FORMATS, "MPO"):  # MPO: a JPEG with more pictures after the first
        raise BadSample(f"{where}: 'image': {_not_read(image.format)}: {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _finished(image, b"", b"", where, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB. 16-bit grey is scaled so that 65,535 becomes 255."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # "I;16" and its byte orders; some Pillow versions open 16-bit PNG as "I"
        grey = np.empty((image.height, image.width), np.uint8)
        step = max(1, _BAND // max(1, image.width))
        for top in range(0, image.height, step):
            band = np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
            grey[top : top + step] = scale_16_bits(band)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    return image.convert("RGB")


def scale_16_bits(values: np.ndarray) -> np.ndarray:
    """Scale integers from 0…65,535 to 0…255, rounded to the nearest. Values outside are clipped first."""
    return ((np.clip(values.astype(np.int64), 0, 65535) * 255 + 32767) // 65535).astype(np.uint8)


def _read(file: BinaryIO, size: int, where: str, name: str) -> Image.Image:
    """A picture from an open file of ``size`` bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about large or odd files; whatever matters is an error
        exif = xmp = b""
        try:
            head = file.read(4)
            file.seek(0)
            if head[:3] == b"\xff\xd8\xff":
                jpeg, exif, xmp = without_exif(file.read())
                file = io.BytesIO(jpeg)
            elif head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                check_tiff(file, size)
                file.seek(0)
            image = Image.open(file, formats=_formats())
        except Image.DecompressionBombError as error:
            raise BadSample(f"{where}: 'image': {_TOO_LARGE}: {name}") from error
        except Image.UnidentifiedImageError as error:
            raise BadSample(f"{where}: 'image': {_not_read()}: {name}") from error
        except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
            raise BadSample(f"{where}: 'image': damaged or unsupported picture ({_said(error)}): {name}") from error
        with image:
            return _finished(image, exif, xmp, where, name)


def _finished(image: ImageFile.ImageFile, exif: bytes, xmp: bytes, where: str, name: str) -> Image.Image:
    """Check the size, decode, and turn the picture. The result keeps no metadata of the file."""
    _check_size(image, where, name)
    try:
        image.load()
        found = to_rgb(image)
        if not exif:
            exif, xmp = _metadata(image)
        turn = _TURNS.get(orientation(exif, xmp))
        if turn is not None:
            found = found.transpose(turn)
        elif found is image:  # the object of the file is closed with the file
            found = found.copy()
    except Exception as error:
        raise BadSample(f"{where}: 'image': damaged or unsupported picture ({_said(error)}): {name}") from error
    found.info = {}
    return found


def _metadata(image: Image.Image) -> tuple[bytes, bytes]:
    """EXIF and XMP of an open picture. (Pillow itself turns a TIFF when it decodes it.)"""
    if image.format == "TIFF":
        return b"", b""
    exif = image.info.get("exif", b"")
    profile = image.info.get("Raw profile type exif")
    if not exif and isinstance(profile, str):
        try:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            exif = b""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    if not isinstance(xmp, bytes):
        xmp = str(xmp).encode("utf-8", "replace")
    return exif if isinstance(exif, bytes) else b"", xmp


@cache
def _formats() -> tuple[str, ...]:
    """The :data:`FORMATS` that the installed Pillow knows. Older versions have no AVIF."""
    return tuple(name for name in FORMATS if name != "AVIF" or importlib.util.find_spec("PIL.AvifImagePlugin"))


def _check_size(image: Image.Image, where: str, name: str) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadSample(f"{where}: 'image': {width}x{height} is {_TOO_LARGE}: {name}")
    if not width or not height:
        raise BadSample(f"{where}: 'image': {width}x{height} pixels: {name}")


def _not_read(kind: str | None = None) -> str:
    return f"not a picture of a kind that is read ({', '.join(FORMATS)})" + (f": it is {kind}" if kind else "")


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
