"""Tiles to tokens: patch embedding with a position table, pixel shuffle, projection (HoVLE's embedding of images)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.config import VisionConfig


class VisionEmbedding(nn.Module):
    """Image tokens of square tiles; class slot and ``class_embedding`` exist in the checkpoints and are unused."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        if config.pixel_shuffle_loc == "post":
            raise ValueError("pixel_shuffle_loc 'post' is not supported: the shuffle must come before the layers")
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + config.patches_per_side**2, hidden_size))
        self.patch_embedding = nn.Conv2d(3, hidden_size, config.patch_size, stride=config.patch_size)
        self.proj = (
            nn.Sequential(
                nn.Linear(hidden_size * config.shuffle**2, hidden_size),
                nn.GELU(),
                nn.Linear(hidden_size, hidden_size),
            )
            if config.use_pixel_shuffle_proj
            else None
        )

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table (1, rows·columns, d), bicubically resized when the grid is not its own."""
        table, side = self.position_embedding[:, 1:], self.config.patches_per_side
        if (rows, columns) == (side, side):
            return table
        grid = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(table.dtype)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, H, W) normalised → (tiles, rows, columns, d), positions added."""
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        return x.unflatten(1, (rows, columns))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, H, W) normalised → (tiles, tokens, d): patches, s×s neighbours joined, projected."""
        x = self.patches(pixel_values)
        t, rows, columns, d = x.shape
        s = self.config.shuffle
        if rows % s or columns % s:
            raise ValueError(f"a tile of {rows}×{columns} patches cannot be shuffled by {s}")
        x = x.view(t, rows // s, s, columns // s, s, d).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(t, (rows // s) * (columns // s), s * s * d)
        return x if self.proj is None else self.proj(x)
