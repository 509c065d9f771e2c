"""Pictures as tiles, as a transformers image processor."""

from __future__ import annotations

import http.client
import os
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from mmmamba.data.images import MAX_BYTES, decode_image, decode_text, from_array, load_image, upright_rgb
from mmmamba.data.patches import patch_rows
from mmmamba.data.tiling import IMAGENET_MEAN, IMAGENET_STD, check_tiles, normalise, tile
from mmmamba.errors import UserError

MAX_DOWNLOAD, MAX_SECONDS = 100 << 20, 60  # of a picture that a URL names
_WHERE = "images"


class MMMambaImageProcessor(BaseImageProcessor):
    """Cuts each picture into the grid of tiles that is nearest to its shape, and normalises them.

    Args:
        image_size: side of a tile, in pixels; None in a model that reads text only.
        dynamic_image_size: whether a picture may become several tiles.
        use_thumbnail: whether the whole picture follows several tiles.
        min_dynamic_patch, max_dynamic_patch: fewest and most tiles, the thumbnail not counted.
        max_side: longer side, in pixels, of a picture that is read as rows of patches of ``image_size`` instead; None
            for tiles.
        image_mean, image_std: what pixels are normalised with: always ImageNet's.
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
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.image_size = image_size
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.max_side = max_side
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        if (tuple(image_mean), tuple(image_std)) != (IMAGENET_MEAN, IMAGENET_STD):
            raise UserError(f"image_mean and image_std must be {IMAGENET_MEAN} and {IMAGENET_STD}")

    def tiles(self, image: Any, max_tiles: int | None = None) -> np.ndarray:
        """One picture (whatever :func:`open_image` takes) as uint8 (t, H, W, 3).

        With ``max_side`` it is (rows, columns, H, W, 3).
        """
        if self.image_size is None:
            raise UserError("this model reads text only, it cannot be shown pictures")
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
        """Pictures in place of paths and URLs, in lists as they were given: transformers' own way has no bounds."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return open_image(image_url_or_urls)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, max_tiles: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Pictures → ``pixel_values`` (tiles, 3, H, W), float32, and ``num_tiles`` of each picture.

        Args:
            images: one picture or a list of them.
            return_tensors: ``pt``, ``np`` or None for numpy arrays.
            max_tiles: most tiles a picture may take, thumbnail not counted (default: the processor's own setting).
        """
        refuse_unknown("the image processor", kwargs)
        cut = [in_order(self.tiles(image, max_tiles)) for image in flat(images)]
        data = {"pixel_values": normalise(np.concatenate(cut)), "num_tiles": np.array([len(t) for t in cut])}
        return BatchFeature(data, tensor_type=return_tensors)


def in_order(tiles: np.ndarray) -> np.ndarray:
    """The tiles (t, H, W, 3) of a picture in the order of their tokens."""
    return tiles.reshape(-1, *tiles.shape[-3:])


def open_image(image: Any) -> Image.Image:
    """An RGB picture: Pillow's, an array or tensor, a file's bytes, a path, a URL or a data URL.

    All ways give the same pixels, and all are checked for format and size before they are decoded.

    Raises:
        UserError: naming what is wrong with it.
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
    """What a URL answers with, at most :data:`MAX_DOWNLOAD` bytes in :data:`MAX_SECONDS`."""
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
    """The pictures in nested lists of them, in order; one picture is a list of one."""
    if isinstance(images, (list, tuple)):
        return [found for image in images for found in flat(image)]
    return [] if images is None else [images]


def refuse_unknown(what: str, kwargs: dict[str, Any]) -> None:
    """Nothing that a caller asks for is dropped silently; None and False ask for nothing."""
    for name, value in kwargs.items():
        if value is not None and value is not False:
            raise UserError(f"{what} has no option '{name}'")
