"""The cache gives what encoding each time gives, and is never found half made."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmmamba.data import encoded_cache as cache_module
from mmmamba.data import encoded_cache_writing as writing
from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.encoded_cache import EncodedCache
from mmmamba.data.encoded_source import EncodedSource, fingerprint
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.loader import Loader
from mmmamba.data.processor import Processor
from mmmamba.data.sample import BadSample
from mmmamba.data.sample_order import Order
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig, VisionConfig
from mmmamba.model.stack import StackConfig

TOKENIZER = Tokenizer.from_bpe(train_bpe(["What is it? A cat."] * 4, 270))
STACK = StackConfig(num_layers=1, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=4)
CONFIG = ModelConfig(
    hidden_size=4, vocab_size=270, embedding=STACK, decoder=STACK, system_message="", max_dynamic_patch=4,
    vision=VisionConfig(image_size=16, patch_size=4),
)  # fmt: skip
PROCESSOR = Processor(TOKENIZER, CONFIG)
ROWS = 23


def write(folder: Path, bad: tuple[int, ...] = (), images: bool = True) -> JsonlDataset:
    folder.mkdir(exist_ok=True)
    for width in (16, 32):
        Image.effect_noise((width, 16), 50).save(folder / f"{width}.png")
    lines = []
    for i in range(ROWS):
        turns = [{"from": "human", "value": f"What is it? {i}"}, {"from": "gpt", "value": "A cat. " * (i % 5 + 1)}]
        record = {"id": f"é{i}", "conversations": turns}
        if images and i % 3:
            record["image"] = f"{16 * (i % 3)}.png"
        if i in bad:
            record["image"] = "none.png"
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return JsonlDataset(folder / "data.jsonl")


def assert_same(a, b) -> None:
    for name in ("input_ids", "labels", "tiles"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert (a.id, a.where, a.cut) == (b.id, b.where, b.cut)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(writing, "_CHUNK_ROWS", 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("images", [True, False])
def test_same_as_encoding_each_time(tmp_path, small_chunks, workers, images):
    data = write(tmp_path / "data", images=images)
    source = EncodedSource(data, PROCESSOR, max_length=60)
    cache = EncodedCache(data, PROCESSOR, tmp_path / "cache", workers=workers, max_length=60)
    assert len(cache) == len(source) == ROWS and cache.bad_samples == []
    for i in range(ROWS):
        assert_same(cache.encode(i), source.encode(i))
    assert cache.lengths.tolist() == [len(source.encode(i).input_ids) for i in range(ROWS)]
    assert images is False or any(source.encode(i).cut for i in range(ROWS))
    assert_same(pickle.loads(pickle.dumps(cache)).encode(5), source.encode(5))


def test_arrays_are_mapped_npy_files(tmp_path):
    cache = EncodedCache(write(tmp_path / "data"), PROCESSOR, tmp_path / "cache")
    tokens = np.load(cache.path / "tokens.npy")
    assert tokens.dtype == np.int32 and len(tokens) == cache.lengths.sum()
    assert np.load(cache.path / "tiles.npy").shape[1:] == (16, 16, 3)
    assert not cache.encode(0).input_ids.flags.writeable and isinstance(cache._tokens.base, np.memmap)


def test_found_again_and_keyed_by_everything(tmp_path, monkeypatch):
    data = write(tmp_path / "data")
    first = EncodedCache(data, PROCESSOR, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "write_cache", lambda *args: pytest.fail("made again"))
        assert EncodedCache(data, PROCESSOR, tmp_path / "cache").path == first.path
    other_text = Processor(TOKENIZER, replace(CONFIG, system_message="Hi"))
    other_tiles = Processor(TOKENIZER, replace(CONFIG, max_dynamic_patch=1))
    other_words = Processor(train_bpe(["dogs"] * 4, 266), CONFIG)
    marks = {fingerprint(EncodedSource(data, processor)) for processor in (other_text, other_tiles, other_words)}
    marks |= {fingerprint(EncodedSource(data, PROCESSOR, max_length=9)), fingerprint(EncodedSource(data, PROCESSOR))}
    with open(data.path, "a") as file:
        file.write("\n")
    marks.add(fingerprint(EncodedSource(data, PROCESSOR)))
    assert len(marks) == 6
    same = Processor(TOKENIZER, replace(CONFIG, hidden_size=8, mixer=replace(CONFIG.mixer, rope=True)))
    assert fingerprint(EncodedSource(data, same)) in marks


def test_stop_raises_the_first_bad_sample_and_leaves_nothing(tmp_path, small_chunks):
    data = write(tmp_path / "data", bad=(9, 15))
    for workers in (0, 2):
        with pytest.raises(BadSample, match=r"data\.jsonl:10: 'image': no such file"):
            EncodedCache(data, PROCESSOR, tmp_path / "cache", workers=workers)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_lists_bad_samples(tmp_path, small_chunks, workers):
    data = write(tmp_path / "data", bad=(9, 15))
    cache = EncodedCache(data, PROCESSOR, tmp_path / "cache", workers=workers, on_bad_sample="skip")
    assert [message.partition(": ")[0] for message in cache.bad_samples] == [f"{data.path}:{n}" for n in (10, 16)]
    source = EncodedSource(data, PROCESSOR)
    for i in range(ROWS):
        if i in (9, 15):
            with pytest.raises(BadSample, match=f"data.jsonl:{i + 1}: 'image': no such file"):
                cache.encode(i)
        else:
            assert_same(cache.encode(i), source.encode(i))
    loader = Loader(cache, Order(ROWS, batch_size=ROWS), end_step=1, on_bad_sample="skip")
    assert sum(batch.sequences for step in loader for batch in step) == ROWS - 2
    assert len(loader.bad_samples) == 2
    with pytest.raises(BadSample, match=r"data\.jsonl:10: "):  # found on disk, and still refused
        EncodedCache(data, PROCESSOR, tmp_path / "cache")


def test_all_bad(tmp_path):
    data = write(tmp_path / "data", bad=tuple(range(ROWS)))
    cache = EncodedCache(data, PROCESSOR, tmp_path / "cache", on_bad_sample="skip")
    assert len(cache) == len(cache.bad_samples) == ROWS


def test_empty_data(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    assert len(EncodedCache(JsonlDataset(tmp_path / "data.jsonl"), PROCESSOR, tmp_path / "cache", workers=2)) == 0


@pytest.mark.parametrize("damage", ["cut", "lost", "no meta", "partial"])
def test_half_written_is_made_again(tmp_path, damage):
    data = write(tmp_path / "data")
    cache = EncodedCache(data, PROCESSOR, tmp_path / "cache")
    expected = cache.encode(4).input_ids.tolist()
    if damage == "cut":
        os.truncate(cache.path / "tokens.npy", 200)
    elif damage == "lost":
        (cache.path / "tiles.npy").unlink()
    elif damage == "no meta":
        (cache.path / "meta.json").unlink()
    else:
        cache.path.rename(cache.path.with_name(f"{cache.path.name}.partial"))
    again = EncodedCache(data, PROCESSOR, tmp_path / "cache")
    assert again.encode(4).input_ids.tolist() == expected
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the cache and its lock


def test_failing_disk(tmp_path, monkeypatch):
    data = write(tmp_path / "data")

    def full(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing._Growing, "append", full)
    with pytest.raises(UserError, match=r"cannot write the cache: .*No space left"):
        EncodedCache(data, PROCESSOR, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(UserError, match="cannot write the cache"):
        EncodedCache(data, PROCESSOR, data.path)  # a file where the folder should be


def _build_and_report(folder: Path, queue) -> None:
    built = []
    original = cache_module.write_cache
    cache_module.write_cache = lambda *args: (built.append(1), original(*args))
    cache = EncodedCache(JsonlDataset(folder / "data" / "data.jsonl"), PROCESSOR, folder / "cache")
    queue.put((len(built), len(cache)))


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_processes_make_one_cache(tmp_path):
    write(tmp_path / "data")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_build_and_report, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(queue.get() for _ in processes) == [(0, ROWS), (1, ROWS)]


def test_what_was_altered_is_said_and_made_again(tmp_path, capsys):
    data = write(tmp_path / "data", images=False)
    source = EncodedSource(data, PROCESSOR)
    made = EncodedCache(data, PROCESSOR, tmp_path / "cache")
    kept = {file.name: file.read_bytes() for file in made.path.iterdir()}
    random = np.random.default_rng(0)
    for name in ("tokens.npy", "labels.npy", "ids.npy", "token_counts.npy", "cut.npy", "meta.json"):
        for cut in (False, False, False, True):
            content = bytearray(kept[name])
            at = int(random.integers(len(content)))
            if cut:
                del content[at:]
            else:
                content[at] ^= 1 << int(random.integers(8))
            (made.path / name).write_bytes(content)
            again = EncodedCache(data, PROCESSOR, tmp_path / "cache")
            said = capsys.readouterr().err
            assert "the cache was altered or damaged and is made again" in said and said.count("again") == 1, name
            assert {file.name: file.read_bytes() for file in again.path.iterdir()} == kept
            assert_same(again.encode(3), source.encode(3))
    EncodedCache(data, PROCESSOR, tmp_path / "cache")
    assert capsys.readouterr().err == ""
    meta = {key: value for key, value in json.loads(kept["meta.json"]).items() if key != "sha256"}
    (made.path / "meta.json").write_text(json.dumps(meta))  # of an earlier version
    EncodedCache(data, PROCESSOR, tmp_path / "cache")
    assert capsys.readouterr().err == ""
