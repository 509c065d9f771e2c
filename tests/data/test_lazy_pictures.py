"""A picture that is decoded when it is read is the picture decoded at once, and only one is in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmmamba.data import lazy_pictures as module
from mmmamba.data.bpe_training import SPECIALS, train_bpe
from mmmamba.data.lazy_pictures import PictureFile, Tiles
from mmmamba.data.processor import Processor
from mmmamba.data.sample import BadSample, Turn
from mmmamba.data.video import choose_frames, frame_marks, read_frames
from mmmamba.errors import UserError
from mmmamba.model import VisionConfig
from tiny import WORDS, make_config
from videos import write_video

TURN = Turn("human", "what?")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Noise of several shapes; the last one lies on its side, as its EXIF says."""
    random = np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(56, 56), (112, 56), (60, 200), (30, 90)]):
        paths.append(tmp_path / f"{i}.png")
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)).save(paths[-1], exif=exif)
    return paths


@pytest.mark.parametrize("changes", [{}, {"dynamic_image_size": False}, {"use_thumbnail": False}], ids=str)
def test_unread_pictures_give_the_same_prompt(files, tiny_processor, changes):
    processor = Processor(tiny_processor.tokenizer, make_config(**changes))
    whole = processor.prompt([TURN], files)
    lazy = processor.prompt([TURN], [PictureFile.check(file, "here") for file in files])
    assert isinstance(whole.tiles, np.ndarray) and isinstance(lazy.tiles, Tiles)
    assert np.array_equal(lazy.input_ids, whole.input_ids)
    assert np.array_equal(np.asarray(lazy.tiles), whole.tiles) and len(lazy.tiles) == len(whole.tiles)
    assert np.array_equal(np.stack(list(lazy.tiles)), whole.tiles), "and again"
    assert (lazy.tiles.shape, lazy.tiles.nbytes) == (whole.tiles.shape, whole.tiles.nbytes)
    mixed = processor.prompt([TURN], [files[0], *(PictureFile.check(file, "here") for file in files[1:])])
    assert np.array_equal(np.asarray(mixed.tiles), whole.tiles)


def test_unread_pictures_as_rows_of_patches(files):
    marks = ("<vision>", "<vpatch>", "<vrow_sep>")
    vision = VisionConfig(
        image_size=8, patch_size=8, pixel_shuffle_loc="none", use_pixel_shuffle_proj=False, max_side=64
    )
    tokenizer = train_bpe(WORDS, 300, [*SPECIALS[:3], *marks])
    config = replace(make_config(), vision=vision, template="solo", img_context_token_id=4)
    processor = Processor(tokenizer, config)
    whole = processor.prompt([TURN], files)
    lazy = processor.prompt([TURN], [PictureFile.check(file, "here") for file in files])
    assert np.array_equal(lazy.input_ids, whole.input_ids) and np.array_equal(np.asarray(lazy.tiles), whole.tiles)


def test_one_picture_is_in_memory(files, tiny_processor, monkeypatch):
    lazy = tiny_processor.prompt([TURN], [PictureFile.check(file, "here") for file in files])
    opened = []
    original = module.load_image
    monkeypatch.setattr(module, "load_image", lambda path, where: opened.append(path) or original(path, where))
    tiles = iter(lazy.tiles)
    assert opened == []
    next(tiles)
    assert opened == files[:1]
    next(tiles)
    assert opened == files[:2]


def test_a_frame_is_one_tile_and_the_picture_that_it_shows(tmp_path, tiny_processor):
    pytest.importorskip("av")
    path = write_video(tmp_path / "wide.mkv", range(0, 3000, 100), size=(224, 56))
    frames = choose_frames(path)
    turn = Turn("human", frame_marks(frames) + "what?")
    lazy = tiny_processor.prompt([turn], frames)
    images = list(read_frames(path, [frame.index for frame in frames]))
    whole = tiny_processor.prompt([turn], images, max_tiles=1)
    assert len(lazy.tiles) == 3 and len(tiny_processor.prompt([turn], images).tiles) > 3
    assert np.array_equal(lazy.input_ids, whole.input_ids) and np.array_equal(np.asarray(lazy.tiles), whole.tiles)


def test_a_picture_that_is_none_or_changes_is_named(files, tiny_processor, tmp_path):
    with pytest.raises(BadSample, match=r"here: 'image': no such file: .*gone\.png"):
        PictureFile.check(tmp_path / "gone.png", "here")
    lazy = tiny_processor.prompt([TURN], [PictureFile.check(file, "here") for file in files])
    Image.new("RGB", (300, 56)).save(files[1])
    with pytest.raises(UserError, match=r"1\.png changed while it was in use"):
        list(lazy.tiles)
