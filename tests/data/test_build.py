"""Building the data: the same for any number of processes, whole or not there, and never passed off as another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmmamba.data import build as module
from mmmamba.data.build import build
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import Processor
from mmmamba.data.sources.primer import ABILITIES, GROUPS, dataset
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.model import ModelConfig, StackConfig, VisionConfig

FILES = [*(f"train-{group}.jsonl" for group in GROUPS), "validation.jsonl", "test.jsonl"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primer of a few records, in tasks of fewer."""
    monkeypatch.setattr(dataset, "TRAIN_RECORDS", 100)
    monkeypatch.setattr(dataset, "VALIDATION_RECORDS", 2)
    monkeypatch.setattr(dataset, "TEST_RECORDS", 4)
    monkeypatch.setattr(dataset, "CHUNK", 7)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def definition() -> str:
    return dataset.train_tokenizer()


@pytest.fixture
def quick(definition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tokenizer for all tests that work in this process."""
    monkeypatch.setattr(dataset, "train_tokenizer", lambda: definition)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    one = tree(build(out=tmp_path / "one", source=("primer",), workers=1))
    two = tree(build(out=tmp_path / "two", source=("primer",), workers=2))
    assert one == two
    assert one != tree(build(out=tmp_path / "other", source=("primer",), workers=1, seed=1))


def test_layout_and_manifest(tmp_path, quick):
    root = build(out=tmp_path, source=("primer",), workers=1)
    primer = root / "primer"
    assert sorted(path.name for path in primer.iterdir()) == sorted([*FILES, "images", "source.json"])
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", "primer"]
    manifest = json.loads((root / "manifest.json").read_text())["sources"]["primer"]
    assert manifest["settings"]["seed"] == 0
    assert manifest["settings"]["scale"] == 1.0
    assert {"mmmamba", "pillow", "matplotlib"} <= set(manifest["versions"])
    assert manifest["records"] == {name: len(JsonlDataset(primer / name)) for name in FILES}
    assert sum(manifest["records"][name] for name in FILES if name.startswith("train")) == 100


def test_records_can_be_read_and_used(tmp_path, quick):
    primer = build(out=tmp_path, source=("primer",), workers=1) / "primer"
    ids: Counter[str] = Counter()
    used: set[Path] = set()
    for name in FILES:
        dataset = JsonlDataset(primer / name)
        for i in range(len(dataset)):
            sample = dataset[i]
            ids[sample.id] += 1
            text = "".join(turn.text for turn in sample.turns)
            assert text.count("<image>") == len(sample.images) == sample.turns[0].text.count("<image>")
            for path in map(Path, sample.images):
                with Image.open(path) as image:
                    assert image.mode == "RGB" and image.height == 64 and image.width in (64, 128, 192, 256)
                used.add(path)
            assert sample.extra["ability"] == (name[6:-6] if name.startswith("train") else sample.extra["ability"])
            assert ("chance" in sample.extra) == (not name.startswith("train"))
    assert max(ids.values()) == 1
    assert used == set((primer / "images").rglob("*.png"))


def test_recall_files_keep_to_their_lengths_as_a_model_is_given_them(tmp_path, definition, quick):
    primer = build(out=tmp_path, source=("primer",), workers=1) / "primer"
    stack = StackConfig(num_layers=1, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=8)
    config = ModelConfig(
        hidden_size=8,
        vocab_size=640,
        embedding=stack,
        decoder=stack,
        vision=VisionConfig(image_size=64, patch_size=8),
        layer_map=(),
        img_context_token_id=7,
        system_message="",
    )
    processor = Processor(Tokenizer(definition), config)
    for ability, (shortest, longest) in {"1x": (120, 192), "4x": (500, 768), "16x": (2000, 3072)}.items():
        dataset = JsonlDataset(primer / f"train-recall-{ability}.jsonl")
        lengths = [len(processor.encode(dataset[i]).input_ids) for i in range(len(dataset))]
        assert shortest <= min(lengths) and max(lengths) <= longest


@pytest.mark.parametrize("name", ["validation.jsonl", "test.jsonl"])
def test_unseen_files_ask_one_question_of_each_ability(tmp_path, quick, name):
    dataset = JsonlDataset(build(out=tmp_path, source=("primer",), workers=1) / "primer" / name)
    samples = [dataset[i] for i in range(len(dataset))]
    assert set(Counter(sample.extra["ability"] for sample in samples).values()) == {len(samples) // len(ABILITIES)}
    assert [sample.extra["ability"] for sample in samples[:: len(samples) // len(ABILITIES)]] == list(ABILITIES)
    assert all([turn.role for turn in sample.turns] == ["human", "gpt"] for sample in samples)


def test_sizes_follow_the_scale_within_bounds(monkeypatch):
    monkeypatch.setattr(dataset, "TRAIN_RECORDS", 20_000)
    monkeypatch.setattr(dataset, "VALIDATION_RECORDS", 50)
    monkeypatch.setattr(dataset, "TEST_RECORDS", 200)
    for scale, train, validation, test in ((0.01, 200, 50, 200), (1, 20_000, 50, 200), (25, 500_000, 125, 500)):
        parts = dataset.plan(scale)
        assert sum(part.count for part in parts if part.split == "train") == train
        sizes = {(part.split, part.group): part.count for part in parts if part.split != "train"}
        assert sizes["validation", "read"] == validation
        assert sizes["test", "read"] == test
        assert sizes["test", "recall-16x"] == 200
    assert [part.group for part in dataset.plan(1, {"read": 1, "text": 3, "scene": 0})[:3]] == ["read", "text", "read"]


def test_folders_of_pictures_stay_small(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(dataset, "IMAGES_PER_FOLDER", 40)
    primer = build(out=tmp_path, source=("primer",), workers=1) / "primer"
    sizes = Counter(path.parent for path in primer.rglob("*.png"))
    assert 20 < max(sizes.values()) <= 40


def test_mixture_chooses_the_training_files(tmp_path, quick):
    primer = build(out=tmp_path, source=("primer",), workers=1, mixture={"text": 1, "read": 3}) / "primer"
    assert sorted(path.name for path in primer.glob("train-*")) == ["train-read.jsonl", "train-text.jsonl"]
    assert len(JsonlDataset(primer / "train-read.jsonl")) == 75


def test_a_finished_source_is_kept(tmp_path, quick, monkeypatch):
    root = build(out=tmp_path, source=("primer",), workers=1)
    before = tree(root)
    monkeypatch.setattr(dataset, "write", lambda *_, **__: pytest.fail("built again"))
    build(out=tmp_path, source=("primer",), workers=1)
    (root / "manifest.json").unlink()  # killed between the source and the manifest
    build(out=tmp_path, source=("primer",), workers=1)
    assert tree(root) == before


def test_a_half_built_source_is_built_again(tmp_path, quick):
    half = tmp_path / "half" / ".primer.partial" / "images"
    half.mkdir(parents=True)
    (half / "leftover.png").write_bytes(b"half")
    whole = build(out=tmp_path / "whole", source=("primer",), workers=1)
    assert tree(build(out=tmp_path / "half", source=("primer",), workers=1)) == tree(whole)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks")
def test_killed_build_leaves_no_worker_and_the_next_one_is_whole(tmp_path, quick):
    script = "import sys; from mmmamba.data.build import build; build(out=sys.argv[1], source=('primer',), workers=2)"
    killed = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "data")])
    pieces = tmp_path / "data" / ".primer.partial" / "parts"
    wait_until(lambda: pieces.is_dir() and len(list(pieces.iterdir())) > 2)
    killed.kill()
    killed.wait()
    wait_until(lambda: nobody_builds_in(tmp_path / "data"))
    assert not (tmp_path / "data" / "primer").exists()
    assert tree(build(out=tmp_path / "data", source=("primer",), workers=1)) == tree(
        build(out=tmp_path / "whole", source=("primer",), workers=1)
    )


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def nobody_builds_in(root: Path) -> bool:
    """Whether the folder's lock is free: a process that was forked from the killed one would still hold it."""
    import fcntl

    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def test_a_failure_leaves_nothing_and_names_the_file(tmp_path, quick, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "3.png"))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"3\.png: No space left on device"):
        build(out=tmp_path / "data", source=("primer",), workers=1)
    assert not (tmp_path / "data").exists()


