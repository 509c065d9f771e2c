"""Every way in for a picture gives the same pixels and has the same bounds: path, bytes, data URL, Pillow, array."""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmmamba.data import image_decoding
from mmmamba.data.exif import orientation, without_exif
from mmmamba.data.image_decoding import from_array, load_image, upright_rgb
from mmmamba.data.sample import BadSample
from mmmamba.errors import UserError
from mmmamba.hf.image_processing import MMMambaImageProcessor, open_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\nshowpage\n%%EOF\n"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    memory = io.BytesIO()
    image.save(memory, kind, **options)
    return memory.getvalue()


def stripes() -> Image.Image:
    """4 x 2: red and green left to right above, blue below."""
    image = Image.new("RGB", (4, 2), BLUE)
    image.paste(RED, (0, 0, 2, 1))
    image.paste(GREEN, (2, 0, 4, 1))
    return image


def entrances(content: bytes, path: Path) -> dict[str, Callable[[], Image.Image]]:
    """Every way in for the bytes of a file."""
    path.write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {
        "path": lambda: load_image(path, "x"),
        "text": lambda: open_image(str(path)),
        "bytes": lambda: open_image(content),
        "stream": lambda: open_image(io.BytesIO(content)),
        "data URL": lambda: open_image(url),
        "opened": lambda: upright_rgb(Image.open(path), "x"),
        "opened stream": lambda: open_image(Image.open(io.BytesIO(content))),
        "fetched": lambda: MMMambaImageProcessor(56).fetch_images([[url]])[0][0],
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def directory(*entries: tuple[int, int, int, bytes], after: bytes = b"", following: int = 0) -> bytes:
    """A big-endian TIFF structure of one directory at 8; each value is four bytes."""
    table = b"".join(struct.pack(">HHL", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + table + struct.pack(">L", following) + after


def turned(value: int, kind: int = 3) -> tuple[int, int, int, bytes]:
    return 0x0112, kind, 1, struct.pack(">H2x" if kind == 3 else ">L", value)


# ---------------------------------------------------------------------------------------------- the same pixels


def test_sixteen_bits_are_the_same_whichever_way_they_come(tmp_path: Path) -> None:
    values = np.array([[0, 256, 300, 32768, 65535]], dtype=np.uint16)
    content = saved(Image.fromarray(values), "PNG")
    ways = entrances(content, tmp_path / "a.png")
    ways["array"] = lambda: open_image(values)
    ways["tensor"] = lambda: open_image(torch.from_numpy(values)[None])
    ways["in memory"] = lambda: upright_rgb(Image.fromarray(values), "x")
    for name, way in ways.items():
        assert np.asarray(way())[0, :, 0].tolist() == [0, 1, 1, 128, 255], name
    tiles = MMMambaImageProcessor(56, max_dynamic_patch=1)
    assert np.array_equal(tiles.tiles(content), tiles.tiles(str(tmp_path / "a.png")))


def test_sixteen_bit_colours_as_a_file_has_them(tmp_path: Path) -> None:
    values = np.array([[[0, 255, 256], [32768, 65535, 300]]], dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    for name, way in {**entrances(content, tmp_path / "a.png"), "array": lambda: open_image(values)}.items():
        assert np.array_equal(np.asarray(way()), values >> 8), name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_once_whichever_way_it_comes(tmp_path: Path, kind: str) -> None:
    big = stripes().resize((64, 32), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, way in entrances(saved(big, kind, exif=exif), tmp_path / "a").items():
        image = way()
        assert image.size == (32, 64), name
        assert image.getpixel((28, 4))[0] > 200 and image.getpixel((4, 4))[2] > 200, name
        assert upright_rgb(image, "x").size == (32, 64), name  # once only
        assert open_image(image.copy()).size == (32, 64), name


def test_arrays() -> None:
    picture = stripes()
    values = np.asarray(picture)
    alpha = np.concatenate([values, np.zeros((2, 4, 1), np.uint8)], axis=-1)
    for array in (values, values / 255, (values / 255).astype(np.float16), values.astype(np.int64), alpha, values > 0,
                  np.moveaxis(values, -1, 0), values.astype(np.float32)):  # fmt: skip
        assert np.array_equal(np.asarray(open_image(array)), values), (array.shape, array.dtype)
    assert np.array_equal(np.asarray(open_image(torch.tensor(values / 255).permute(2, 0, 1).bfloat16())), values)
    assert np.asarray(open_image(values[..., 0])).shape == (2, 4, 3)
    wide = np.zeros((3, 5, 3), np.uint8)  # may be read both ways
    assert open_image(wide).size == (5, 3) and open_image(torch.from_numpy(wide)).size == (3, 5)


@pytest.mark.parametrize("array", [
    np.full((2, 2, 3), np.nan), np.full((2, 2), np.inf), np.full((2, 2), -1), np.full((2, 2), 256), np.zeros((2, 2, 5)),
    np.zeros(4), np.full((2, 2), 1.5), np.zeros((0, 3, 3)), np.zeros((2, 2), complex), np.full((2, 2), "a"),
    np.broadcast_to(np.uint8(0), (20_001, 1, 3)), np.broadcast_to(np.uint8(0), (8_001, 8_000, 3)),
])  # fmt: skip
def test_arrays_that_are_no_picture(array: np.ndarray) -> None:
    with pytest.raises(BadSample, match="x: 'image': an array of shape"):
        from_array(array, "x")


def test_what_is_no_picture_at_all() -> None:
    for wrong in (3, object(), {}, b"", "", "data:image/png;base64,%%%", "data:image/png", "no/such.png", "a\0b"):
        with pytest.raises(UserError):
            open_image(wrong)


# ---------------------------------------------------------------------------------------------- formats


def refused(content: bytes, path: Path, reason: str) -> None:
    for name, way in entrances(content, path).items():
        try:
            with pytest.raises(BadSample, match=reason):
                way()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            assert name.startswith("opened"), name  # Pillow's own refusal, by whoever opened it


def test_a_picture_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript in a .png: Pillow hands it to Ghostscript when its pixels are asked for."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/STARTED\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    refused(EPS, tmp_path / "a.png", "not a picture of a kind that is read")
    assert not (tmp_path / "STARTED").exists()


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "ICNS", "DDS", "XBM"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    content = saved(Image.new("1" if kind == "XBM" else "RGB", (32, 32)), kind)
    refused(content, tmp_path / "a.png", "not a picture of a kind that is read")


@pytest.mark.skipif("AVIF" not in image_decoding._formats(), reason="this Pillow reads no AVIF")
def test_damaged_avif_is_a_bad_sample(tmp_path: Path) -> None:
    whole = saved(Image.effect_noise((40, 30), 60).convert("RGB"), "AVIF")
    assert open_image(whole).size == (40, 30)
    random = np.random.default_rng(0)
    for _ in range(80):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), size=3):
            damaged[place] = random.integers(0, 256)
        try:
            open_image(bytes(damaged[: random.integers(1, len(whole) + 1)]))
        except BadSample as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------- EXIF


def test_orientation_is_all_that_is_read_of_exif(tmp_path: Path) -> None:
    """A text tag written as a rational number (as some cameras do) once ended in an AttributeError."""
    odd = [(0x010E, 5, 1, struct.pack(">L", 8)), (0x013B, 2, 9999, b"\xff" * 4), (0x8769, 4, 1, b"\0\0\0\x08")]
    big = stripes().resize((64, 32), Image.Resampling.NEAREST)
    for kind in ("JPEG", "PNG", "WEBP"):
        exif = b"Exif\0\0" + directory(*odd, turned(6))
        for name, way in entrances(saved(big, kind, exif=exif), tmp_path / "a").items():
            assert way().size == (32, 64), (kind, name)


@pytest.mark.parametrize(("exif", "value"), [
    (directory(turned(6)), 6), (directory(turned(8, kind=4)), 8), (directory(turned(0)), 1), (directory(turned(9)), 1),
    (directory(turned(65535)), 1), (directory((0x0112, 2, 1, b"6\0\0\0")), 1), (directory(), 1), (b"", 1),
    (directory((0x0112, 3, 2, b"\0\6\0\6")), 1), (b"MM\0*", 1), (b"\0" * 50, 1),
    (directory((0x0112, 5, 1, b"\0\0\0\x08")), 1),
    (b"MM\0*\xff\xff\xff\xff", 1), (directory(turned(3))[:15], 1),
    (b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\3\0\0\0", 3),
])  # fmt: skip
def test_orientations(exif: bytes, value: int) -> None:
    assert orientation(b"Exif\0\0" + exif) == orientation(exif) == value
    assert orientation(exif, b'<x tiff:Orientation="8"/>') == (value if value != 1 else 8)


def test_any_jpeg_without_exif_decodes_the_same() -> None:
    whole = saved(Image.effect_noise((40, 30), 60).convert("RGB"), "JPEG", quality=90, icc_profile=b"x" * 100)
    bare, exif, xmp = without_exif(whole)
    assert len(bare) < len(whole) and not exif and not xmp
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(bare))), np.asarray(open_image(whole)))
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, 400, size=4):
            damaged[place] = random.integers(0, 256)
        bare, *_ = without_exif(bytes(damaged[: random.integers(0, len(whole))]))
        assert len(bare) <= len(whole)


