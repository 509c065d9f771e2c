"""What the tests of the transformers face share: wrapped models, pictures, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmmamba.data.processor import UNSCORED, Encoded
from mmmamba.hf import MMMambaConfig, MMMambaForConditionalGeneration
from mmmamba.model import Model

BUILTIN = ("pico-linear", "pico-teacher", "nano-hybrid")
TILES = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8)  # of the fixture ``prompt``
TILES_OF_ROW = (slice(0, 1), slice(0, 0), slice(1, 3))


def wrap(model: Model) -> MMMambaForConditionalGeneration:
    """The transformers model with the weights of ours."""
    wrapped = MMMambaForConditionalGeneration(MMMambaConfig(model.config)).to(model.dtype)
    wrapped.load_state_dict(model.state_dict())
    return wrapped.eval()


def picture(colour: str = "red", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A filled circle on white: something that the built-in models can speak of."""
    image = Image.new("RGB", size, "white")
    side = min(size)
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=colour)
    return image


def user(text: str, *images: Any) -> dict[str, Any]:
    """A user's message: pictures, then text."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def row(prompt: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding."""
    ids = prompt["input_ids"][i][prompt["attention_mask"][i] != 0][None]
    pixels = prompt["pixel_values"][TILES_OF_ROW[i]]
    return {"input_ids": ids, **({"pixel_values": pixels} if len(pixels) else {})}


def encoded(prompt: dict[str, torch.Tensor], i: int) -> Encoded:
    """The same row as the engine reads it."""
    ids = row(prompt, i)["input_ids"][0].numpy().astype(np.int32)
    return Encoded(input_ids=ids, labels=np.full_like(ids, UNSCORED), tiles=TILES[TILES_OF_ROW[i]])


def generated(model: MMMambaForConditionalGeneration, **inputs: Any) -> torch.Tensor:
    """Twelve new tokens, with no end before."""
    return model.generate(
        **{"max_new_tokens": 12, "eos_token_id": None, "do_sample": False, "pad_token_id": 0} | inputs
    )
