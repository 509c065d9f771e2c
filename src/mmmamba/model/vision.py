"""Tiles to tokens: patch embedding with a position table, pixel shuffle, projection (HoVLE's embedding of images).

With ``pixel_shuffle_loc: post`` (HoVLE's "HD") shuffle and projection follow the embedding stack, which then reads the
patches themselves: :class:`PatchRow` is the longer row that it runs over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.config import VisionConfig
from mmmamba.model.plain import weight_of


class VisionEmbedding(nn.Module):
    """Image tokens of square tiles.

    What the checkpoints hold and the published code does not use is kept unused: the class slot, ``class_embedding``
    and, with ``pixel_shuffle_loc: none``, the projection.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + config.patches_per_side**2, hidden_size))
        self.patch_embedding = nn.Conv2d(3, hidden_size, config.patch_size, stride=config.patch_size)
        self.proj = (
            nn.Sequential(
                nn.Linear(hidden_size * round(1 / config.downsample_ratio) ** 2, hidden_size),
                nn.GELU(),
                nn.Linear(hidden_size, hidden_size),
            )
            if config.use_pixel_shuffle_proj
            else None
        )

    def unused(self) -> list[nn.Parameter]:
        """What the checkpoints hold and no pass reads."""
        projection = self.proj.parameters() if self.proj is not None and self.config.pixel_shuffle_loc == "none" else ()
        return [self.class_embedding, *projection]

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
        x = self.patch_embedding(_as_weights(pixel_values, self.patch_embedding))
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        placed: Tensor = x.unflatten(1, (rows, columns))
        return placed

    def forward(self, pixel_values: Tensor, *, with_patches: bool = False) -> Any:
        """The network's inputs for tiles (tiles, 3, H, W), normalised: (tiles, tokens, d).

        With ``pixel_shuffle_loc: post`` that is their patches, row by row. ``with_patches``: two tensors, the patches
        (tiles, rows, columns, d) first.
        """
        patches = self.patches(pixel_values)
        tokens = self.merge(patches) if self.config.pixel_shuffle_loc == "pre" else patches.flatten(1, 2)
        return (patches, tokens) if with_patches else tokens

    def merge(self, x: Tensor) -> Tensor:
        """Patches (tiles, rows, columns, d) → (tiles, tokens, d): s×s neighbours joined and projected."""
        if self.proj is None:
            return x.flatten(1, 2)
        t, rows, columns, d = x.shape
        s = self.config.shuffle
        if rows % s or columns % s:
            raise ValueError(f"a tile of {rows}×{columns} patches cannot be shuffled by {s}")
        x = x.view(t, rows // s, s, columns // s, s, d).permute(0, 1, 3, 2, 4, 5)
        joined: Tensor = self.proj(x.reshape(t, (rows // s) * (columns // s), s * s * d))
        return joined


class PatchEmbedding(nn.Module):
    """Image tokens of single patches by one linear map without a bias (SOLO); no positions but those of the row.

    The map's result is added to the embedding of the patch's mark in the prompt, as SOLO's published code does.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(patches, 3, H, W) normalised → (patches, 1, d)."""
        patches: Tensor = self.patch_embedding(_as_weights(pixel_values.flatten(1), self.patch_embedding))
        return patches[:, None]


class PatchRow:
    """A packed row that has each tile's patches in place of its tokens, and the way back to tokens.

    Patches stay in raster order: within a tile, no patch lies where the token lies that it becomes part of.

    Args:
        image: (total,) which tokens of the row are those of pictures.
        cu_seqlens: (s+1,) borders of the row's sequences.
        patches: (tiles, rows, columns, d), the tiles in the order of their tokens.
        merged: how many patches become one token.

    Raises:
        ValueError: when the number of image tokens is not that of the tiles.
    """

    def __init__(self, image: Tensor, cu_seqlens: Tensor, patches: Tensor, merged: int) -> None:
        self.patches = patches
        widths = torch.where(image, merged, 1)
        ends = widths.cumsum(0)
        self.image = image.nonzero()[:, 0]
        check_slots(self.image.numel(), patches.shape[:3].numel() // merged, patches.shape[0])
        self.widths, self.starts = widths, ends - widths
        self.slots = image.repeat_interleave(widths).nonzero()[:, 0]
        self.cu_seqlens = F.pad(ends, (1, 0))[cu_seqlens.long()].to(torch.int32)

    def widen(self, x: Tensor) -> Tensor:
        """Embedded tokens (1, total, d) → the row with patches (1, wide, d)."""
        patches = self.patches.flatten(0, 2).to(x.dtype)
        return x[0].repeat_interleave(self.widths, 0).index_copy(0, self.slots, patches)[None]

    def narrow(self, wide: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
        """The row with patches (1, wide, d) → tokens (1, total, d), those of the tiles by ``merge``."""
        tokens = merge(wide[0].index_select(0, self.slots).view(self.patches.shape)).flatten(0, 1)
        return wide[0].index_select(0, self.starts).index_copy(0, self.image, tokens.to(wide.dtype))[None]


def _as_weights(pixel_values: Tensor, embedding: nn.Module) -> Tensor:
    """Pixels in the number format of the module that reads them."""
    weight = weight_of(embedding)
    return pixel_values if weight is None or not weight.is_floating_point() else pixel_values.to(weight.dtype)


def check_slots(slots: int, tokens: int, tiles: int) -> None:
    """Refuse tiles whose tokens are not as many as the positions they are written over (ValueError)."""
    if slots != tokens:
        raise ValueError(f"{slots} <IMG_CONTEXT> positions for {tokens} image tokens ({tiles} tiles)")
