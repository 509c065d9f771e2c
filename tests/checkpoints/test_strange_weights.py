"""Weight files that are not what a config promises, in every layout and format: one line that names it."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmmamba.checkpoints import load, open_source, save_hovle, save_release, save_student
from mmmamba.checkpoints.io import cast, write_json, write_safetensors
from mmmamba.checkpoints.layouts import LLAMA, SOLO, by_part, write_part
from mmmamba.checkpoints.llama import config_from_llama
from mmmamba.checkpoints.solo import config_from_solo
from mmmamba.convert import convert
from mmmamba.distill.seeding import seed
from mmmamba.errors import UserError
from mmmamba.model import MAMBA2, Model, initialise
from tiny import make_config

LLAMA_JSON = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SOLO_JSON = {
    **LLAMA_JSON, "model_type": "mistral", "architectures": ["SoloForCausalLM"], "vocab_size": 32010,
    "sliding_window": None, "vision_patch_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each layout. Tests must leave them as they are."""
    root = tmp_path_factory.mktemp("layouts")
    teacher = initialise(Model(make_config()), 0)
    student = seed(teacher, (MAMBA2,) * 5, make_config().mixer)
    found = {"hovle": save_hovle(teacher, None, root / "hovle", dtype=torch.float32)}
    found["release"] = save_release(student, None, root / "release", dtype=torch.float32)
    found["mmmamba"] = save_student(student, root / "student", teacher=found["hovle"], delta=False)
    found["delta"] = save_student(student, root / "delta", teacher=found["hovle"], delta=True)
    for name, data, layout in (("llama", LLAMA_JSON, LLAMA), ("solo", SOLO_JSON, SOLO)):
        config = (config_from_llama if layout is LLAMA else config_from_solo)(data, "config.json")
        stored: dict[str, Tensor] = {}
        for part, ours in by_part(initialise(Model(config), 0).state_dict(), config).items():
            stored |= write_part(layout, ours, config, part)
        (root / name).mkdir()
        write_json(root / name / "config.json", data)
        write_safetensors(root / name / "model.safetensors", {n: t.detach() for n, t in stored.items()})
        found[name] = root / name
    return found


def as_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    write_safetensors(folder / "model.safetensors", tensors)


