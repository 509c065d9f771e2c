"""The pictures of a prompt that are decoded only when the model comes to them: files, and frames of videos."""

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
    """A picture file that is known to be good: its path and its size (width, height) in pixels, upright."""

    path: Path
    size: tuple[int, int]

    @classmethod
    def check(cls, path: str | Path, where: str) -> PictureFile:
        """Decode a file to see that it is a picture and how large; its pixels are not kept.

        Raises:
            BadSample: as :func:`mmmamba.data.image_decoding.load_image` does.
        """
        return cls(Path(path), load_image(path, where).size)


#: What is decoded when it is read. It knows its size, so its tokens can be counted before.
Unread = PictureFile | Frame

#: Whatever can be shown; a PIL picture, a plain path are decoded at once.
Picture = Image.Image | str | Path | PictureFile | Frame


class Tiles:
    """uint8 (t, H, W, 3) of pictures in order, never whole in memory unless an array is asked for.

    Iterating gives tile after tile, (H, W, 3) each, and decodes a picture when its first tile is due. It may be
    repeated; nothing is kept from one time to the next.

    Args:
        pictures: tiles that are cut already, uint8 (…, H, W, 3), or what they will be cut from.
        grids: the leading dimensions of each picture's tiles, (t,) or (rows, columns).
        cut: an RGB picture, and the one it was read from, to its tiles.
        tile: the shape of a tile, (H, W, 3).
        where: opens the message of an error.
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
        """Whether all are in memory already."""
        return all(isinstance(picture, np.ndarray) for picture in self._pictures)

    @property
    def nbytes(self) -> int:
        """Bytes of the array of all."""
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
    """The pictures, one at a time, upright and RGB; frames in a row of one video take one pass over it."""
    for video, run in groupby(pictures, key=lambda picture: picture.path if isinstance(picture, Frame) else None):
        if video is None:
            yield from (load_image(picture.path, where) for picture in run)
        else:
            yield from read_frames(video, (frame.index for frame in run if isinstance(frame, Frame)))
