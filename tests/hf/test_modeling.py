"""The transformers model: our network's values, our folders, and generate() over our state."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
    set_seed,
)
from wrapped import BUILTIN, generated, picture, row, user, wrap

import mmmamba
from mmmamba.data.sample import Turn
from mmmamba.errors import UserError
from mmmamba.hf import MMMambaConfig, MMMambaForConditionalGeneration, StateCache
from mmmamba.hf.state_cache import CACHE, CACHE_NAMES
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, initialise
from tiny import make_config

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
QUESTIONS = [
    ("What colour is the circle?", [picture("red")]),
    ("Is there a square in the picture, and how many circles are there?", [picture("blue", (160, 64))]),
    ("How many shapes are there?", [picture("green")]),
    ("hello", []),
]


@pytest.fixture
def tiny(tiny_model: Callable[..., Model]) -> Model:
    """float64, so that a token picked greedily does not hang on rounding."""
    return tiny_model(HYBRID, Mamba2Options(rope=True)).double()


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_built_in_models_give_the_same_logits(name: str, auto: Any, folder_of) -> None:
    ours, theirs = mmmamba.load(name), auto.from_pretrained(folder_of(name), dtype=torch.float32)
    inputs = AutoProcessor.from_pretrained(folder_of(name)).apply_chat_template(
        [user(QUESTIONS[1][0], *QUESTIONS[1][1])], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = ours(inputs["input_ids"], inputs["pixel_values"]).logits
        assert torch.equal(theirs(**inputs).logits, expected)
        assert torch.equal(theirs(**inputs, return_dict=False)[0], expected)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_bits_on_disk_are_ours(shards: dict[str, str], tied: bool, tmp_path: Path) -> None:
    config = make_config(HYBRID, tie_word_embeddings=tied)
    model = initialise(Model(config), 3)
    wrap(model).save_pretrained(tmp_path, **shards)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 if shards else [file.name for file in files] == ["model.safetensors"]
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = model.state_dict()
    assert set(stored) == set(expected) - ({"head.weight"} if tied else set())
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    ours, theirs = mmmamba.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs.head.weight is theirs.text_embeddings.weight) is tied
    for found in (ours.state_dict(), theirs.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decays_stay_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = wrap(initialise(Model(make_config(HYBRID))))
    exact = model.layers[1].mixer.A_log.data.clone()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    for other in (loaded, made, model.to(dtype)):
        for name, parameter in other.named_parameters():
            kept = name.endswith(("A_log", "dt_bias"))
            assert parameter.dtype == (torch.float32 if kept else dtype), name
    assert torch.equal(loaded.layers[1].mixer.A_log, exact) and torch.equal(model.layers[1].mixer.A_log, exact)
    assert loaded(torch.tensor([[1, 20, 30]])).logits.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    ours = mmmamba.load(tmp_path / "again", dtype=dtype)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_delta_is_completed_from_its_teacher(folder_of) -> None:
    asset = Path(mmmamba.checkpoints.resolve("pico-linear"))
    assert json.loads((asset / "config.json").read_text())["delta"]
    whole, delta = (AutoModelForCausalLM.from_pretrained(f) for f in (folder_of("pico-linear"), asset))
    assert all(torch.equal(delta.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    assert not delta.config.delta and delta.config.teacher["name"] == "pico-teacher"


def test_a_delta_without_its_teacher_says_what_to_do(tmp_path: Path) -> None:
    asset = mmmamba.checkpoints.resolve("pico-linear")
    data = json.loads((asset / "config.json").read_text())
    data["teacher"]["name"] = "elsewhere"
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").symlink_to(asset / "model.safetensors")
    with pytest.raises(UserError, match="its teacher 'elsewhere', which is not there"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="mmmamba convert"):
        MMMambaForConditionalGeneration.from_pretrained("somebody/student", config=MMMambaConfig(**data))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_tensors_that_are_missing_or_left_over_are_refused(change: str, tmp_path: Path) -> None:
    wrap(initialise(Model(make_config(HYBRID)))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del tensors["layers.1.mixer.A_log"]
    else:
        tensors["layers.1.mixer.extra"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 {change} tensors \(layers.1.mixer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_copies_and_replaced_modules_reach_the_network(tiny: Model) -> None:
    ids = torch.tensor([[1, 20, 30]])
    model = wrap(tiny)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)
        with torch.no_grad():
            other.head.weight.zero_()
        assert other(ids).logits.abs().max() == 0 < model(ids).logits.abs().max()
    model.head = torch.nn.Linear(64, 3).double()
    assert model(ids).logits.shape == (1, 3, 3)


def test_the_vocabulary_grows(tiny: Model, tmp_path: Path) -> None:
    ids, model = torch.tensor([[1, 20, 30]]), wrap(tiny)
    before = model(ids).logits
    model.resize_token_embeddings(330, mean_resizing=False)
    assert torch.allclose(model(ids).logits[..., :320], before)
    model.save_pretrained(tmp_path)
    assert mmmamba.load(tmp_path).config.vocab_size == 330
    special = Model(make_config(special_token_maps={"<a>": 320}, vocab_size=321, text_vocab_size=320))
    with pytest.raises(UserError, match="can't be resized"):
        wrap(special).resize_token_embeddings(330)


def test_tokens_are_added_saved_and_read_again(folder_of, tmp_path: Path) -> None:
    folder = folder_of("pico-linear")
    model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<think>", "<tool_call>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, read = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert again.config.vocab_size == len(read.tokenizer) == 642 and read.tokenizer("<think>").input_ids == [640]
    ids = torch.tensor([[1, 640, 30]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(mmmamba.load(tmp_path)(ids).logits, model(ids).logits)
    assert 640 in mmmamba.load_processor(tmp_path).prompt([Turn("human", "a <think> b")]).input_ids


def test_a_model_from_a_config_is_started_as_ours_under_set_seed() -> None:
    config = MMMambaConfig(make_config(HYBRID))
    made = []
    for seed in (1, 1, 2):
        set_seed(seed)
        made.append(AutoModelForCausalLM.from_config(config))
    weights = [model.layers[1].mlp.up.weight for model in made]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    set_seed(1)
    other = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    assert torch.equal(other[0].head.weight, made[0].head.weight)
    assert not torch.equal(other[0].head.weight, other[1].head.weight)
    expected = initialise(Model(config.model_config()), 7)  # at the scale of ours
    assert torch.allclose(weights[0].std(), expected.layers[1].mlp.up.weight.std(), rtol=0.1)


# ---------------------------------------------------------------------------------------------- passes


@torch.no_grad()
def test_passes_that_must_agree(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    whole = model(**prompt).logits
    assert torch.equal(whole, tiny(**prompt).logits)
    assert torch.allclose(model(**prompt, logits_to_keep=1).logits, whole[:, -1:])
    assert torch.allclose(model(**prompt, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.allclose(model(**prompt, logits_to_keep=torch.tensor([12, 13])).logits, whole[:, 12:])
    for i in range(3):
        alone = row(prompt, i)
        assert torch.allclose(model(**alone).logits, whole[i : i + 1, -alone["input_ids"].shape[1] :])
    embedded = tiny.embed(prompt["input_ids"], prompt["pixel_values"])
    assert torch.allclose(model(inputs_embeds=embedded, attention_mask=prompt["attention_mask"]).logits, whole)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["cache", "state"])
def test_a_state_goes_on_and_stays_as_it_was(
    tiny: Model, prompt: dict[str, torch.Tensor], kind: str, name: str
) -> None:
    model, mask = wrap(tiny), prompt["attention_mask"]
    more = torch.tensor([[21, 22], [23, 24], [25, 26]])
    joined = {**prompt, "input_ids": torch.cat([prompt["input_ids"], more], 1)}
    joined["attention_mask"] = torch.cat([mask, torch.ones_like(more)], 1)
    expected = model(**joined).logits[:, -2:]
    past = model(**prompt)[CACHE]
    assert isinstance(past, StateCache) and past.get_seq_length() == 14
    for _ in range(2):  # the second pass finds the state unchanged
        given = past.state if kind == "state" else past
        mask_too = {"attention_mask": joined["attention_mask"]} if kind == "cache" else {}
        assert torch.allclose(model(more, **{name: given}, **mask_too).logits, expected)
    assert CACHE not in model(**prompt, use_cache=False)
    assert CACHE not in model.train()(**prompt)


def test_loss_and_gradients(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    labels = prompt["input_ids"].masked_fill(prompt["attention_mask"] == 0, -100)
    out = model(**prompt, labels=labels)
    logits, wanted = out.logits[:, :-1].float(), labels[:, 1:]
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    summed = model(**prompt, labels=labels, num_items_in_batch=1).loss
    assert torch.allclose(summed, out.loss * (wanted != -100).sum())
    out.loss.backward()
    unused = ("class_embedding",)
    for name, parameter in model.named_parameters():
        assert name.endswith(unused) or (parameter.grad is not None and parameter.grad.abs().max() > 0), name


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 3).long(), "position_ids": torch.ones(1, 3)}, "go from 1 to 1"),
        ({"input_ids": torch.ones(1, 3).long(), "token_type_ids": torch.ones(1, 3)}, "no argument 'token_type_ids'"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)}, r"\(1, 2\), expected \(1, 3\)"),
        ({"input_ids": torch.ones(1, 3).long(), "cache": ()}, "must be a StateCache or a State"),
        ({"input_ids": torch.ones(1, 3).long(), "past_key_values": ()}, "must be a StateCache or a State"),
        ({"input_ids": torch.ones(1, 3).long(), **dict.fromkeys(CACHE_NAMES, ())}, "two names of one argument"),
        (
            {"inputs_embeds": torch.ones(1, 3, 64), "pixel_values": torch.ones(1, 3, 56, 56)},
            "0 <IMG_CONTEXT> positions",
        ),
        ({"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 2).long()}, r"labels are \(1, 2\)"),
    ],
)
def test_wrong_arguments_are_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(Model(make_config()))(**inputs)


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", BUILTIN)
def test_generate_says_what_the_engine_says(name: str, folder_of) -> None:
    ours, processor = mmmamba.load(name), mmmamba.load_processor(name)
    prompts = [processor.prompt([Turn("human", text)], images) for text, images in QUESTIONS]
    expected = [list(answer.token_ids) for answer in mmmamba.generate(ours, processor, prompts, max_new_tokens=12)]
    theirs = AutoModelForImageTextToText.from_pretrained(folder_of(name))
    hf = AutoProcessor.from_pretrained(folder_of(name))
    chats = [[user(text, *images)] for text, images in QUESTIONS]

    def answers(chat: list[Any]) -> list[list[int]]:
        inputs = hf.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        new = theirs.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :].tolist()
        stops = theirs.generation_config.eos_token_id
        return [ids[: next((i for i, token in enumerate(ids) if token in stops), None)] for ids in new]

    assert answers(chats) == expected  # one batch, padded on the left
    assert [answers(chat)[0] for chat in chats] == expected


def test_dynamic_rope_is_fixed_as_the_engine_fixes_it(tiny_processor) -> None:
    from mmmamba.model.stack import RopeScaling

    scaling = RopeScaling(type="dynamic", factor=4.0)
    config = make_config(system_message="")
    config = replace(config, decoder=replace(config.decoder, rope_scaling=scaling, max_position_embeddings=16))
    ours = initialise(Model(config)).double().eval()
    encoded = tiny_processor.prompt([Turn("human", "is it left of the square ? " * 3)])
    (answer,) = mmmamba.generate(ours, tiny_processor, [encoded], max_new_tokens=10)
    ids = torch.from_numpy(encoded.input_ids).long()[None]
    new = wrap(ours).generate(ids, max_new_tokens=10, eos_token_id=list(tiny_processor.stop_token_ids))
    assert new[0, ids.shape[1] :][: len(answer.token_ids)].tolist() == list(answer.token_ids)


def test_what_generation_can_not_do_is_refused(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model = wrap(tiny)
    with pytest.raises(UserError, match="cache_implementation is 'static'"):
        generated(model, **prompt, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        generated(model, **row(prompt, 1), prompt_lookup_num_tokens=3)
    with pytest.raises(UserError, match="for 3 tiles"):
        generated(model, **{**prompt, "pixel_values": prompt["pixel_values"][:2]}, num_beams=2)


def test_text_alone_through_the_auto_classes(folder_of) -> None:
    folder = folder_of("pico-linear")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ours, processor = mmmamba.load("pico-linear"), mmmamba.load_processor("pico-linear")
    (expected,) = mmmamba.generate(ours, processor, [processor.prompt([Turn("human", "hello")])], max_new_tokens=8)
    new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == expected.text
    assert pipeline("text-generation", model=str(folder))("hello", max_new_tokens=2)[0]["generated_text"]


def test_pipeline(folder_of) -> None:
    ours, processor = mmmamba.load("nano-hybrid"), mmmamba.load_processor("nano-hybrid")
    text, images = QUESTIONS[0]
    (expected,) = mmmamba.generate(ours, processor, [processor.prompt([Turn("human", text)], images)])
    pipe = pipeline("image-text-to-text", model=str(folder_of("nano-hybrid")))
    (said,) = pipe(text=[user(text, *images)], max_new_tokens=32, return_full_text=False)
    assert said["generated_text"] == expected.text
    assert "red" in expected.text