# ---------------------------------------------------------------------------------------------- bounds


def heavy_jpeg() -> bytes:
    """2 MB in which 60,000 entries of EXIF point to the same megabyte."""
    entries = directory(
        *[(i, 1, 1_000_000, struct.pack(">L", 800_000)) for i in range(1, 60_000)], after=b"\0" * 1_200_000
    )
    parts = [entries[i : i + 65_000] for i in range(0, len(entries), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in parts)
    plain = saved(stripes().resize((64, 32)), "JPEG")
    plain = plain[:2] + plain[20:]  # without JFIF's size of a dot Pillow asks EXIF for it
    return plain[:2] + segments + plain[2:]


def heavy_tiff() -> bytes:
    """A megabyte that 10,000 entries point to."""
    plain = saved(stripes(), "TIFF")
    entries = directory(*[(i + 40_000, 1, 1_000_000, struct.pack(">L", 200_000)) for i in range(10_000)])
    return entries + plain + b"\0" * 1_200_000


def long_tiff() -> bytes:
    """A frame, then 20,000 directories of nothing."""
    plain = bytearray(saved(Image.new("L", (4, 4)), "TIFF"))  # little-endian, its directory at 8
    count = struct.unpack_from("<H", plain, 8)[0]
    struct.pack_into("<L", plain, 10 + 12 * count, len(plain))
    place = len(plain)
    return bytes(plain) + b"".join(struct.pack("<HL", 0, place + 6 * (i + 1)) for i in range(20_000))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress((b"\0" + b"\0" * 3 * width) * height) if width * height < 10_000 else zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = {
    "EXIF": (heavy_jpeg, None),
    "TIFF directories": (heavy_tiff, "point to more bytes"),
    "TIFF frames": (long_tiff, "more than 1000 frames"),
    "PNG text": (lambda: png_of(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 20_000_000))), "too large"),
    "PNG size": (lambda: png_of(60_000, 60_000), "larger than"),
    "PNG line": (lambda: png_of(1, 65_535), "larger than"),
    "GIF size": (lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + b"\0" * 6 + b","
                 + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\2\2\x44\1\0;", "larger than"),
    "BMP size": (lambda: b"BM" + struct.pack("<LLL", 60, 0, 54)
                 + struct.pack("<LllHHLLllLL", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0), "larger than"),
    "PPM size": (lambda: b"P6 50000 50000 255\n", "larger than"),
    "JPEG size": (lambda: (lambda j: j[: j.index(b"\xff\xc0") + 5] + struct.pack(">HH", 60_000, 60_000)
                           + j[j.index(b"\xff\xc0") + 9 :])(saved(stripes(), "JPEG")), "larger than"),
}  # fmt: skip


@pytest.mark.parametrize("make, reason", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_cost_neither_time_nor_memory(tmp_path: Path, make: Callable[[], bytes], reason: str | None) -> None:
    content = make()
    path = tmp_path / "a.png"
    path.write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    try:
        if reason is None:
            assert load_image(path, "x").size == (64, 32)
        else:
            with pytest.raises(BadSample, match=reason):
                load_image(path, "x")
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content) + 10_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5


def test_sixteen_bits_are_scaled_band_by_band() -> None:
    image = Image.new("I;16", (4000, 4000), 65535)
    tracemalloc.start()
    found = image_decoding.to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.getpixel((3999, 3999)) == (255, 255, 255)
    assert peak < 5 * 16_000_000


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(BadSample, match=r"x: 'image': is a (pipe|device|folder), not a file"):
            load_image(path, "x")
