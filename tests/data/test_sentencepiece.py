"""A sentencepiece model read as a fast tokenizer: the same ids and the same text as the sentencepiece library gives."""

from __future__ import annotations

import io
import json
import random
import time

import pytest
import sentencepiece as spm
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.data.sentencepiece import parse, to_fast
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError

ENGLISH = "the quick brown fox jumps over a lazy dog while reading what is in this picture of many words".split()
CHINESE = "图里有什么东西请描述一下这张照片中的人物和背景颜色是红蓝绿你好世界"
CODE = [
    "def f(x):",
    "    return x",
    "\tif a == b:",
    "[i for i in range(10)]",
    "x += 1",
    "{'a': 1}",
    "</div>",
    "\n",
    "\n\n",
]
EMOJI = ["🎉", "😀", "👨‍👩‍👧", "🇩🇪", "é", "é", "ñ", "Ω", "ßü", "ﬁ", "①", "㍿"]
CONTROLS = [chr(i) for i in range(1, 32)] + [
    "\x7f",
    "\x80",
    "\x85",
    "\u200b",
    "\u200d",
    "\u2028",
    "\ufeff",
    "\xa0",
    "▁",
]
SPECIALS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "<0x0A>",
    "[UNUSED_TOKEN_1]",
    "<IMG_CONTEXT>",
]
SYMBOLS = ["<tool>", "[UNUSED_TOKEN_1]", "a b", "   "]  # of which a model here and there has user-defined ones


def training_texts() -> list[str]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(ENGLISH, k=12)) for _ in range(120)]
    texts += ["".join(rng.choices(CHINESE, k=20)) for _ in range(120)]
    return texts + ["    ".join(rng.choices(CODE, k=4)) for _ in range(60)]


def train(**settings) -> bytes:
    """A small BPE model with byte fallback, as InternLM2's but for its size."""
    file = io.BytesIO()
    chosen = {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 560,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
        **settings,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter(training_texts()), model_writer=file, **chosen)
    return file.getvalue()


SPARE = [f"[UNUSED_TOKEN_{i}]" for i in range(4)]
MODELS = {
    "internlm2": train(user_defined_symbols=SPARE),
    "llama": train(add_dummy_prefix=True),
    "squeezed": train(add_dummy_prefix=True, remove_extra_whitespaces=True),
    "squeezed-bare": train(remove_extra_whitespaces=True),
    "digits": train(user_defined_symbols=list("0123456789")),
    "symbols": train(user_defined_symbols=["<tool>", "<tool>x", "▁▁▁▁", "▁▁", "\n\n", "fox", "a▁b"]),
}
LIBRARY = {name: spm.SentencePieceProcessor(model_proto=data) for name, data in MODELS.items()}
OURS = {name: Tokenizer(to_fast(parse(data, name), {}, name).to_str()) for name, data in MODELS.items()}


