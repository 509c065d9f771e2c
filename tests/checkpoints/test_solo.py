"""SOLO's layout on a tiny random model: names, config, and the values that its published code computes."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
import sentencepiece as spm
import torch
import transformers
from PIL import Image

from mmmamba.checkpoints.layouts import Layout, by_part, parts, stored_shapes, write_part
from mmmamba.checkpoints.solo import PATCH_TOKEN_ID, config_from_solo, is_solo, read_solo, write_solo
from mmmamba.data.patches import patch_rows
from mmmamba.data.processor import Processor
from mmmamba.data.sample import HUMAN, Turn
from mmmamba.data.tiling import normalise
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.model import Model, initialise
from tiny import WORDS, make_config

ADDED = ["<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>", "<|im_start|>", "<|im_end|>"]
DATA = {
    "architectures": ["SoloForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000 + len(ADDED),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "sliding_window": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vision_patch_size": 32,
}
SOLO = Layout(name="solo", fits=is_solo, config=config_from_solo, read=read_solo, write=write_solo)


@pytest.fixture(scope="module")
def mistral():
    """transformers' decoder with random weights."""
    torch.manual_seed(0)
    given = {key: value for key, value in DATA.items() if key not in ("architectures", "vision_patch_size")}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**given, initializer_range=0.2)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def stored(mistral):
    """The tensors of a folder."""
    generator = torch.Generator().manual_seed(1)
    patch = torch.randn(16, 3 * 32 * 32, generator=generator) / 55
    return {**mistral.state_dict(), "model.embed_vision_patch.weight": patch}


def our_model(stored, config) -> Model:
    model = Model(config)
    ours = {}
    for part in parts(config):
        ours |= read_solo(stored, config, part)
    model.load_state_dict(ours)
    return model.eval()


def test_config():
    config = config_from_solo(DATA, "config.json")
    assert (config.num_layers, config.embedding.num_layers, config.decoder.num_kv_heads) == (3, 0, 2)
    assert (config.img_context_token_id, config.template, config.eos_token_id) == (32001, "solo", 2)
    vision = config.vision
    assert (vision.patch_size, vision.max_side, vision.tokens_per_tile) == (32, 1024, 1)
    with_code = {**DATA, "auto_map": {"AutoModelForCausalLM": "modeling_solo.SoloForCausalLM"}}
    assert config_from_solo(with_code, "config.json") == config
    assert is_solo(DATA) and not is_solo({"model_type": "mistral", "architectures": ["MistralForCausalLM"]})


def test_the_forward_is_the_published_one(mistral, stored):
    """embed_tokens(ids), the patches' map added where the marks are, then Mistral."""
    model = our_model(stored, config_from_solo(DATA, "config.json"))
    rng = np.random.default_rng(0)
    first, second = (
        patch_rows(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), 32, 1024)
        for size in ((60, 90), (32, 32))
    )
    pixels = normalise(torch.from_numpy(np.concatenate([p.reshape(-1, 32, 32, 3) for p in (first, second)])))
    vision, patch, row = 32000, 32001, 32002
    assert first.shape[:2] == (2, 3) and pixels.shape == (7, 3, 32, 32)
    ids = [vision, *[patch] * 3, row, *[patch] * 3, vision, 1, 17, 400, 2, vision, patch, vision, 9, 31]
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        embeds = mistral.model.embed_tokens(input_ids)
        flat = pixels.reshape(7, -1)  # channels, rows, columns of a patch
        embeds[input_ids == PATCH_TOKEN_ID] += flat @ stored["model.embed_vision_patch.weight"].T
        expected = mistral(inputs_embeds=embeds).logits
        found = model(input_ids, pixels).logits
        torch.testing.assert_close(model.embed(input_ids, pixels), embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        text = torch.tensor([[1, 5, 300, 31]])
        torch.testing.assert_close(model(text).logits, mistral(text).logits, rtol=1e-4, atol=1e-4)
        # In two packed sequences, and in two calls with the state between them.
        packed = model(input_ids, pixels, cu_seqlens=torch.tensor([0, 9, len(ids)], dtype=torch.int32)).logits
        alone = model(input_ids[:, 9:], pixels[6:]).logits
        torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-4, atol=1e-4)
        begun = model(input_ids[:, :9], pixels[:6], return_state=True)
        rest = model(input_ids[:, 9:], pixels[6:], state=begun.state).logits
        torch.testing.assert_close(rest, expected[:, 9:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="7 <IMG_CONTEXT> positions for 6 image tokens"):
        model(input_ids, pixels[:6])


def test_round_trip_is_lossless(stored):
    config = config_from_solo(DATA, "config.json")
    assert {name: tensor.shape for name, tensor in stored.items()} == stored_shapes(SOLO, config, "config.json")
    model = our_model(stored, config)
    theirs = {}
    for part, ours in by_part(model.state_dict(), config).items():
        theirs |= write_part(SOLO, ours, config, part)
    assert theirs.keys() == stored.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in stored.items())


