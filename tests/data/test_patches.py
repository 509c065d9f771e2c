"""Pictures as rows of patches: sizes, order, marks, and the prompt around them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.patches import fitted_size, patch_marks, patch_rows
from mmmamba.data.processor import Processor
from mmmamba.data.sample import GPT, HUMAN, SYSTEM, BadSample, Sample, Turn
from mmmamba.errors import UserError
from mmmamba.model import VisionConfig
from tiny import WORDS, make_config

SPECIALS = ["<unk>", "<s>", "</s>", "<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>"]
UNK, BOS, EOS, VISION, PATCH, ROW, *_ = range(len(SPECIALS))
CONFIG = make_config(
    vision=VisionConfig(
        image_size=8, patch_size=8, pixel_shuffle_loc="none", use_pixel_shuffle_proj=False, max_side=32
    ),
    img_context_token_id=PATCH,
    template="solo",
)
PROCESSOR = Processor(train_bpe(WORDS * 4, 320, SPECIALS), CONFIG)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def text_ids(text):
    return PROCESSOR.tokenizer.encode(text, allow_special=False)


# ------------------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("size, fitted", [
    ((1, 1), (32, 32)),
    ((32, 32), (32, 32)),
    ((33, 32), (64, 64)),  # the longer side goes up to 64, the shorter follows to 62 and goes up to 64
    ((540, 32), (544, 32)),
    ((640, 480), (640, 480)),
    ((480, 640), (480, 640)),
    ((1024, 768), (1024, 768)),
    ((4000, 3000), (1024, 768)),
    ((1000, 100), (1024, 128)),
    ((20000, 1), (1024, 32)),
    ((1, 20000), (32, 1024)),
])  # fmt: skip
def test_sizes(size, fitted):
    assert fitted_size(*size, 32, 1024) == fitted


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 64), st.integers(1, 40))
def test_sizes_are_whole_patches_within_the_limit(width, height, patch, most):
    fitted = fitted_size(width, height, patch, patch * most)
    assert all(side % patch == 0 and patch <= side <= patch * most for side in fitted)
    assert fitted_size(height, width, patch, patch * most) == fitted[::-1]
    assert fitted_size(*fitted, patch, patch * most) == fitted
    longer, shorter = max(fitted), min(fitted)
    assert abs(shorter - longer * min(width, height) / max(width, height)) < patch + 1


def test_patches_are_the_picture_in_rows():
    image = picture(24, 16)
    patches = patch_rows(image, 8, 32)
    assert patches.shape == (2, 3, 8, 8, 3) and patches.dtype == np.uint8
    for row in range(2):
        for column in range(3):
            box = (8 * column, 8 * row, 8 * column + 8, 8 * row + 8)
            assert (patches[row, column] == np.asarray(image.crop(box))).all()


def test_other_sizes_are_resampled_bilinearly():
    image = picture(50, 20)
    whole = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR))
    patches = patch_rows(image, 8, 32)
    assert (patches.swapaxes(1, 2).reshape(16, 32, 3) == whole).all()


def test_marks():
    assert patch_marks(1, 1) == ["<vision>", "<vpatch>", "<vision>"]
    row = ["<vpatch>"] * 3
    assert patch_marks(2, 3) == ["<vision>", *row, "<vrow_sep>", *row, "<vision>"]  # closed as it is opened


# ------------------------------------------------------------------------------------------------ prompts


def test_a_sample():
    """The picture, <s>, the question in brackets, the answer with its end, which alone are scored."""
    image = picture(24, 16)
    sample = Sample("a", (Turn(HUMAN, "<image>\nwhat colour ?"), Turn(GPT, "red")), (image,), "data:1")
    encoded = PROCESSOR.encode(sample)
    marks = [VISION, PATCH, PATCH, PATCH, ROW, PATCH, PATCH, PATCH, VISION, BOS]
    question, answer = text_ids("[INST] what colour ? [/INST]"), [*text_ids(" red"), EOS]
    assert encoded.input_ids.tolist() == marks + question + answer
    assert encoded.labels.tolist() == [-100] * len(marks + question) + answer
    assert (encoded.tiles == patch_rows(image, 8, 32).reshape(6, 8, 8, 3)).all()
    assert PROCESSOR.stop_token_ids == (EOS,)
    plain = PROCESSOR.encode(Sample("b", (Turn(HUMAN, "why ?"), Turn(GPT, "so")), (), "data:2"))
    assert plain.input_ids.tolist() == [BOS, *text_ids("[INST] why ? [/INST]"), *text_ids(" so"), EOS]
    assert plain.tiles.shape == (0, 8, 8, 3)


@pytest.mark.parametrize("text", ["<image>\nwhat ?", "what ?\n<image>", "what ?<image>", "what ?"])
def test_pictures_go_first_wherever_their_mark_is(text):
    encoded = PROCESSOR.prompt([Turn(HUMAN, text)], [picture(8, 8)])
    assert encoded.input_ids.tolist() == [VISION, PATCH, VISION, BOS, *text_ids("[INST] what ? [/INST]")]


def test_continuations_add_up_to_the_whole_prompt():
    images = [picture(8, 8, 0), picture(16, 8, 1), picture(32, 32, 2)]
    turns = [Turn(HUMAN, "<image>\n<image>\nfirst ?"), Turn(GPT, "one"), Turn(HUMAN, "<image>\nsecond ?")]
    whole = PROCESSOR.prompt(turns, images)
    begun, more = PROCESSOR.prompt(turns[:1], images[:2]), PROCESSOR.continuation(turns[2], images[2:])
    ids = [*begun.input_ids, *text_ids(" one"), EOS, *more.input_ids]
    assert whole.input_ids.tolist() == ids
    assert (whole.tiles == np.concatenate([begun.tiles, more.tiles])).all() and len(whole.tiles) == 1 + 2 + 16


def test_text_makes_no_marks():
    sample = Sample("a", (Turn(HUMAN, "<vision><vpatch></s> ?"), Turn(GPT, "<s>")), (), "data:1")
    ids = PROCESSOR.encode(sample).input_ids.tolist()
    assert [i for i in ids if i < len(SPECIALS)] == [BOS, EOS]


def test_limits():
    image, turns = picture(32, 32), (Turn(HUMAN, "what ?"), Turn(GPT, "a long answer " * 20))
    sample = Sample("a", turns, (image,), "data:1")
    assert PROCESSOR.encode(sample, max_length=60).cut > 0
    with pytest.raises(BadSample, match="data:1: 'image': the image tokens do not fit into max_length 15"):
        PROCESSOR.encode(sample, max_length=15)
    with pytest.raises(UserError, match="max_tiles: this model reads a picture as rows of patches"):
        PROCESSOR.encode(sample, max_tiles=2)
    with pytest.raises(BadSample, match="'solo' has no place for a system message"):
        PROCESSOR.encode(replace(sample, turns=(Turn(SYSTEM, "be kind"), *turns)))
    with pytest.raises(UserError, match="gives <vpatch> the id 4"):
        Processor(PROCESSOR.tokenizer, replace(CONFIG, img_context_token_id=5))


@pytest.mark.parametrize("changes, reason", [
    ({"image_size": 16}, "image_size must be patch_size"),
    ({"pixel_shuffle_loc": "pre"}, "with no shuffle"),
    ({"use_pixel_shuffle_proj": True}, "with no shuffle"),
    ({"max_side": 4}, r"max_side \(4\) is not a multiple"),
    ({"max_side": 20}, r"max_side \(20\) is not a multiple"),
])  # fmt: skip
def test_settings_that_contradict_each_other(changes, reason):
    with pytest.raises(ValueError, match=reason):
        replace(CONFIG.vision, **changes)
