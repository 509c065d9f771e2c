"""``mmmamba inspect``: what it says is what the model has, and nothing but headers is read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmmamba import cli, inspection
from mmmamba.checkpoints import load, save_hovle, save_release, save_student
from mmmamba.checkpoints.io import Weights
from mmmamba.data.patches import patch_rows
from mmmamba.distill.seeding import seed
from mmmamba.errors import UserError
from mmmamba.inspection import LONG, describe
from mmmamba.model import (
    ATTENTION,
    MAMBA2,
    Mamba2Options,
    Model,
    ModelConfig,
    RopeScaling,
    State,
    VisionConfig,
    initialise,
)
from mmmamba.model.mixers.kv_cache import KVState
from tiny import make_config

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)


@pytest.fixture(scope="module")
def folders(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny folder of every layout that we write."""
    room = tmp_path_factory.mktemp("folders")
    teacher = load(teacher_folder)
    hybrid = seed(teacher, HYBRID, Mamba2Options(rope=True, conv_kernel=4))
    published = seed(teacher, HYBRID, Mamba2Options())
    save_release(published, None, room / "release")
    save_release(published, None, room / "separate", fused=False, dtype=torch.float32)
    for name, delta in (("whole", False), ("delta", True)):
        save_student(hybrid, room / name, teacher=teacher_folder, delta=delta)
    return {"hovle": teacher_folder, **{path.name: path for path in room.iterdir()}}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor may be read, no file hashed."""

    def refuse(*args: Any) -> None:
        raise AssertionError("read more than headers")

    monkeypatch.setattr(Weights, "__getitem__", refuse)
    monkeypatch.setattr("mmmamba.checkpoints.model_source.fingerprint", refuse)


def state_bytes(state: State) -> tuple[int, int]:
    """(bytes of recurrent states, of caches) as they are held, the table of filled slots apart."""
    cached = sum(s.k.nbytes + s.v.nbytes for s in state.layers if isinstance(s, KVState))
    filled = sum(s.filled.nbytes for s in state.layers if isinstance(s, KVState))
    return state.nbytes - cached - filled - state.positions.nbytes, cached


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", ["hovle", "release", "separate", "whole", "delta"])
def test_every_layout_is_described_without_reading_it(name: str, folders: dict[str, Path], unread: None) -> None:
    found = describe(folders[name])
    expected = {"hovle": "hovle", "whole": "mmmamba", "delta": "mmmamba (delta)"}.get(name, "mmmamba-release")
    assert found["layout"] == expected and found["folder"] == str(folders[name])
    assert found["layer_map"] == list(HYBRID if name != "hovle" else (ATTENTION,) * 5)
    assert found["stored"]["bytes"] == sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))
    own = sum(found["stored"]["dtypes"].values())
    assert 0.8 * found["stored"]["bytes"] < own < found["stored"]["bytes"]
    assert next(iter(found["stored"]["dtypes"])) == ("bfloat16" if name == "release" else "float32")
    assert found["stacks"]["decoder"]["rms_norm_eps"] == 1e-6 and found["stacks"]["embedding"]["num_layers"] == 2
    assert (found["teacher"] is None) == (name in ("hovle", "release", "separate"))
    options = {"rope": {"here": True, "published": False}, "conv_kernel": {"here": 4, "published": 2}}
    assert found["mixer"] == (options if name in ("whole", "delta") else {})
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["hovle", "release", "whole"])
def test_parameters_are_the_model_s(name: str, folders: dict[str, Path]) -> None:
    counts, model = describe(folders[name])["parameters"], load(folders[name])
    assert (
        counts["total"]
        == sum(p.numel() for p in model.parameters())
        == sum(count for kind, count in counts.items() if kind != "total")
    )
    for kind in (ATTENTION, MAMBA2):
        layers = [i for i, here in enumerate(model.config.layer_map) if here == kind]
        assert counts[kind] == sum(p.numel() for i in layers for p in model.mixer(i).parameters())
    assert counts["mlp"] == sum(p.numel() for layer in model.layers for p in layer.mlp.parameters())
    assert counts["norms"] == (2 * 5 + 1) * 64
    assert counts["head"] == counts["embeddings"] == 320 * 64
    assert counts["vision"] == sum(p.numel() for p in model.vision.parameters())


def test_a_tied_head_is_counted_once() -> None:
    config = make_config(tie_word_embeddings=True, vision=None)
    counts = inspection._parameters(config, "x")
    assert counts["head"] == counts["vision"] == 0
    assert sum(counts.values()) == sum(p.numel() for p in Model(config).parameters())


@settings(max_examples=12, deadline=None)
@given(
    layer_map=st.lists(st.sampled_from([ATTENTION, MAMBA2]), min_size=5, max_size=5),
    kernel=st.integers(2, 4),
    groups=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 9),
)
def test_memory_is_what_a_state_holds(layer_map: list[str], kernel: int, groups: int, length: int) -> None:
    config = make_config(tuple(layer_map), Mamba2Options(conv_kernel=kernel))
    config = replace(config, decoder=replace(config.decoder, num_kv_heads=groups))
    model = initialise(Model(config)).to(torch.bfloat16)
    with torch.no_grad():
        state = model(torch.arange(10, 10 + length)[None], return_state=True).state
    found = inspection._state(config)
    assert (found["recurrent"], found["cache_per_token"] * length) == state_bytes(state)
    assert found["at_tokens"] == found["recurrent"] + LONG * found["cache_per_token"]


def test_the_published_geometry() -> None:
    """2.6 B parameters; a softmax layer's cache and a Mamba-2 layer's state in numbers worked out by hand."""
    stack = replace(
        make_config().embedding, num_layers=8, intermediate_size=8192, num_heads=16, num_kv_heads=8, head_dim=128
    )
    config = make_config()
    config = ModelConfig(
        hidden_size=2048,
        vocab_size=92_553,
        embedding=replace(stack, num_layers=8),
        decoder=replace(stack, num_layers=24),
        vision=replace(config.vision, image_size=448),
    )
    counts = inspection._parameters(config, "x")
    assert sum(counts.values()) == pytest.approx(2.603e9 - 0.19e9, rel=0.02)  # no second, unused embedding table
    softmax = inspection._state(config)
    assert softmax == {"recurrent": 0, "cache_per_token": 131_072, "at_tokens": 131_072 * LONG}
    linear = inspection._state(replace(config, layer_map=(MAMBA2,) * 32))
    assert linear["at_tokens"] == linear["recurrent"] == 32 * (16 * 128 * 128 * 4 + 4096 * 2)
    sizes = {
        (p["width"], p["height"]): (p["columns"], p["rows"], p["tokens"]) for p in inspection._pictures(config, ())
    }
    assert sizes == {(448, 448): (1, 1, 256), (1920, 1080): (4, 2, 9 * 256), (768, 1024): (3, 4, 13 * 256)}


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("width", "height"), [(56, 56), (200, 50), (33, 177), (640, 480)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_pictures_take_the_tokens_of_their_prompt(
    width: int, height: int, dynamic: bool, tiny_processor: Any, tmp_path: Path
) -> None:
    from mmmamba.data.processor import Processor
    from mmmamba.data.sample import Turn

    config = replace(tiny_processor.config, dynamic_image_size=dynamic)
    processor = Processor(tiny_processor.tokenizer, config)
    path = tmp_path / "a.png"
    Image.new("RGB", (width, height)).save(path)
    (found,) = inspection._pictures(config, [path])
    prompt = processor.prompt([Turn("human", "<image>")], [path])
    assert found["tokens"] == int((prompt.input_ids == config.img_context_token_id).sum())
    assert found["tiles"] == len(prompt.tiles)
    assert (found["picture"], found["width"], found["height"]) == (str(path), width, height)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_rows_of_patches_are_counted_one_by_one(width: int, height: int) -> None:
    rows = VisionConfig(image_size=8, patch_size=8, max_side=64, pixel_shuffle_loc="none", use_pixel_shuffle_proj=False)
    picture = Image.new("RGB", (width, height))
    with tempfile.TemporaryDirectory() as folder:
        picture.save(Path(folder) / "a.png")
        (found,) = inspection._pictures(make_config(vision=rows), [Path(folder) / "a.png"])
    shape = patch_rows(picture, 8, 64).shape
    assert (found["rows"], found["columns"]) == shape[:2]
    assert found["tiles"] == found["tokens"] == shape[0] * shape[1]


def test_a_picture_is_measured_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (120, 40)).save(path, exif=exif)
    (found,) = inspection._pictures(make_config(), [path])
    assert (found["width"], found["height"]) == (40, 120)


# ---------------------------------------------------------------------------------------------- the verb


def test_tables_show_it_all(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folders["delta"])]) == 0
    shown = capsys.readouterr().out
    said = "mmmamba (delta)|Stacks|0, 3|1–2, 4|mamba2|at 103,424 tokens|all softmax|1920 × 1080|conv_kernel|KiB"
    assert all(words in shown for words in said.split("|"))
    assert cli.main(["inspect", str(folders["release"])]) == 0
    shown = capsys.readouterr().out
    assert "as published" in shown and "Mixer options" not in shown


def test_json_is_the_same(folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (112, 56)).save(tmp_path / "a.png")
    argv = ["inspect", str(folders["hovle"]), "--json", "--image", str(tmp_path / "a.png")]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == describe(folders["hovle"], [tmp_path / "a.png"]) | {"model": str(folders["hovle"])}
    assert [p["tiles"] for p in found["pictures"]] == [3]


def test_scalings_and_biases_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    stack = replace(
        config.decoder, rope_scaling=RopeScaling(type="dynamic", factor=2.0), rope_theta=1e6, qkv_bias=True, o_bias=True
    )
    save_hovle(initialise(Model(replace(config, decoder=stack))), None, tmp_path / "m")
    assert describe(tmp_path / "m")["stacks"]["decoder"]["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    assert cli.main(["inspect", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("dynamic × 2", "1,000,000", "qkv, o"))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(break_config, "not JSON"), (break_weights, "truncated"), (lose_weights, "no weights")],
)
@pytest.mark.parametrize("name", ["hovle", "delta"])
def test_a_broken_folder_gives_one_line(
    name: str, spoil: Callable[[Path], None], message: str, folders: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(folders[name], tmp_path / "m")
    spoil(tmp_path / "m")
    assert cli.main(["inspect", str(tmp_path / "m")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_what_cannot_be_shown_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a built-in model"):
        describe(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no such file: .*none\.png"):
        describe(folders["hovle"], [tmp_path / "none.png"])
    text = initialise(Model(make_config(vision=None, layer_map=(MAMBA2,) * 5)))
    save_student(text, tmp_path / "text", teacher=folders["hovle"], delta=False)
    assert describe(tmp_path / "text")["pictures"] == []
    with pytest.raises(UserError, match="reads text only"):
        describe(tmp_path / "text", ["a.png"])
