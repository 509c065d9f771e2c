"""Pictures: every common format becomes upright RGB, and a damaged or oversized file is refused by name."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import goldens
from mmmamba.data import image_decoding
from mmmamba.data.image_decoding import load_image
from mmmamba.data.sample import BadSample

PHOTO = goldens.picture("01_640x480_grad.png")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def stripes() -> Image.Image:
    """4 x 2: red and green left to right above, blue below."""
    image = Image.new("RGB", (4, 2), BLUE)
    image.paste(RED, (0, 0, 2, 1))
    image.paste(GREEN, (2, 0, 4, 1))
    return image


def corner(path: Path) -> tuple[int, ...]:
    image = load_image(path, "x:1")
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "ppm", "webp", "gif"])
def test_lossless_formats(tmp_path, extension):
    path = save(stripes(), tmp_path / f"a.{extension}", **({"lossless": True} if extension == "webp" else {}))
    np.testing.assert_array_equal(np.asarray(load_image(path, "x:1")), np.asarray(stripes()))


def test_jpeg(tmp_path):
    path = save(Image.new("RGB", (32, 32), (200, 30, 90)), tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(corner(path), (200, 30, 90), atol=4)


def test_transparent_pixels_keep_their_colour(tmp_path):
    """As in the published data path; the golden RGBA picture has partly transparent pixels."""
    assert corner(save(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), tmp_path / "a.png")) == (10, 20, 30)
    golden = Image.open(goldens.picture("10_300x300_rgba.png"))
    assert golden.mode == "RGBA"
    np.testing.assert_array_equal(
        np.asarray(load_image(goldens.picture("10_300x300_rgba.png"), "x:1")), np.asarray(golden)[..., :3]
    )


@pytest.mark.parametrize("mode, colour, rgb", [
    ("L", 77, (77, 77, 77)),
    ("LA", (77, 10), (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
])  # fmt: skip
def test_grey_modes(tmp_path, mode, colour, rgb):
    assert corner(save(Image.new(mode, (2, 2), colour), tmp_path / "a.png")) == rgb


def test_palette(tmp_path):
    assert corner(save(stripes().quantize(8), tmp_path / "a.png")) == RED
    transparent = stripes().quantize(8)
    assert corner(save(transparent, tmp_path / "b.png", transparency=0)) == RED


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_sixteen_bits_are_scaled(tmp_path, extension):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / f"a.{extension}")
    assert np.asarray(load_image(path, "x:1"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_thirty_two_bit_grey_counts_as_sixteen():
    values = np.array([[0, 257, 65535, 70000]], dtype=np.int32)
    assert np.asarray(image_decoding.to_rgb(Image.fromarray(values)))[0, :, 2].tolist() == [0, 1, 255, 255]


def test_floating_point_is_refused(tmp_path):
    path = save(Image.fromarray(np.ones((2, 2), np.float32)), tmp_path / "a.tiff")
    with pytest.raises(BadSample, match="floating-point"):
        load_image(path, "x:1")


def test_cmyk(tmp_path):
    path = save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(corner(path), RED, atol=4)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = load_image(save(stripes(), tmp_path / "a.png", exif=exif), "x:1")
    assert image.size == (2, 4)
    assert image.getpixel((1, 0)) == RED and image.getpixel((0, 0)) == BLUE


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, extension):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if extension == "webp" else {}
    path = save(frames[0], tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 3
    assert corner(path) == RED


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_sides(tmp_path, size):
    assert load_image(save(Image.new("RGB", size, RED), tmp_path / "a.png"), "x:1").size == size


BAD = {
    "missing": (lambda path: None, "no such file"),
    "directory": (lambda path: path.mkdir(), "not a file"),
    "zero bytes": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("not a picture"), "not a picture"),
    "truncated": (lambda path: path.write_bytes(PHOTO.read_bytes()[:2000]), "damaged"),
    "header only": (lambda path: path.write_bytes(png_header(10, 10)[:20]), "not a picture|damaged"),
    "no pixels": (lambda path: path.write_bytes(png_header(10, 10)), "damaged"),
    "50,000 x 50,000": (lambda path: path.write_bytes(png_header(50_000, 50_000)), "larger than 20,000 pixels"),
    "too wide": (lambda path: path.write_bytes(png_header(20_001, 1)), "20001x1 is larger than 20,000 pixels"),
    "too many pixels": (lambda path: path.write_bytes(png_header(8_001, 8_000)), "8001x8000 is larger .* 64 meg"),
    "Pillow would warn": (lambda path: path.write_bytes(png_header(12_000, 10_000)), "64 megapixels"),
    "zero wide": (lambda path: path.write_bytes(png_header(0, 10)), "not a picture|damaged"),
}  # fmt: skip


@pytest.mark.parametrize("make, reason", BAD.values(), ids=BAD.keys())
def test_bad_files_are_named(tmp_path, make, reason):
    path = tmp_path / "a.png"
    make(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match=reason) as caught:
            load_image(path, "file.jsonl:3")
    assert str(caught.value).startswith("file.jsonl:3: 'image': ") and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_given_as_text_is_no_file(tmp_path):
    with pytest.raises(BadSample, match="no such file") as caught:
        load_image(str(tmp_path / ("data:image,base64" + "A" * 5000)), "x:1")
    assert len(str(caught.value)) < 400


def test_size_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(20_000, 20_000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadSample, match="larger than"):
        load_image(path, "x:1")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "tiff"])
def test_any_damage_gives_a_picture_or_a_bad_sample(tmp_path, extension):
    """Cut or overwritten anywhere, a file never raises anything else."""
    whole = bytearray(save(Image.effect_noise((40, 30), 60).convert("RGB"), tmp_path / f"a.{extension}").read_bytes())
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), size=4):
            damaged[place] = random.integers(0, 256)
        path = tmp_path / f"b.{extension}"
        path.write_bytes(damaged[: random.integers(1, len(whole) + 1)])
        try:
            assert load_image(path, "x:1").mode == "RGB"
        except BadSample as error:
            assert str(error).startswith("x:1: 'image': ")
