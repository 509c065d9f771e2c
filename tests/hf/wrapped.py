"""What the tests of the transformers face share: wrapped models, pictures, messages."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from mmmamba.hf import MMMambaConfig, MMMambaForConditionalGeneration
from mmmamba.model import Model

BUILTIN = ("pico-linear", "pico-teacher", "nano-hybrid")


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