def test_another_scale_or_seed_is_refused_by_name(tmp_path, quick):
    build(out=tmp_path, source=("primer",), workers=1, scale=0.5)
    with pytest.raises(UserError, match=r"primer: was made with scale 0\.5, not 1\.0\. Remove that folder or"):
        build(out=tmp_path, source=("primer",), workers=1)
    with pytest.raises(UserError, match="was made with seed 0, not 3"):
        build(out=tmp_path, source=("primer",), workers=1, scale=0.5, seed=3)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "primer").mkdir()
    (tmp_path / "primer" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not made by mmmamba data build"):
        build(out=tmp_path, source=("primer",), workers=1)
    assert (tmp_path / "primer" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ("premier",)}, "source: no 'premier' .did you mean 'primer'?"),
        ({"source": ()}, "source: name at least one"),
        ({"source": "primer"}, "source: must be a list of names"),
        ({"scale": 0}, "scale: must be above 0"),
        ({"scale": float("nan")}, "scale: must be above 0"),
        ({"scale": 1e308}, "scale: must be above 0 and at most 1000"),
        ({"workers": 0}, "workers: must be from 1 to 128, got 0"),
        ({"workers": 10**6}, "workers: must be from 1 to 128"),
        ({"mixture": {"red": 1}}, "mixture: no 'red' .did you mean 'read'?"),
        ({"mixture": {"read": -1}}, "mixture: the weight of read must be 0 or above"),
        ({"mixture": {"read": 0}}, "mixture: at least one weight"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(out=tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_out_that_is_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="data: is a file; --out takes a folder"):
        build(out=tmp_path / "data", source=("primer",), workers=1)


def test_lengths_can_be_measured_with_a_given_tokenizer(tmp_path, definition, monkeypatch):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(definition)
    monkeypatch.setattr(dataset, "train_tokenizer", lambda: pytest.fail("trained although one was given"))
    root = build(out=tmp_path / "data", source=("primer",), workers=1, tokenizer=folder)
    assert json.loads((root / "manifest.json").read_text())["sources"]["primer"]["settings"]["tokenizer"]


def test_both_sources_side_by_side(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(module.easyvqa, "write", lambda folder, seed: {"train.jsonl": seed})
    root = build(out=tmp_path, workers=1)
    assert set(json.loads((root / "manifest.json").read_text())["sources"]) == {"easy-vqa", "primer"}