def test_parts_touch_only_their_own_tensors(stored):
    class Watched(dict):
        def __getitem__(self, name):
            touched.add(name)
            return super().__getitem__(name)

    config = config_from_solo(DATA, "config.json")
    for part in parts(config):
        touched: set[str] = set()
        read_solo(Watched(stored), config, part)
        assert all((part is None) != name.startswith("model.layers.") for name in touched)
        assert part is None or all(name.startswith(f"model.layers.{part}.") for name in touched)


def test_a_tied_head(stored):
    data = {**DATA, "tie_word_embeddings": True}
    config = config_from_solo(data, "config.json")
    assert "lm_head.weight" not in stored_shapes(SOLO, config, "config.json")


def test_other_models_are_left_behind_by_name():
    model = initialise(Model(make_config()), 0)
    with pytest.raises(UserError, match=r"the solo layout has no place for .* parameters \(vision\."):
        write_part(SOLO, by_part(model.state_dict(), model.config)[None], model.config, None)


@pytest.mark.parametrize("changes, reason", [
    ({"architectures": ["MistralForCausalLM"]}, r"'architectures' is \['MistralForCausalLM'\]"),
    ({"vocab_size": 32000}, "'vocab_size' is 32000: no room for the token 32001, <vpatch>"),
    ({"vision_patch_size": 30}, "'vision_patch_size' is 30: max_side .1024. is not a multiple"),
    ({"vision_patch_size": "32"}, "'vision_patch_size' must be int"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ({"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
])  # fmt: skip
def test_bad_configs(changes, reason):
    with pytest.raises(UserError, match=f"config.json: {reason}"):
        config_from_solo({**DATA, **changes}, "config.json")


def piece(text: str) -> bytes:
    """A row of a sentencepiece model, as the protocol buffer has it."""
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", 0.0)
    return b"\x0a" + bytes([len(body)]) + body


def test_prompt_with_a_tokenizer_made_as_published(tmp_path, stored):
    """The conversion script appends its marks to Mistral's 32,000 pieces as ordinary ones, which no text reaches."""
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 10), model_writer=file, model_type="bpe", vocab_size=330, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    size = spm.SentencePieceProcessor(model_proto=file.getvalue()).vocab_size()
    fillers = b"".join(piece(f"<filler_{i}>") for i in range(size, 32000))
    data = file.getvalue() + fillers + b"".join(map(piece, ADDED))
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    library = spm.SentencePieceProcessor(model_proto=data)
    config = config_from_solo(DATA, "config.json")
    processor = Processor(Tokenizer.from_folder(tmp_path), config)
    image = Image.fromarray(np.zeros((40, 64, 3), np.uint8))
    encoded = processor.prompt([Turn(HUMAN, "<image>\nhow many <vpatch> ?")], [image])
    patches = [32000, 32001, 32001, 32002, 32001, 32001, 32000]
    assert encoded.input_ids.tolist() == [*patches, 1, *library.encode("[INST] how many <vpatch> ? [/INST]")]
    answer = processor.template.pieces([Turn("gpt", "red circles")], reply=False)[1]
    assert processor.tokenizer.encode(answer.text, allow_special=False, after="text") == library.encode("red circles")
    with torch.no_grad():
        logits = our_model(stored, config)(
            torch.from_numpy(encoded.input_ids)[None].long(), normalise(torch.from_numpy(encoded.tiles))
        ).logits
    assert torch.isfinite(logits).all()
