"""Tiny models of every kind and prompts of many lengths, with pictures and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PIL import Image

from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.sample import Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model

LAYER_MAPS = {
    "attention": (ATTENTION,) * 5,
    "linear": (MAMBA2,) * 5,
    "hybrid": (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2),
}

REWRITING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[' + m.content + ']' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def picture(colour: str, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture(params=LAYER_MAPS)
def layer_map(request) -> tuple[str, ...]:
    return LAYER_MAPS[request.param]


@pytest.fixture
def model(tiny_model: Callable[..., Model], layer_map: tuple[str, ...]) -> Model:
    """float64, so that a token picked greedily does not hang on how a batch is rounded."""
    return tiny_model(layer_map, Mamba2Options(rope=True)).double()


@pytest.fixture
def prompts(tiny_processor: Processor) -> list[Encoded]:
    """Six prompts, not sorted by length; the second and the last have pictures (one and three tiles)."""
    texts = ["hi", "<image>\nwhat colour?", "is it left of the square ? " * 4, "how many?", "a", "b <image> c"]
    images = [[], [picture("red")], [], [], [], [picture("blue", (112, 56))]]
    return [tiny_processor.prompt([Turn("human", text)], shown) for text, shown in zip(texts, images, strict=True)]


@pytest.fixture
def rewriting(tiny_config, tiny_processor: Processor) -> Callable[..., Processor]:
    """Processors whose chat template changes what came before: it writes a space before an answer that it prompts for
    without one, so the whole conversation is read again at each turn.
    """
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": REWRITING}

    def build(**changes) -> Processor:
        config = tiny_config(template="tokenizer", system_message=None, **changes)
        return Processor(Tokenizer(tiny_processor.tokenizer.definition, tokens), config)

    return build
