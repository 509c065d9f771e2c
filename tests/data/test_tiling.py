"""Dynamic tiling against the published values, and its limits for any picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import goldens
from mmmamba.data.image_decoding import load_image
from mmmamba.data.tiling import grid, normalise, tile

EXPECTED = goldens.about("preprocess")


def test_golden_grids():
    wrong = [
        row
        for row in EXPECTED["grid_table"]
        if [list(grid(row[0], row[1], 448, 1, most)) for most in (6, 12, 24)] != row[2:]
    ]
    assert len(EXPECTED["grid_table"]) == 2000 and not wrong


@pytest.mark.parametrize("case", ["size448_max12", "size448_max6", "size448_max24", "size56_max12"])
@pytest.mark.parametrize("entry", EXPECTED["images"], ids=lambda entry: Path(entry["file"]).stem)
def test_golden_pixels(entry, case):
    expected = entry["cases"][case]
    side, most = (int(number) for number in case.removeprefix("size").split("_max"))
    image = load_image(goldens.picture(entry["file"]), entry["file"])
    assert list(image.size) == entry["size"]
    assert list(grid(*image.size, side, 1, most)) == expected["grid_cols_rows"]
    tiles = normalise(tile(image, side, most))
    assert tiles.dtype == np.float32 and tiles.shape == (expected["num_tiles"], 3, side, side)
    np.testing.assert_allclose(tiles.mean((1, 2, 3)), expected["mean"], atol=1e-5)
    np.testing.assert_allclose(tiles.reshape(len(tiles), -1).std(1, ddof=1), expected["std"], atol=1e-5)
    for pixel in expected["pixels"]:
        assert abs(tiles[pixel["tile"], pixel["ch"], pixel["y"], pixel["x"]] - pixel["value"]) < 1e-5


def test_golden_pixels_in_full():
    assert len(goldens.made()["tiles"]) == len(EXPECTED["images"])
    for entry in EXPECTED["images"]:
        name = Path(entry["file"]).name
        tiles = tile(load_image(goldens.picture(entry["file"]), name), 56, 12)
        golden = goldens.tiles(name[:2])
        np.testing.assert_allclose(normalise(tiles), golden, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(normalise(torch.from_numpy(tiles)).numpy(), golden, atol=1e-5, err_msg=name)


sides = st.integers(1, 20_000)


@given(width=sides, height=sides, size=st.sampled_from([56, 64, 448]), least=st.integers(1, 4), more=st.integers(0, 20))
def test_grid_limits(width, height, size, least, more):
    cols, rows = grid(width, height, size, least, least + more)
    assert least <= cols * rows <= least + more
    if least == 1 and more >= 1:
        assert (cols >= rows) if width > height * 1.5 else True
        assert (rows >= cols) if height > width * 1.5 else True


@given(width=sides, height=sides, most=st.integers(1, 24))
def test_grid_is_the_nearest_shape(width, height, most):
    cols, rows = grid(width, height, 448, 1, most)
    distances = [abs(width / height - c / r) for c in range(1, most + 1) for r in range(1, most // c + 1)]
    assert abs(width / height - cols / rows) == min(distances)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), most=st.integers(1, 12), thumbnail=st.booleans())
def test_tile_shapes(width, height, most, thumbnail):
    image = Image.new("RGB", (width, height), (9, 99, 199))
    tiles = tile(image, 16, most, thumbnail=thumbnail)
    cols, rows = grid(width, height, 16, 1, most)
    assert tiles.shape == (cols * rows + (thumbnail and cols * rows > 1), 16, 16, 3) and tiles.dtype == np.uint8
    assert (tiles == np.array([9, 99, 199], np.uint8)).all()


def test_tiles_go_row_by_row():
    image = Image.new("RGB", (48, 32))
    for row in range(2):
        for col in range(3):
            image.paste((row, col, 0), (16 * col, 16 * row, 16 * col + 16, 16 * row + 16))
    tiles = tile(image, 16, 6)
    assert [tuple(t[8, 8, :2]) for t in tiles[:6]] == [(row, col) for row in range(2) for col in range(3)]
    assert len(tiles) == 7


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1)])
def test_extreme_shapes(size):
    assert 1 <= len(tile(Image.new("RGB", size), 16, 12)) <= 13


@pytest.mark.parametrize("least, most", [(0, 3), (4, 3)])
def test_impossible_limits(least, most):
    with pytest.raises(ValueError, match="min_tiles"):
        grid(10, 10, 448, least, most)


def test_normalise_keeps_the_kind_and_takes_none():
    tiles = np.zeros((0, 8, 8, 3), np.uint8)
    assert normalise(tiles).shape == (0, 3, 8, 8)
    pixels = normalise(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)
