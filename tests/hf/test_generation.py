"""transformers' generate() over our state: greedy, sampling and beams, padded or not, give what the engine gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from wrapped import encoded, generated, row, wrap

import mmmamba
from mmmamba.data.processor import Encoded
from mmmamba.errors import UserError
from mmmamba.hf.state_cache import CACHE, CACHE_NAMES
from mmmamba.inference.answer import unspeakable
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.steps import prefill
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model

KINDS = {
    "teacher": (ATTENTION,) * 5,
    "linear": (MAMBA2,) * 5,
    "hybrid": (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2),
}
NEW = 12


class NeverEnding:
    """What the engine asks of a processor, for answers that nothing ends."""

    stop_token_ids = ()

    def decode(self, ids: Sequence[int]) -> str:
        return ""


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[..., Model]) -> Model:
    """float64, so that a token picked greedily does not hang on rounding."""
    return tiny_model(KINDS[request.param], Mamba2Options(rope=True)).double()


def test_greedy_tokens_are_the_engines(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    prompts = [encoded(prompt, i) for i in range(3)]
    answers = mmmamba.generate(tiny, NeverEnding(), prompts, max_new_tokens=NEW, block=5)
    assert generated(wrap(tiny), **prompt)[:, 14:].tolist() == [list(answer.token_ids) for answer in answers]


@torch.no_grad()
def beams_of(model: Model, prompt: Encoded, beams: int) -> list[list[int]]:
    """Beam search through the engine's pool, most likely answer first; nothing ends one before ``NEW`` tokens."""
    logits, state = prefill(model, [prompt], chunk=5, max_new_tokens=NEW)
    pool = Decoder(model, beams, state.longest + NEW, max_length=state.max_length)
    slots, found, scores = torch.arange(beams), [[]], torch.zeros(1, dtype=torch.float64)
    for _ in range(NEW):
        logprobs = logits.log_softmax(-1)
        logprobs[:, list(unspeakable(model))] = -math.inf
        scores, best = (scores[:, None] + logprobs).flatten().topk(beams)
        parents, tokens = best // logits.shape[1], best % logits.shape[1]
        found = [[*found[parent], token] for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)]
        pool.admit(slots, state.select(parents))  # each goes on with its parent's state
        logits = pool.step(tokens, slots)
        state = pool.export(slots)
    return found


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_are_the_engines(tiny: Model, prompt: dict[str, torch.Tensor], options: dict[str, int]) -> None:
    expected = []
    for i in range(3):
        expected += beams_of(tiny, encoded(prompt, i), options["num_beams"])[: options.get("num_return_sequences", 1)]
    assert generated(wrap(tiny), **prompt, **options)[:, 14:].tolist() == expected  # a batch padded on the left
    alone = generated(wrap(tiny), **row(prompt, 2), **options)
    assert alone[:, 14:].tolist() == expected[-len(alone) :]


def test_greedy_tokens_hang_on_nothing_else(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    found = generated(model, **prompt)
    assert torch.equal(found, generated(model, **prompt, use_cache=False))
    assert torch.equal(found[:, :14], prompt["input_ids"])
    embedded = tiny.embed(prompt["input_ids"], prompt["pixel_values"])
    assert torch.equal(found[:, 14:], generated(model, inputs_embeds=embedded, attention_mask=prompt["attention_mask"]))
    for i in range(3):
        alone = row(prompt, i)
        assert torch.equal(generated(model, **alone)[0, alone["input_ids"].shape[1] :], found[i, 14:])
    text = {"input_ids": prompt["input_ids"][1:2, 9:]}
    assert torch.equal(generated(model, **text, prefill_chunk_size=2)[0, 5:], found[1, 14:])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_carry_their_own_states(tiny: Model, prompt: dict[str, torch.Tensor], options: dict[str, int]) -> None:
    model = wrap(tiny)
    with_state = generated(model, **prompt, **options)
    assert with_state.shape[0] == 3 * options.get("num_return_sequences", 1)
    assert torch.equal(with_state, generated(model, **prompt, **options, use_cache=False))


def test_sampling_draws_from_the_same_distribution(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model, options = wrap(tiny), {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "max_new_tokens": 6}
    torch.manual_seed(0)
    drawn = generated(model, **prompt, **options)
    torch.manual_seed(0)
    assert torch.equal(drawn, generated(model, **prompt, **options, use_cache=False))
    assert drawn.shape == (6, 20) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generation_goes_on_from_a_cache(tiny: Model, prompt: dict[str, torch.Tensor], name: str) -> None:
    model = wrap(tiny)
    whole = generated(model, **prompt)
    first = generated(model, **prompt, max_new_tokens=5, return_dict_in_generate=True)
    mask = torch.cat([prompt["attention_mask"], torch.ones(3, 5).long()], 1)
    for ids in (first.sequences, first.sequences[:, -1:]):  # all that was said, or what no pass has read
        rest = generated(model, input_ids=ids, attention_mask=mask, **{name: first[CACHE]}, max_new_tokens=7)
        assert torch.equal(rest[:, -7:], whole[:, -7:])
    with pytest.raises(UserError, match="no cache can be given"):
        generated(model, input_ids=first.sequences, attention_mask=mask, **{name: first[CACHE]}, use_cache=False)