def as_pickle(folder: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def as_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        write_safetensors(folder / file, {name: tensors[name] for name in own})
    table = {name: file for file, own in parts.items() for name in own}
    write_json(folder / "model.safetensors.index.json", {"weight_map": table})


FORMATS = {"safetensors": as_safetensors, "bin": as_pickle, "shards": as_shards}
NAME = {"llama": "model.layers.1.mlp.up_proj.weight", "solo": "model.layers.1.mlp.up_proj.weight"}
PUBLISHED = "embedding_model.encoder.1.feed_forward.w3.weight"
NAME |= {"hovle": PUBLISHED, "release": PUBLISHED, "mmmamba": "layers.1.mlp.up.weight", "delta": "layers.1.mixer.A_log"}


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor], str], object], str]] = {
    "missing": (lambda t, name: t.pop(name), r"1 missing tensor \({name}\)"),
    "unknown": (
        lambda t, name: t.update({"foreign.weight": torch.ones(3)}),
        r"1 unexpected tensor \(foreign\.weight\)",
    ),
    "shape": (lambda t, name: t.update({name: torch.cat([t[name]] * 2)}), r"of the wrong shape \({name} is"),
    "integers": (lambda t, name: t.update({name: t[name].to(torch.int32)}), r"\({name} is int32\)"),
    "flags": (lambda t, name: t.update({name: t[name] > 0}), r"\({name} is bool\)"),
    "not finite": (lambda t, name: t.update({name: with_nan(t[name])}), r"'{name}' has 1 values that are not finite"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", NAME)
def test_what_is_wrong_with_a_tensor_is_said(layout: str, form: str, change: str, folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((folders[layout] / "config.json").read_text())
    if "teacher" in config:
        config["teacher"]["name"] = str(folders["hovle"])
    write_json(folder / "config.json", config)
    tensors = load_file(folders[layout] / "model.safetensors")
    alter, complaint = CHANGES[change]
    alter(tensors, NAME[layout])
    FORMATS[form](folder, tensors)
    with pytest.raises(UserError, match=complaint.format(name=NAME[layout].replace(".", r"\."))) as refusal:
        load(folder)
    assert str(refusal.value).startswith(str(folder)) and "\n" not in str(refusal.value)
    with pytest.raises(UserError):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", NAME)
def test_the_folders_themselves_are_whole(layout: str, folders) -> None:
    assert len(open_source(folders[layout]).weights) > 5


def test_what_many_files_hold_besides_is_no_mistake(folders, tmp_path: Path, tmp_path_factory) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    write_json(tmp_path / "config.json", LLAMA_JSON)
    as_safetensors(tmp_path, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    load(tmp_path)


# ---------------------------------------------------------------------------------------------- damaged files


def llama_with(folder: Path, content: bytes, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", LLAMA_JSON)
    (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def pickled(folders) -> bytes:
    stream = io.BytesIO()
    torch.save(load_file(folders["llama"] / "model.safetensors"), stream)
    return stream.getvalue()


def test_a_compressed_archive_is_not_unpacked(pickled: bytes, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pickled)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
        new.writestr("archive/data/99", bytes(20_000_000))
    assert len(stream.getvalue()) < 100_000
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .* is compressed"):
        load(llama_with(tmp_path / "m", stream.getvalue()))


@pytest.mark.parametrize("tensor", [
    torch.zeros(1).expand(100_000, 100_000),
    torch.ones(4, 4).to_sparse(),
    torch.empty(10**6, 10**6, device="meta"),
], ids=["expanded", "sparse", "meta"])  # fmt: skip
def test_tensors_that_hold_less_than_they_say(tensor: Tensor, folders, tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    stream = io.BytesIO()
    torch.save({**tensors, "model.norm.weight": tensor}, stream)
    with pytest.raises(UserError, match=r"'model.norm.weight' (claims 10,000,000,000 values|is not a dense tensor)"):
        load(llama_with(tmp_path / "m", stream.getvalue()))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older"])
def test_cut_and_changed_pickles_are_one_line(legacy: bool, pickled: bytes, folders, tmp_path: Path) -> None:
    content = pickled
    if legacy:
        stream = io.BytesIO()
        tensors = load_file(folders["llama"] / "model.safetensors")
        torch.save(tensors, stream, _use_new_zipfile_serialization=False)
        content = stream.getvalue()
    random = torch.Generator().manual_seed(0)
    for i in range(60):
        changed = bytearray(content)
        at = int(torch.randint(4000 if i % 2 else len(content), (), generator=random))
        if i % 3:
            changed[at] ^= 1 << (i % 8)
        else:
            del changed[at:]
        try:
            load(llama_with(tmp_path / "m", bytes(changed)))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, error


@pytest.mark.parametrize("content", [
    b"", b"\0" * 7, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 10**8 + 1) + b" " * 100,
    struct.pack("<Q", 200_000) + b"[" * 200_000,
    struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'[:60],
])  # fmt: skip
def test_headers_of_absurd_size(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(llama_with(tmp_path / "m", content, "model.safetensors"))


def test_an_index_and_its_shards(folders, tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def refused(complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            load(tmp_path)

    write_json(tmp_path / "config.json", LLAMA_JSON)
    as_shards(tmp_path, tensors)
    assert len(open_source(tmp_path).weights) == len(tensors)
    table = json.loads(index.read_text())["weight_map"]
    for name in ("../x.safetensors", "/etc/passwd", "c.safetensors", ""):
        write_json(index, {"weight_map": {**table, "model.norm.weight": name}})
        refused("lists the file '.*', which is not in")
    write_json(index, {"weight_map": {**table, "model.norm.weight": "a.safetensors"}})
    (tmp_path / "b.safetensors").unlink()
    refused("lists the file 'b.safetensors', which is not in")
    write_safetensors(tmp_path / "b.safetensors", tensors)
    write_json(index, {"weight_map": table})
    refused(r"b\.safetensors: tensor '.*' is also in a\.safetensors")
    for wrong in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        write_json(index, wrong)
        refused("must map each tensor to its file")
    index.write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    refused(r"index\.json: the key 'a' appears twice")


# ---------------------------------------------------------------------------------------------- numbers that do not fit


def test_a_value_that_a_narrower_dtype_does_not_hold(folders, tmp_path: Path) -> None:
    teacher = load(folders["hovle"])
    with torch.no_grad():
        teacher.layers[0].mlp.down.weight[0, 0] = 1e5
    big = save_hovle(teacher, None, tmp_path / "big", dtype=torch.float32)
    complaint = r"tensor 'layers\.0\.mlp\.down\.weight' has a value of size 1e\+05, but float16 ends at 6\.55e\+04"
    student = seed(teacher, (MAMBA2,) * 5, make_config().mixer)
    for write in (
        lambda out: convert(str(big), out, dtype="float16"),
        lambda out: convert(str(big), out, dtype="float16", to="hovle"),
        lambda out: save_hovle(teacher, None, out, dtype=torch.float16),
        lambda out: save_release(student, None, out, dtype=torch.float16),
        lambda out: save_student(student, out, teacher=big, delta=False, dtype=torch.float16),
        lambda out: save_student(student, out, teacher=big, delta=True, dtype=torch.float16),
        lambda out: load(big, dtype=torch.float16),
    ):
        with pytest.raises(UserError, match=complaint):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    kept = load(convert(str(big), tmp_path / "out", dtype="bfloat16"))
    assert kept.layers[0].mlp.down.weight.detach().max() > 9e4
    with pytest.raises(UserError, match="bfloat16 ends"):
        cast("x", torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_with_values_that_are_none_is_not_written(value: float, folders, tmp_path: Path) -> None:
    teacher = load(folders["hovle"])
    with torch.no_grad():
        teacher.norm.weight[3] = value
    for write in (
        lambda out: save_hovle(teacher, None, out),
        lambda out: save_student(teacher, out, teacher=folders["hovle"], delta=True),
    ):
        with pytest.raises(
            UserError, match=r"out: not written: tensor '.*norm\.weight' has 1 values that are not finite"
        ):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- too large promises


HUGE = {
    "num_hidden_layers": 10**6, "hidden_size": 10**9, "vocab_size": 10**9, "intermediate_size": 10**9,
    "num_attention_heads": 10**9, "head_dim": 10**9, "max_position_embeddings": 10**30,
}  # fmt: skip


@pytest.mark.parametrize("key", HUGE)
@pytest.mark.parametrize("layout", ["hovle", "llama"])
def test_a_config_that_promises_too_much_is_refused_before_anything_is_built(layout, key, folders, tmp_path) -> None:
    config = json.loads((folders[layout] / "config.json").read_text())
    if layout == "hovle" and key in ("head_dim",):
        pytest.skip("the layout has no such field")
    (config["llm_config"] if layout == "hovle" else config)[key] = HUGE[key]
    write_json(tmp_path / "config.json", config)
    as_safetensors(tmp_path, load_file(folders[layout] / "model.safetensors"))
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path)


def test_a_large_model_that_the_file_does_not_hold(folders, tmp_path: Path) -> None:
    """Within what a model may be: found out from the header, before memory is taken for it."""
    write_json(
        tmp_path / "config.json",
        {**LLAMA_JSON, "hidden_size": 65536, "num_attention_heads": 512, "num_hidden_layers": 99},
    )
    as_safetensors(tmp_path, load_file(folders["llama"] / "model.safetensors"))
    with pytest.raises(UserError, match=r"does not match config\.json: .* missing tensors"):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------- links


def test_links_that_leave_the_folder_are_not_copied(folders, tiny_processor, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"<a>": 300, "password": 301}')
    folder = save_hovle(load(folders["hovle"]), tiny_processor, tmp_path / "model")
    for name in ("added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "preprocessor_config.json"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(UserError, match=rf"{name}: is a link that leads out of the model's folder"):
            convert(str(folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    convert(str(folder), tmp_path / "out")


def test_the_folders_own_code_is_neither_run_nor_asked_for_again(
    folders, tiny_processor, tmp_path, monkeypatch
) -> None:
    folder = save_hovle(load(folders["hovle"]), tiny_processor, tmp_path / "model")
    (folder / "evil.py").write_text('import pathlib\npathlib.Path("CODE_RAN").touch()\n')
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        data = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        auto = {f"Auto{kind}": "evil.Evil" for kind in ("Model", "Config", "Tokenizer", "Processor")}
        write_json(folder / name, {**data, "auto_map": auto})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    out = convert(str(folder), tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    bare = convert(str(folder), tmp_path / "bare")  # without a tokenizer the rest is copied as it is
    assert not list(tmp_path.rglob("CODE_RAN"))
    for file in (*out.glob("*.json"), *bare.glob("*.json")):
        assert "auto_map" not in json.loads(file.read_text())


def test_the_links_of_a_hubs_cache_and_a_folder_of_links_are_read(folders, tiny_processor, tmp_path: Path) -> None:
    source = save_hovle(load(folders["hovle"]), tiny_processor, tmp_path / "model", dtype=torch.float32)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for i, file in enumerate(source.iterdir()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
        (linked / file.name).symlink_to(file)
    for number, folder in enumerate((snapshot, linked)):
        out = convert(str(folder), tmp_path / f"out{number}")
        assert torch.equal(load(out).head.weight, load(source).head.weight)
        assert not any(file.is_symlink() for file in out.iterdir())
