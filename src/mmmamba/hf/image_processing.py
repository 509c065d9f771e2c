"""A transformers image processor: pictures to tiles."""

from __future__ import annotations

import http.client
import math
import os
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from mmmamba.data.image_decoding import MAX_BYTES, decode_image, decode_text, from_array, load_image, upright_rgb
from mmmamba.data.patches import fitted_size, patch_rows
from mmmamba.data.tiling import IMAGENET_MEAN, IMAGENET_STD, check_tiles, grid, normalise, tile
from mmmamba.errors import UserError

MAX_DOWNLOAD, MAX_SECONDS = 100 << 20, 60  # bytes and seconds for a picture from a URL
_WHERE = "images"


class MMMambaImageProcessor(BaseImageProcessor):
    """Cuts each picture into the grid of tiles that is nearest to its shape, and normalises the tiles.

    Pictures are always resized to tiles of ``image_size``, bicubic. ``do_resize``, ``resample`` and ``size`` may be
    given, but only with these values.

    Args:
        image_size: side of a tile, in pixels; None for a model that reads text only.
        dynamic_image_size: whether a picture may become several tiles.
        use_thumbnail: whether a thumbnail of the whole picture follows if there are several tiles.
        min_dynamic_patch, max_dynamic_patch: fewest and most tiles, without the thumbnail.
        max_side: if set, a picture is read as rows of patches of ``image_size`` pixels, not as tiles, and this is the
            largest side in pixels that it may have.
        do_rescale, rescale_factor: whether pixels are multiplied, and by what (1/255).
        do_normalize, image_mean, image_std: whether pixels are normalised, and with what (ImageNet's values; our models
            are trained with them).
        do_convert_rgb: whether other pictures are converted to RGB. If not, they are refused.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        image_size: int | None = 448,
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 12,
        max_side: int | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        refuse_changes(kwargs, image_size)
        super().__init__(**{name: value for name, value in kwargs.items() if name not in _FIXED})
        self.image_size = image_size
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.max_side = max_side
        self.image_mean, self.image_std = _three(image_mean, "image_mean"), _three(image_std, "image_std")
        self.do_rescale, self.rescale_factor, self.do_normalize = do_rescale, rescale_factor, do_normalize
        self.do_convert_rgb = do_convert_rgb

    def tiles(self, image: Any, max_tiles: int | None = None, do_convert_rgb: bool | None = None) -> np.ndarray:
        """One picture (whatever :func:`open_image` takes) as uint8 (t, H, W, 3).

        With ``max_side`` it is (rows, columns, H, W, 3).
        """
        if self.image_size is None:
            raise UserError("this model reads text only, it cannot be shown pictures")
        if not (self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb):
            mode, shape = getattr(image, "mode", None), getattr(image, "shape", ())
            if mode != "RGB" and 3 not in (*shape[-1:], *shape[-3:-2]):
                raise UserError(
                    "do_convert_rgb=False: the picture is not RGB, which this model reads, or not known to be"
                )
        if self.max_side is not None:
            if max_tiles is not None:
                raise UserError("max_tiles: this model reads a picture as rows of patches, not as tiles")
            return patch_rows(open_image(image), self.image_size, self.max_side)
        most = self.max_dynamic_patch if max_tiles is None else max_tiles
        check_tiles(most)
        least = self.min_dynamic_patch
        if not self.dynamic_image_size:
            least = most = 1
        return tile(open_image(image), self.image_size, most, min(least, most), self.use_thumbnail)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Replace paths and URLs by pictures, keeping the lists. (transformers' own method has no bounds.)"""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return open_image(image_url_or_urls)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As :meth:`preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, max_tiles: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Pictures → ``pixel_values`` (tiles, 3, H, W), float32, and ``num_tiles`` of each picture.

        Args:
            images: one picture or (nested) lists of them.
            return_tensors: ``pt``, ``np`` or None for numpy arrays.
            max_tiles: most tiles for a picture, without the thumbnail (default: the processor's own setting).
            kwargs: ``device``, and ``do_rescale``, ``rescale_factor``, ``do_normalize``, ``image_mean`` and
                ``image_std`` to override the processor's own.

        Raises:
            UserError: for any other option, unless it asks for what is done anyway.
        """
        pixels = {name: kwargs.pop(name) for name in PIXEL_OPTIONS if name in kwargs}
        device, convert = kwargs.pop("device", None), kwargs.pop("do_convert_rgb", None)
        refuse_changes(kwargs, self.image_size)
        refuse_unknown("the image processor", {name: kwargs[name] for name in kwargs if name not in _FIXED})
        cut = [in_order(self.tiles(image, max_tiles, convert)) for image in flat(images)]
        if not cut:
            raise UserError("the image processor needs at least one picture")
        data = {
            "pixel_values": self.pixels(np.concatenate(cut), **pixels),
            "num_tiles": np.array([len(t) for t in cut]),
        }
        return tensors(data, return_tensors, device)

    def pixels(self, tiles: np.ndarray, **options: Any) -> np.ndarray:
        """uint8 (t, H, W, 3) → float32 (t, 3, H, W). ``options`` override the processor's settings."""
        named = {name: getattr(self, name) if options.get(name) is None else options[name] for name in PIXEL_OPTIONS}
        mean, std = (tuple(_three(named[name], name)) for name in ("image_mean", "image_std"))
        factor = named["rescale_factor"]
        if named["do_rescale"] and named["do_normalize"] and (mean, std, factor) == (
            IMAGENET_MEAN, IMAGENET_STD, 1 / 255
        ):  # fmt: skip
            return normalise(tiles)
        values: np.ndarray = tiles.astype(np.float32)
        if named["do_rescale"]:
            values = values * np.float32(factor)
        if named["do_normalize"]:
            values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: Any = None) -> int:
        """The number of tiles (or patches) for a picture of this size, including the thumbnail."""
        if self.image_size is None:
            raise UserError("this model reads text only, it cannot be shown pictures")
        if self.max_side is not None:
            fitted = fitted_size(width, height, self.image_size, self.max_side)
            return (fitted[0] // self.image_size) * (fitted[1] // self.image_size)
        most = (images_kwargs or {}).get("max_tiles") or self.max_dynamic_patch
        least = min(self.min_dynamic_patch, most)
        if not self.dynamic_image_size:
            least = most = 1
        columns, rows = grid(width, height, self.image_size, least, most)
        return columns * rows + (self.use_thumbnail and columns * rows > 1)


#: Options of a call about the pixels of the tiles.
PIXEL_OPTIONS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
#: Options that have only one allowed value.
_FIXED = ("do_resize", "resample", "size", "do_center_crop", "crop_size", "do_pad", "data_format",
          "input_data_format", "disable_grouping", "default_to_square")  # fmt: skip
IMAGE_OPTIONS = (*PIXEL_OPTIONS, *_FIXED, "do_convert_rgb", "max_tiles")


def refuse_changes(options: dict[str, Any], image_size: int | None) -> None:
    """Refuse options that would change how tiles are made.

    Raises:
        UserError: naming the option and its allowed value.
    """
    side = {"height": image_size, "width": image_size}
    allowed: dict[str, tuple[Any, ...]] = {
        "do_resize": (True,), "resample": (3, Image.Resampling.BICUBIC),
        "size": (image_size, side, {"shortest_edge": image_size}), "do_center_crop": (False,), "crop_size": (),
        "do_pad": (False,), "data_format": ("channels_first",),
        "input_data_format": ("channels_first", "channels_last"),
        "disable_grouping": (True, False), "default_to_square": (True,),
    }  # fmt: skip
    for name in _FIXED:
        value = options.get(name)
        if value is not None and hasattr(value, "items"):
            value = {side: length for side, length in value.items() if length is not None}
        if value is not None and value not in allowed[name]:
            shown = " or ".join(repr(one) for one in allowed[name][:1]) or "left out"
            raise UserError(f"{name}={value!r}: this model's pictures are cut into tiles, so it must be {shown}")


def tensors(data: dict[str, Any], return_tensors: Any, device: Any = None) -> BatchFeature:
    """``data`` as tensors of the requested kind, on ``device``."""
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in (None, "pt", "np"):
        raise UserError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
    if device is not None and kind != "pt":
        raise UserError("device goes with return_tensors='pt'")
    made = BatchFeature(data, tensor_type=kind)
    if device is not None:
        made.to(device)
    return made


def _three(values: Any, name: str) -> list[float]:
    found = [values] * 3 if isinstance(values, (int, float)) else list(values)
    if len(found) != 3 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in found):
        raise UserError(f"{name} must be a number for each of three colours, got {values!r:.80}")
    if name == "image_std" and 0 in found:
        raise UserError("image_std must not be 0")
    return [float(value) for value in found]


def in_order(tiles: np.ndarray) -> np.ndarray:
    """The tiles (t, H, W, 3) of a picture in the order of their tokens."""
    return tiles.reshape(-1, *tiles.shape[-3:])


def open_image(image: Any) -> Image.Image:
    """An RGB picture from a Pillow picture, an array or tensor, a file's bytes, a path, a URL or a data URL.

    All sources give the same pixels. Format and size are always checked before decoding.

    Raises:
        UserError: saying what is wrong with the picture.
    """
    if isinstance(image, Image.Image):
        return upright_rgb(image, _WHERE)
    if isinstance(image, torch.Tensor):
        plain = image.detach().cpu()
        plain = plain.float() if plain.is_floating_point() else plain
        return from_array(plain.numpy(), _WHERE, channels_first=True)
    if isinstance(image, np.ndarray):
        return from_array(image, _WHERE)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), _WHERE)
    if hasattr(image, "read"):
        return decode_image(image.read(MAX_BYTES + 1), _WHERE)
    if not isinstance(image, (str, os.PathLike)):
        kind = type(image).__name__
        raise UserError(f"{_WHERE}: a picture may be Pillow's, an array, bytes, a path or a URL, not {kind}")
    text = str(image)
    if text.startswith("data:"):
        return decode_text(text, _WHERE)
    if text.startswith(("http://", "https://")):
        return decode_image(_fetched(text), _WHERE, text)
    return load_image(text, _WHERE)


def _fetched(url: str) -> bytes:
    """The content of a URL: at most :data:`MAX_DOWNLOAD` bytes within :data:`MAX_SECONDS`."""
    parts, size, began = [], 0, time.monotonic()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mmmamba"})
        with urllib.request.urlopen(request, timeout=10) as response:
            while part := response.read(1 << 16):
                parts.append(part)
                size += len(part)
                if size > MAX_DOWNLOAD or time.monotonic() - began > MAX_SECONDS:
                    raise UserError(f"{url}: not read: over {MAX_DOWNLOAD:,} bytes, or {MAX_SECONDS} seconds")
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise UserError(f"{url}: not read: {error}") from error
    return b"".join(parts)


def flat(images: Any) -> list[Any]:
    """The pictures of nested lists, in order. A single picture becomes a list of one."""
    if isinstance(images, (list, tuple)):
        return [found for image in images for found in flat(image)]
    return [] if images is None else [images]


def refuse_unknown(what: str, kwargs: dict[str, Any]) -> None:
    """Refuse unknown options, so that nothing is dropped silently. None asks for nothing."""
    for name, value in kwargs.items():
        if value is not None:
            raise UserError(f"{what} has no option '{name}'")
