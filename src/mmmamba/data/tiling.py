"""Dynamic tiling: a picture becomes the grid of square tiles whose shape is nearest to its own, plus a thumbnail."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from mmmamba.errors import UserError
from mmmamba.model.config import MAX_TILES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_tiles(most: int | None, name: str = "max_tiles") -> None:
    """Refuse a limit on tiles that is too large (every grid up to it is compared) or below 1."""
    if most is not None and not 1 <= most <= MAX_TILES:
        bound = f"at most {MAX_TILES:,}" if most > MAX_TILES else "at least 1"
        raise UserError(f"{name} must be {bound}, got {most}")


Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor)


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (columns, rows) with ``min_tiles`` to ``max_tiles`` tiles, small grids first."""
    check_tiles(max_tiles)
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles ({min_tiles}) and max_tiles ({max_tiles}) must satisfy 1 <= min <= max")
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


@lru_cache(maxsize=65536)
def grid(width: int, height: int, image_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) whose aspect ratio is nearest to the picture's.

    If several grids are equally near, the largest one wins of which the picture has more than half the pixels.
    """
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _grids(min_tiles, max_tiles):
        distance = abs(aspect - cols / rows)
        fills_grid = width * height > 0.5 * image_size * image_size * cols * rows
        if distance < best_distance or (distance == best_distance and fills_grid):
            best, best_distance = (cols, rows), distance
    return best


def tile(image: Image.Image, image_size: int, max_tiles: int, min_tiles: int = 1, thumbnail: bool = True) -> np.ndarray:
    """Cut an RGB picture into tiles, row by row; with several tiles the whole picture follows as a thumbnail.

    Returns:
        uint8 (t, image_size, image_size, 3)
    """
    cols, rows = grid(image.width, image.height, image_size, min_tiles, max_tiles)
    whole = _resized(image, cols * image_size, rows * image_size)
    tiles = whole.reshape(rows, image_size, cols, image_size, 3).swapaxes(1, 2)  # (rows, cols, H, W, 3)
    tiles = tiles.reshape(rows * cols, image_size, image_size, 3)
    if thumbnail and len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(image, image_size, image_size)[None]])
    return np.ascontiguousarray(tiles)


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's mean and deviation on ``device``.

    They are copied once: while a CUDA graph is captured, nothing may be.
    """
    return torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)


def normalise(tiles: Pixels) -> Pixels:
    """ImageNet-normalised pixels, channels first: uint8 (t,H,W,3) -> float32 (t,3,H,W), on the input's device."""
    if isinstance(tiles, torch.Tensor):
        mean, std = _statistics(tiles.device)
        return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    scaled = tiles.astype(np.float32) / np.float32(255)
    values = (scaled - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
