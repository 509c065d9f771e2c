"""A tiny GGUF file, written here, against what transformers reads from it."""

from __future__ import annotations

import io
import json
import socket
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmmamba.checkpoints import gguf as gguf_module
from mmmamba.checkpoints import load, open_source
from mmmamba.checkpoints.gguf import GgufWeights, find_gguf, gguf_config, gguf_json, gguf_tokenizer
from mmmamba.checkpoints.gguf_file import read_header
from mmmamba.checkpoints.llama import read_llama
from mmmamba.convert import convert
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.model import Model

gguf = pytest.importorskip("gguf")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIALS, *sorted(ByteLevel.alphabet()), "he", "Ġt"]
HEADS, GROUPS, SIZE, WIDE, LAYERS = 4, 2, 32, 48, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tensor_shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, biases aside."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(WORDS), SIZE), "output_norm": (SIZE,)}
    if not tied:
        shapes["output"] = (len(WORDS), SIZE)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (SIZE, SIZE), f"blk.{i}.attn_k": (SIZE // 2, SIZE), f"blk.{i}.attn_v": (SIZE // 2, SIZE),
            f"blk.{i}.attn_output": (SIZE, SIZE), f"blk.{i}.ffn_gate": (WIDE, SIZE), f"blk.{i}.ffn_up": (WIDE, SIZE),
            f"blk.{i}.ffn_down": (SIZE, WIDE), f"blk.{i}.attn_norm": (SIZE,), f"blk.{i}.ffn_norm": (SIZE,),
        }  # fmt: skip
    return shapes


