"""What transformers' GenerationTesterMixin asks of a model, in our own words: its source is in no distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, DynamicCache, TextStreamer, pipeline
from wrapped import generated, picture, user, wrap

from mmmamba.errors import UserError
from mmmamba.hf.state_cache import CACHE
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, VisionConfig, initialise
from tiny import make_config

KINDS = {"teacher": (ATTENTION,) * 5, "hybrid": (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2), "linear": (MAMBA2,) * 5}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Model]) -> Any:
    return wrap(tiny_model(KINDS[request.param], Mamba2Options(rope=True)).double())


def full(model: Any, **inputs: Any) -> Any:
    return generated(model, **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | inputs)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_scores_logits_and_sequences(model: Any, prompt: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    found = full(model, **prompt, **options, max_new_tokens=5, output_hidden_states=True)
    rows, beams = 3 * options.get("num_return_sequences", 1), options.get("num_beams", 1)
    assert found.sequences.shape == (rows, 19)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == 5
    assert all(step.shape == (3 * beams, 320) for step in (*found.scores, *found.logits))
    assert [len(step) for step in found.hidden_states] == [6] * 5
    assert [step[0].shape[:2] for step in found.hidden_states] == [(3 * beams, 14), *[(3 * beams, 1)] * 4]
    assert found[CACHE].get_seq_length() == 18
    if options == {}:
        with torch.no_grad():
            first = model(**prompt).logits[:, -1].float()
        assert torch.allclose(found.logits[0], first)
        for i in range(5):
            assert torch.equal(found.scores[i].argmax(-1), found.sequences[:, 14 + i])
        sums = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        assert sums.shape == (3, 5) and bool((sums <= 0).all())
    if "num_return_sequences" in options:
        assert bool((found.sequences_scores.view(3, 2).diff() <= 0).all())


def test_attentions_of_each_step(model: Any, prompt: dict[str, torch.Tensor]) -> None:
    text = {"input_ids": prompt["input_ids"][1:2, 9:]}
    if model.config.model_config().new_layers:
        with pytest.raises(UserError, match="is a state space layer"):
            full(model, **text, output_attentions=True)
    else:
        found = full(model, **text, output_attentions=True, max_new_tokens=3)
        assert [tuple(step[0].shape) for step in found.attentions] == [(1, 4, 5, 5), (1, 4, 1, 6), (1, 4, 1, 7)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_embeddings_with_pictures(model: Any, prompt: dict[str, torch.Tensor], options: dict[str, int]) -> None:
    with torch.no_grad():
        embedded = model.text_embeddings(prompt["input_ids"])
    given = {name: prompt[name] for name in ("attention_mask", "pixel_values")}
    expected = generated(model, **prompt, **options)[:, 14:]
    assert torch.equal(generated(model, inputs_embeds=embedded, **given, **options), expected)
    both = generated(model, input_ids=prompt["input_ids"], inputs_embeds=embedded, **given, **options)
    assert torch.equal(both[:, 14:], expected)


def test_embeddings_with_pictures_that_become_tokens_late(prompt: dict[str, torch.Tensor]) -> None:
    vision = VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc="post")
    model = wrap(initialise(Model(make_config(KINDS["hybrid"], vision=vision))).double())
    with torch.no_grad():
        embedded = model.text_embeddings(prompt["input_ids"])
    given = {name: prompt[name] for name in ("attention_mask", "pixel_values")}
    assert torch.equal(generated(model, inputs_embeds=embedded, **given), generated(model, **prompt)[:, 14:])


def test_other_ways_of_choosing(tiny_model: Callable[..., Model], prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny_model(KINDS["hybrid"], Mamba2Options(rope=True)).double())

    def new(**options: Any) -> torch.Tensor:
        return generated(model, **{**prompt, "max_new_tokens": 5} | options)[:, 14:]

    plain = new()
    assert torch.equal(new(num_beams=1, temperature=1.0, top_p=1.0), plain)
    guided = new(guidance_scale=2.0)
    assert torch.equal(guided, new(guidance_scale=2.0, use_cache=False)) and not torch.equal(guided, plain)
    assert all(len(set(one.tolist())) == 5 for one in new(no_repeat_ngram_size=1))
    banned = int(plain[0, 0])
    assert banned not in new(bad_words_ids=[[banned]])[0]
    assert bool((new(forced_eos_token_id=2)[:, -1] == 2).all())
    assert not torch.equal(new(repetition_penalty=0.1), plain)
    ended = new(eos_token_id=banned, pad_token_id=0)[0]
    assert ended.tolist() == [banned, *[0] * (len(ended) - 1)]
    assert new(max_new_tokens=None, max_length=16).shape == (3, 2)
    assert new(min_new_tokens=4, eos_token_id=banned).shape[1] >= 4


def test_nothing_is_taken_and_dropped(model: Any, prompt: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        generated(model, **prompt, no_such_option=3)
    with pytest.raises(ValueError, match="output_router_logits"):
        generated(model, **prompt, output_router_logits=True)
    for kind in ("static", "offloaded", "quantized", "dynamic"):
        with pytest.raises(UserError, match=f"cache_implementation is '{kind}'.*its state"):
            generated(model, **prompt, cache_implementation=kind)
    with pytest.raises(UserError, match="must be a StateCache or a State of this model, got DynamicCache: its layers"):
        generated(model, **prompt, **{CACHE: DynamicCache()})
    with pytest.raises(UserError, match="continuous batching"):
        generated(model, input_ids=prompt["input_ids"][1:2, 9:], cache_implementation="paged")
    with pytest.raises(UserError, match="continuous batching"):
        model.generate_batch([[1, 20, 30]])
    with pytest.raises(ValueError, match="stateful"):
        generated(model, input_ids=prompt["input_ids"][1:2, 9:], assistant_model=model)


def test_one_model_serves_many_calls(model: Any, prompt: dict[str, torch.Tensor], tmp_path: Path) -> None:
    first = generated(model, **prompt)
    assert torch.equal(generated(model.train(), **prompt), first) and model.training
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(generated(again, **prompt), first)
    model.gradient_checkpointing_enable()
    assert torch.equal(generated(model.train(), **prompt), first)


def test_stop_strings(folder_of) -> None:
    folder = folder_of("nano-hybrid")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [user("What colour is the circle?", picture("red"))],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    said = tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0, length:], skip_special_tokens=True)
    stop = said[len(said) // 2]
    short = model.generate(**inputs, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)[0, length:]
    text = tokenizer.decode(short, skip_special_tokens=True)
    assert stop in text and said.startswith(text) and stop not in tokenizer.decode(short[:-1])
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, max_new_tokens=12, stop_strings=[stop])
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        model.generate(**inputs, max_new_tokens=12, assistant_tokenizer=tokenizer)
    heard: list[str] = []

    class Heard(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            heard.append(text)

    model.generate(**inputs, max_new_tokens=12, streamer=Heard(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert "".join(heard).strip() == said.strip()


def test_pipelines_stop_too(folder_of) -> None:
    pipe = pipeline("text-generation", model=str(folder_of("pico-linear")))
    chat = [{"role": "user", "content": "hello"}]
    # A trained model ends its answer by itself, at once if it has nothing to say.
    options = {"max_new_tokens": 8, "return_full_text": False, "do_sample": False, "suppress_tokens": list(range(8))}
    said = pipe(chat, **options)[0]["generated_text"]
    stop = pipe.tokenizer.decode(pipe.tokenizer.encode(said, add_special_tokens=False)[1])
    short = pipe(chat, **options, stop_sequence=stop)[0]["generated_text"]
    assert stop in short and said.startswith(short) and len(short) < len(said)
