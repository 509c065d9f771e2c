"""The pictures of a prompt that are decoded only when the model reads them: files, and frames of videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmmamba.data.image_decoding import load_image
from mmmamba.data.video import Frame, read_frames
from mmmamba.errors import UserError


@dataclass(frozen=True)
class PictureFile:
    """A picture file that was checked: its path and its upright size (width, height) in pixels."""

    path: Path
    size: tuple[int, int]

    @classmethod
    def check(cls, path: str | Path, where: str) -> PictureFile:
        """Decode a file to check that it is a picture, and to learn its size. Its pixels are not kept.

        Raises:
            BadSample: as :func:`mmmamba.data.image_decoding.load_image` does.
        """
        return cls(Path(path), load_image(path, where).size)


#: A picture that is decoded when it is read. Its size is known, so its tokens can be counted before that.
Unread = PictureFile | Frame

#: Anything that can be shown. A PIL picture and a plain path are decoded at once.
Picture = Image.Image | str | Path | PictureFile | Frame


class Tiles:
    """The tiles of pictures in order, uint8 (t, H, W, 3). They are never all in memory, unless somebody asks for an
    array.

    Iterating gives one tile (H, W, 3) after the other, and decodes a picture when its first tile is needed. You can
    iterate again; nothing is kept between iterations.

    Args:
        pictures: tiles that are already cut, uint8 (…, H, W, 3), or pictures that are still to be cut.
        grids: the leading dimensions of each picture's tiles, (t,) or (rows, columns).
        cut: cuts an RGB picture (first argument) that was read from a file or video (second argument) into tiles.
        tile: the shape of a tile, (H, W, 3).
        where: error messages start with it.
    """

    def __init__(
        self,
        pictures: Sequence[np.ndarray | Unread],
        grids: Sequence[tuple[int, ...]],
        cut: Callable[[Image.Image, Unread | None], np.ndarray],
        tile: tuple[int, int, int],
        where: str,
    ) -> None:
        self.grids = tuple(grids)
        self.shape = (sum(prod(grid) for grid in grids), *tile)
        self._pictures = tuple(pictures)
        self._cut = cut
        self._where = where

    @property
    def decoded(self) -> bool:
        """Whether all tiles are in memory already."""
        return all(isinstance(picture, np.ndarray) for picture in self._pictures)

    @property
    def nbytes(self) -> int:
        """Bytes of an array of all tiles."""
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for tiles in self._by_picture():
            yield from tiles

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate([*self._by_picture(), np.empty((0, *self.shape[1:]), np.uint8)])
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _by_picture(self) -> Iterator[np.ndarray]:
        """The tiles of each picture, (t, H, W, 3)."""
        images = read([picture for picture in self._pictures if not isinstance(picture, np.ndarray)], self._where)
        for picture, grid in zip(self._pictures, self.grids, strict=True):
            if isinstance(picture, np.ndarray):
                tiles = picture
            else:
                tiles = self._cut(next(images), picture)
                if tiles.shape[: len(grid)] != grid:
                    raise UserError(f"{self._where}: 'image': {picture.path} changed while it was in use")
            yield tiles.reshape(-1, *self.shape[1:])


def read(pictures: Iterable[Unread], where: str) -> Iterator[Image.Image]:
    """Read the pictures, one at a time, upright and RGB. Consecutive frames of one video take one pass over it."""
    for video, run in groupby(pictures, key=lambda picture: picture.path if isinstance(picture, Frame) else None):
        if video is None:
            yield from (load_image(picture.path, where) for picture in run)
        else:
            yield from read_frames(video, (frame.index for frame in run if isinstance(frame, Frame)))