def write_gguf(
    path: Path, *, kind: str = "llama", tied: bool = True, more: dict[str, Any] | None = None, without: str = ""
) -> Path:
    """A random model with a byte-level tokenizer; ``more`` adds or replaces fields (text, int) and tensors (arrays),
    ``without`` leaves a tensor out."""
    more = dict(more or {})
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_context_length(128)
    for name, number in {"embedding_length": SIZE, "block_count": LAYERS, "attention.head_count": HEADS}.items():
        if f"{kind}.{name}" not in more:
            writer.add_uint32(f"{kind}.{name}", number)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types(more.pop("types", [3] * len(SPECIALS) + [1] * (len(WORDS) - len(SPECIALS))))
    writer.add_token_merges(["h e", "Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    for name, shape in tensor_shapes(tied).items():
        drawn = random.normal(size=shape).astype(np.float32)
        if f"{name}.weight" != without:
            writer.add_tensor(f"{name}.weight", more.pop(f"{name}.weight", drawn))
    biases = (("q", SIZE), ("k", SIZE // 2), ("v", SIZE // 2)) if kind == "qwen2" else ()
    for i, (name, size) in product(range(LAYERS), biases):
        writer.add_tensor(f"blk.{i}.attn_{name}.bias", random.normal(size=size).astype(np.float32))
    for name, value in more.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build(file: Path) -> Model:
    config, weights = gguf_config(file), GgufWeights(file)
    state: dict[str, torch.Tensor] = {}
    for part in (None, *range(config.num_layers)):
        state |= read_llama(weights, config, part)
    if config.tie_word_embeddings:
        state["head.weight"] = state["text_embeddings.weight"]
    model = Model(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("kind, tied", [("llama", True), ("qwen2", False)])
def test_logits_and_prompts_are_those_of_transformers(kind, tied, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", kind=kind, tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = build(find_gguf(tmp_path))
    stack = ours.config.decoder
    assert (stack.qkv_bias, stack.o_bias, ours.config.tie_word_embeddings) == (kind == "qwen2", False, tied)
    assert (stack.rope_theta, stack.max_position_embeddings, ours.config.eos_token_id) == (1e5, 128, 2)
    processor = Processor(Tokenizer.from_folder(tmp_path), ours.config)
    prompt = processor.prompt([Turn("human", "the 12 hens")]).input_ids.tolist()
    messages = [{"role": "user", "content": "the 12 hens"}]
    assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert processor.stop_token_ids == (2, 1)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, more, reason", [
    ("gemma", {}, "'general.architecture' is 'gemma': only llama"),
    ("llama", {"llama.rope.scaling.type": "yarn"}, "'llama.rope.scaling.type' is 'yarn'"),
    ("llama", {"llama.expert_count": 8}, "'llama.expert_count' is 8"),
    ("llama", {"llama.attention.sliding_window": 64}, "'llama.attention.sliding_window' is 64"),
    ("llama", {"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, "'llama.rope.dimension_count' is no"),
    ("qwen2", {"qwen2.attention.key_length": 4}, "'qwen2.attention.key_length' is 4, but a head has 8"),
    ("llama", {"rope_freqs.weight": np.ones(4, np.float32)}, "'rope_freqs.weight' scales RoPE"),
    ("llama", {"blk.0.attn_q.bias": np.ones(SIZE, np.float32)}, "'blk.0.attn_q.bias' is not read from GGUF"),
])  # fmt: skip
def test_what_transformers_would_leave_out_is_refused(kind, more, reason, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", kind=kind, more=more)
    with pytest.raises(UserError, match=reason):
        gguf_json(file)


def test_broken_and_ambiguous_files(tmp_path):
    file = write_gguf(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(file.read_bytes()[:5000])
    assert find_gguf(tmp_path / "b.gguf") == tmp_path / "b.gguf" and find_gguf(tmp_path / "none") is None
    for read in (gguf_config, gguf_tokenizer):
        with pytest.raises(UserError, match=r"b\.gguf: not a usable GGUF file"):
            read(tmp_path / "b.gguf")
        with pytest.raises(UserError, match=r"c\.gguf: no such file"):
            read(tmp_path / "c.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); give the path of one"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None


def test_values_that_are_not_finite(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", more={"output_norm.weight": np.full(SIZE, np.nan, np.float32)})
    with pytest.raises(UserError, match=r"tiny\.gguf: tensor 'output_norm.weight' has 32 values that are not finite"):
        build(file)


def test_a_file_that_changes_is_read_anew(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    assert gguf_config(file).tie_word_embeddings
    assert not gguf_config(write_gguf(file, tied=False)).tie_word_embeddings


def test_user_defined_tokens_are_read_in_text_and_control_tokens_are_not(tmp_path: Path) -> None:
    """Kind 4 of a GGUF vocabulary is an added token that is not special, kind 3 a special one."""
    types = [3, 3, 4, *[1] * (len(WORDS) - len(SPECIALS))]
    file = write_gguf(tmp_path / "tiny.gguf", more={"types": types, "tokenizer.ggml.eos_token_id": 0})
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "a<|im_end|>b<|im_start|>"
    ids = tokenizer.encode(text, allow_special=False)
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert 2 in ids and 1 not in ids and tokenizer.decode(ids) == text


# ---------------------------------------------------------------------------------------------- a stranger's file


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_up.weight", "token_embd.weight", "output_norm.weight", "blk.1.attn_norm.weight"]
)
def test_a_tensor_that_is_missing_is_named(name, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", without=name)
    for read in (open_source, load):
        with pytest.raises(UserError, match=rf"tiny\.gguf: does not match .*: 1 missing tensor \({name}\)"):
            read(tmp_path)


@pytest.mark.parametrize("more, complaint", [
    ({"blk.0.ffn_up.weight": np.ones((WIDE + 1, SIZE), np.float32)}, r"blk\.0\.ffn_up\.weight is \(49, 32\), expected"),
    ({"blk.7.ffn_up.weight": np.ones((WIDE, SIZE), np.float32)}, r"1 unexpected tensor \(blk\.7\.ffn_up\.weight\)"),
    ({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}, r"1 unexpected tensor \(blk\.0\.attn_q_norm\.weight\)"),
    ({"mystery": np.ones(8, np.float32)}, r"1 unexpected tensor \(mystery\)"),
    ({"llama.block_count": 3}, r"9 missing tensors \(blk\.2\.attn"),
    ({"llama.block_count": 10**6}, "'num_hidden_layers'|layers"),
    ({"llama.embedding_length": 0}, "'llama.embedding_length' must be a positive number, got 0"),
    ({"llama.attention.head_count": "four"}, "'llama.attention.head_count' must be a positive number, got 'four'"),
])  # fmt: skip
def test_what_does_not_fit_its_header_is_named(more, complaint, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", more=more)
    with pytest.raises(UserError, match=complaint):
        load(tmp_path)


def test_kinds_of_numbers(tmp_path):
    """Halves and blocks are dequantised; whole numbers are no weights."""
    half = np.random.default_rng(1).normal(size=SIZE).astype(np.float16)
    file = write_gguf(tmp_path / "tiny.gguf", more={"output_norm.weight": half})
    assert torch.equal(GgufWeights(file)["model.norm.weight"], torch.from_numpy(half.astype(np.float32)))
    file = write_gguf(tmp_path / "tiny.gguf", more={"output_norm.weight": np.ones(SIZE, np.int32)})
    with pytest.raises(UserError, match=r"tensor 'output_norm\.weight' is I32, which is not read"):
        load(file)


COUNTS = {
    "tensors": (8, 2**60, r"says that it has 1,152,921,504,606,846,976 tensors"),
    "fields": (16, 2**63, r"fields, more than any model has"),
    "a name": (24, 2**40, r"a field's name claims to be 1,099,511,627,776 bytes long"),
    "version": (4, 99, r"its version is"),
    "no GGUF": (0, 0, r"does not start with 'GGUF'"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_absurd_counts_are_refused_at_once(name, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    at, value, complaint = COUNTS[name]
    content = bytearray(file.read_bytes())
    content[at : at + 8] = value.to_bytes(8, "little")
    file.write_bytes(content)
    for read in (gguf_json, gguf_tokenizer, load):
        with pytest.raises(UserError, match=rf"tiny\.gguf: not a usable GGUF file: .*{complaint}"):
            read(file)


@pytest.mark.parametrize("text, value", [(b"tokenizer.ggml.tokens", 2**60), (b"tokenizer.ggml.tokens", 5_000_000)])
def test_absurd_lists_are_refused_at_once(text, value, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(file.read_bytes())
    at = content.index(text) + len(text) + 8  # after the kinds of the field and of its items
    content[at : at + 8] = value.to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"'tokenizer\.ggml\.tokens' is a list of"):
        gguf_tokenizer(file)


def test_any_cut_and_any_changed_byte_of_the_header_is_one_line(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    content = file.read_bytes()
    random = np.random.default_rng(0)
    end = content.index(b"token_embd") + 600
    for i in range(120):
        changed = bytearray(content)
        if i % 3:
            changed[random.integers(end)] ^= 1 << random.integers(8)
        else:
            del changed[random.integers(end) :]
        file.write_bytes(changed)
        try:
            weights = GgufWeights(file)
            assert len(weights) >= 0
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


# ---------------------------------------------------------------------------------------------- a stranger's folder


EVIL = 'import pathlib\npathlib.Path("CODE_RAN").touch()\nclass Tok: pass\nclass Config: pass\nclass Model: pass\n'


def test_nothing_of_the_folder_is_run_or_read(tmp_path, monkeypatch):
    """transformers would ask whether to run ``evil.py``, and a pipe may answer yes."""
    (tmp_path / "model").mkdir()
    file = write_gguf(tmp_path / "model" / "tiny.gguf")
    plain = gguf_tokenizer(file), gguf_json(file)
    auto = {
        "AutoTokenizer": ["evil.Tok", "evil.Tok"],
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
    }
    for name in ("tokenizer_config.json", "adapter_config.json", "generation_config.json", "processor_config.json"):
        content = {"auto_map": auto, "tokenizer_class": "EvilTok", "bos_token": "EVIL", "chat_template": "EVIL"}
        (file.parent / name).write_text(json.dumps(content))
    (file.parent / "chat_template.jinja").write_text("EVIL")
    (file.parent / "tokenizer.json").write_text("{EVIL")
    (file.parent / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    gguf_module._read_tokenizer.cache_clear()
    assert (gguf_tokenizer(file), gguf_json(file)) == plain
    convert("model", tmp_path / "out")
    assert not list(tmp_path.rglob("CODE_RAN"))
    assert not any("EVIL" in path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")


def test_the_hub_is_not_asked(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("looked up a host"))
    gguf_module._read_tokenizer.cache_clear()
    gguf_tokenizer(file)
    load(file)


def test_a_tensor_of_one_number_is_no_block_of_many(tmp_path):
    name = b"token_embd.weight"
    header = struct.pack("<4sIQQQ", b"GGUF", 3, 1, 0, len(name)) + name + struct.pack("<IIQ", 0, 2, 0)  # Q4_0
    (tmp_path / "m.gguf").write_bytes(header + bytes(64))
    with pytest.raises(UserError, match="rows of 1, which are no blocks of 32"):
        read_header(tmp_path / "m.gguf", {2: (32, 18)})