def sample_texts(count: int) -> list[str]:
    rng = random.Random(1)

    def part() -> str:
        kind = rng.randrange(8)
        if kind < 4:
            pool = (ENGLISH, list(CHINESE), CODE, EMOJI)[kind]
            return rng.choice(["", " "]).join(rng.choices(pool, k=rng.randint(1, 8)))
        if kind == 4:
            return "".join(rng.choices(" \n\t", weights=(6, 2, 1), k=rng.randint(1, 12)))
        if kind == 5:
            return "".join(rng.choices(CONTROLS, k=rng.randint(1, 4)))
        if kind == 6:
            return rng.choice(["", " "]).join(rng.choices(SPECIALS[:-2] + SYMBOLS, k=rng.randint(1, 2)))
        return "".join(chr(rng.choice((rng.randint(32, 0x7FF), rng.randint(0xE000, 0x1FFFF)))) for _ in range(5))

    return ["".join(part() for _ in range(rng.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_ids_and_text_as_sentencepiece(name):
    library, ours = LIBRARY[name], OURS[name]
    assert ours.vocab_size == library.vocab_size()
    for text in ["", " ", "▁", "  ", *sample_texts(5000)]:
        ids = library.encode(text)
        assert ours.encode(text, allow_special=False) == ids, text
        assert ours.decode(ids) == library.decode(ids), text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stretch", [1, 30])
def test_a_long_text_is_tokenised_in_stretches(name, stretch, monkeypatch):
    """Where the ends of a text are trimmed, or a symbol holds a space, it is not; the ids are the same either way."""
    monkeypatch.setattr("mmmamba.data.tokenizer.STRETCH", stretch)
    library, ours = LIBRARY[name], OURS[name]
    for text in ("\n".join(sample_texts(300)), " ".join(training_texts())):
        assert ours.encode(text, allow_special=False) == library.encode(text)
        assert (len(list(ours._stretches(text))) > 100) == (not name.startswith(("squeezed", "symbols")))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text(alphabet=" ▁\nab的😀\x00<0x41>"))
def test_the_same_for_any_text(name, text):
    library, ours = LIBRARY[name], OURS[name]
    ids = library.encode(text)
    assert ours.encode(text, allow_special=False) == ids
    assert ours.decode(ids) == library.decode(ids)


def test_a_character_map():
    """nmt_nfkc over ordinary text: where it differs from sentencepiece is rare and said when the model is read."""
    data = train(normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, remove_extra_whitespaces=True)
    library, ours = spm.SentencePieceProcessor(model_proto=data), Tokenizer(to_fast(parse(data, "x"), {}, "x").to_str())
    rng = random.Random(2)
    parts = [*ENGLISH, *CHINESE, *CODE, *EMOJI, " ", "  ", "，。！ＡＢ１２"]
    for _ in range(1000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        ids = library.encode(text)
        assert ours.encode(text, allow_special=False) == ids, text
        assert ours.decode(ids) == library.decode(ids), text


# ------------------------------------------------------------------------------------------------ folders


def write_folder(folder, name="internlm2", config=None, **files):
    """A folder as InternLM2 models are published: spare pieces renamed, image tokens after the last piece."""
    size = LIBRARY[name].vocab_size()
    if config is None:
        added = {0: "<unk>", 1: "<s>", 2: "</s>", size: "<img>", size + 1: "</img>", size + 2: "<IMG_CONTEXT>"}
        if name == "internlm2":
            added |= {
                LIBRARY[name].piece_to_id(SPARE[2]): "<|im_end|>",
                LIBRARY[name].piece_to_id(SPARE[3]): "<|im_start|>",
            }
        config = {
            "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in added.items()},
            "additional_special_tokens": [text for i, text in added.items() if i > 2],
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
            "tokenizer_class": "InternLM2Tokenizer",
            "sp_model_kwargs": None,
            "pad_token": "</s>",
            "decode_with_prefix_space": False,
        }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(MODELS[name])
    for file, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["internlm2", "llama"])
def published(request, tmp_path_factory):
    """(name, tokenizer of a published folder)"""
    folder = write_folder(tmp_path_factory.mktemp("tokenizers") / "published", request.param)
    return request.param, Tokenizer.from_folder(folder)


def test_special_tokens_are_found_only_when_allowed(published):
    name, tokenizer = published
    library, size = LIBRARY[name], LIBRARY[name].vocab_size()
    assert tokenizer.vocab_size == size + 3
    assert [tokenizer.token_id(text) for text in ("<s>", "<img>", "<IMG_CONTEXT>")] == [1, size, size + 2]
    for text in sample_texts(500):
        text = f"{text}<img>x</s> y<IMG_CONTEXT>"
        plain = tokenizer.encode(text, allow_special=False)
        assert plain == library.encode(text) and max(plain) < size and not {0, 1, 2} & set(plain)
        assert tokenizer.decode(plain) == library.decode(plain)
    # Each text between special tokens is tokenised by itself, as the published class does.
    expected = [1, *library.encode("a b"), size, *library.encode(" c "), 2, 2, *library.encode("d")]
    assert tokenizer.encode("<s>a b<img> c </s></s>d") == expected
    assert tokenizer.decode(expected, skip_special=False) == "<s>a b<img> c </s></s>d"
    assert tokenizer.decode([1, *library.encode("a b"), 2]) == "a b"


def test_spare_pieces_take_their_new_names(published):
    name, tokenizer = published
    if name == "internlm2":
        start, end = (LIBRARY[name].piece_to_id(spare) for spare in (SPARE[3], SPARE[2]))
        assert tokenizer.encode("<|im_start|>what<|im_end|>") == [start, *LIBRARY[name].encode("what"), end]
        assert start not in tokenizer.encode(SPARE[3], allow_special=False)  # its old name is a text like any other
        assert start not in tokenizer.encode(SPARE[3])
        assert tokenizer.encode(SPARE[0]) == [LIBRARY[name].piece_to_id(SPARE[0])]


def test_transformers_reads_what_is_saved(published, tmp_path):
    _, tokenizer = published
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    direct = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 2, 0)
    for text in ["", *sample_texts(300), "<s>a b<img> c </s></s>d <IMG_CONTEXT>"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.encode(text, allow_special=False) == tokenizer.encode(text, allow_special=False)
        assert theirs.encode(text, add_special_tokens=False) == direct.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [1, *ids]  # add_bos_token is InternLM2's default
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("config, around", [
    ({}, ([1], [])),
    ({"add_bos_token": False}, ([], [])),
    ({"add_eos_token": True, "eos_token": {"content": "</s>", "lstrip": False}}, ([1], [2])),
])  # fmt: skip
def test_what_is_put_around_a_text(tmp_path, config, around):
    Tokenizer.from_folder(write_folder(tmp_path / "in", config=config)).save(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("what") == [*around[0], *LIBRARY["internlm2"].encode("what"), *around[1]]
    assert theirs.eos_token == "</s>"


def test_names_come_from_every_file(tmp_path):
    size = LIBRARY["llama"].vocab_size()
    folder = write_folder(
        tmp_path / "x", "llama", config={}, added_tokens={"<pad>": size}, special_tokens_map={"pad_token": "<pad>"}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_id("<pad>") == size
    tokenizer.save(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == size


def test_long_texts_take_time_in_proportion():
    text = " ".join(training_texts()) * 4

    def seconds(times: int) -> float:
        started = time.perf_counter()
        OURS["internlm2"].encode(text * times, allow_special=False)
        return time.perf_counter() - started

    one, eight = (min(seconds(times) for _ in range(3)) for times in (1, 8))
    assert eight < 44 * one  # measured: 12 to 15 times; a quadratic one takes 64 times as long


# ------------------------------------------------------------------------------------------------ refusals


def edited(name: str, old: bytes, new: bytes) -> bytes:
    assert old in MODELS[name]
    return MODELS[name].replace(old, new)


# Fields 2 and 3 of a model are its trainer's and its normaliser's; a second message is laid over the first.
BAD_MODELS = {
    "truncated": (MODELS["llama"][:-3], "not a sentencepiece model, or a damaged one"),
    "some text": (b"just a text\n" * 4, "not a sentencepiece model"),
    "empty": (b"", "it has no pieces"),
    "a number for a text": (MODELS["llama"] + b"\x0a\x02\x08\x01", "damaged one"),
    "charsmap": (MODELS["llama"] + b"\x1a\x04\x12\x02ab", "character map is damaged"),
    "unigram": (MODELS["llama"] + b"\x12\x02\x18\x01", "of type 'unigram'; only 'bpe' is read"),
    "suffix": (MODELS["llama"] + b"\x12\x03\xc0\x01\x01", "'treat_whitespace_as_suffix'"),
    "unescaped": (MODELS["llama"] + b"\x1a\x02\x28\x00", "'escape_whitespaces: false'"),
    "denormaliser": (MODELS["llama"] + b"\x2a\x04\x12\x02ab", "rules for denormalising"),
    "no bytes": (train(byte_fallback=False), "no byte fallback"),
    "one byte less": (edited("llama", b"<0xFE>", b"<0xXX>"), r"no piece <0xFE>"),
    "no unknown": (MODELS["llama"] + b"\x12\x0c\xc0\x02" + b"\xff" * 9 + b"\x01", "unk_id"),
    "twice": (edited("internlm2", SPARE[1].encode(), SPARE[2].encode()), r"are both called '\[UNUSED_TOKEN_2\]'"),
    "unused": (MODELS["llama"] + b"\x0a\x0b\x0a\x02xq\x15\0\0\0\0\x18\x05", "the unused piece 'xq' lies on the way"),
    "spaces": (train(user_defined_symbols=["▁▁▁"], add_dummy_prefix=True), "user-defined symbol 3 '▁▁▁' with spaces"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(tmp_path, name):
    data, reason = BAD_MODELS[name]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=reason) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "tokenizer.model")) and "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_one_clear_error(data):
    at = data.draw(st.integers(0, len(MODELS["llama"]) - 1))
    damaged = bytearray(MODELS["llama"])
    damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for content in (bytes(damaged), bytes(damaged[:cut])):
        try:
            to_fast(parse(content, "x"), {}, "x")
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("files, reason", [
    ({"config": {"added_tokens_decoder": []}}, "tokenizer_config.json: 'added_tokens_decoder' must be"),
    ({"config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "'added_tokens_decoder': 'x' must be a number"),
    ({"config": {"added_tokens_decoder": {"700": {}}}}, "'700' must be a number and have a 'content'"),
    ({"config": {"added_tokens_decoder": {"700": {"content": "<a>"}}}}, "'<a>' has the id 700, the next one"),
    ({"config": {"added_tokens_decoder": {"560": {"content": "</s>"}}}}, "the ids 560 and 2 are both called '</s>'"),
    ({"config": {"added_tokens_decoder": {"559": {"content": "龘", "special": True}}}}, "is a single character '龘'"),
    ({"added_tokens": {"<a>": "560"}}, "added_tokens.json: '<a>' must have an id, got '560'"),
    ({"added_tokens": {"<a>": 560}}, "the id 560 is '<a>' here and '<img>' in tokenizer_config.json"),
])  # fmt: skip
def test_bad_added_tokens(tmp_path, files, reason):
    with pytest.raises(UserError, match=reason):
        Tokenizer.from_folder(write_folder(tmp_path / "x", **files))


def test_pieces_of_unknown_characters_are_named(caplog):
    """Sentencepiece joins two characters that are no pieces; here they stay bytes, and that is said."""
    data = MODELS["llama"] + b"\x0a\x0d\x0a\x06\xe9\xbe\x98\xe9\xbe\x99\x15" + bytes(4)  # the piece 龘龙, score 0
    fast = to_fast(parse(data, "x"), {}, "x")
    assert "1 pieces hold characters that are no pieces and are never used ('龘龙')" in caplog.text
    assert fast.decode(fast.encode("龘龙", add_special_tokens=False).ids) == "龘龙"
