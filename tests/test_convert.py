"""``mmmamba convert``: every layout into every other that can hold it, and the published trainer's files of a stage."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mmmamba.checkpoints.write as writing
from mmmamba.checkpoints import load, read_config, save_hovle, save_release, save_student
from mmmamba.cli import main
from mmmamba.convert import convert
from mmmamba.distill.seeding import seed
from mmmamba.errors import UserError
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, StackConfig, initialise
from small_run import stage_file
from tiny import make_config

LINEAR = (MAMBA2,) * 5
HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
OWN_DECAYS = (".A_log_bias", ".dt_bias")


def equal(a: Model, b: Model) -> None:
    """Same config, same bits."""
    left, right = a.state_dict(), b.state_dict()
    assert a.config == b.config and left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


@pytest.fixture
def teacher(tiny_processor, tmp_path: Path) -> Path:
    model = initialise(Model(make_config()), 0)
    return save_hovle(model, tiny_processor, tmp_path / "teacher", dtype=torch.float32)


def student(teacher: Path, layer_map=LINEAR, **mixer) -> Model:
    """A student whose every new parameter has moved."""
    model = seed(load(teacher), layer_map, Mamba2Options(**mixer))
    with torch.no_grad():
        for layer in model.config.new_layers:
            for parameter in model.mixer(layer).parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
    return model


@st.composite
def configs(draw):
    """Geometries that HoVLE's layout can express."""

    def stack(layers: int, biases: bool) -> StackConfig:
        groups, head_dim = draw(st.sampled_from([1, 2, 4])), hidden // heads
        return StackConfig(
            num_layers=layers, intermediate_size=draw(st.integers(3, 40)), num_heads=heads,
            num_kv_heads=min(groups, heads), head_dim=head_dim, rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
            rope_theta=draw(st.sampled_from([1e4, 1e6])), qkv_bias=biases, o_bias=biases,
        )  # fmt: skip

    heads = draw(st.sampled_from([1, 2, 4]))
    hidden = heads * draw(st.sampled_from([4, 8]))
    layers = draw(st.tuples(st.integers(0, 2), st.integers(1, 2)))
    kinds = draw(st.lists(st.sampled_from([ATTENTION, MAMBA2]), min_size=sum(layers), max_size=sum(layers)))
    biases = draw(st.booleans()) and MAMBA2 not in kinds  # the published mixer has none
    base = make_config()
    return base.__class__(**{
        **{name: getattr(base, name) for name in base.__dataclass_fields__},
        "hidden_size": hidden, "embedding": stack(layers[0], biases), "decoder": stack(layers[1], biases),
        "layer_map": tuple(kinds),
    })  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), limit=st.sampled_from([300, 5000, 1 << 30]))
def test_random_geometries_survive_every_layout(tmp_path_factory, monkeypatch, config, limit: int) -> None:
    """ours → HoVLE or release (fused, separate) → ours, sharded or not: the same bits and nothing lost."""
    monkeypatch.setattr(writing, "SHARD_BYTES", limit)
    place = tmp_path_factory.mktemp("geometry")
    model = initialise(Model(config), 1).eval()
    if config.new_layers:
        start = save_release(model, None, place / "start", dtype=torch.float32)
        middle = [("mmmamba-release", False), ("mmmamba-release", True)]
    else:
        start = save_hovle(model, None, place / "start", dtype=torch.float32)
        middle = [("hovle", False)]
    ours = convert(str(start), place / "ours")
    equal(load(ours), model)
    assert (ours / "model.safetensors.index.json").exists() == (limit < 1 << 30)
    for i, (to, separate) in enumerate(middle):
        there = convert(str(ours), place / f"there{i}", to=to, separate=separate)
        equal(load(convert(str(there), place / f"back{i}")), model)


@pytest.mark.parametrize("layer_map", [LINEAR, HYBRID], ids=["linear", "hybrid"])
def test_a_delta_becomes_whole(teacher: Path, tmp_path: Path, layer_map) -> None:
    model = student(teacher, layer_map, rope=True, conv_activation="none")
    delta = save_student(model, tmp_path / "delta", teacher=teacher, delta=True)
    whole = convert(str(delta), tmp_path / "whole")
    equal(load(whole), load(delta))
    data = json.loads((whole / "config.json").read_text())
    assert data["delta"] is False and data["teacher"]["name"] == json.loads(
        (delta / "config.json").read_text()
    )["teacher"]["name"]  # fmt: skip
    assert (whole / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_dtype_is_kept_or_changed(teacher: Path, tmp_path: Path) -> None:
    released = save_release(student(teacher), None, tmp_path / "half", dtype=torch.bfloat16)
    kept = load_file(convert(str(released), tmp_path / "kept") / "model.safetensors")
    assert {t.dtype for name, t in kept.items() if not name.endswith(("A_log", "dt_bias"))} == {torch.bfloat16}
    assert {t.dtype for name, t in kept.items() if name.endswith(("A_log", "dt_bias"))} == {torch.float32}
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "bfloat16"
    wide = load_file(convert(str(released), tmp_path / "wide", dtype="float32") / "model.safetensors")
    assert {t.dtype for t in wide.values()} == {torch.float32}


def test_what_a_layout_cannot_express_is_named(teacher: Path, tmp_path: Path, capsys) -> None:
    ours = save_student(student(teacher, rope=True), tmp_path / "s", teacher=teacher, delta=False)
    for to, named in (("mmmamba-release", "'mixer.rope' is True"), ("hovle", "layer 0 is mamba2")):
        assert main(["convert", str(ours), str(tmp_path / "out"), "--to", to]) == 2
        error = capsys.readouterr().err
        assert named in error and "Traceback" not in error
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="which is read; give another DST"):
        convert(str(ours), ours)
    with pytest.raises(UserError, match="--separate is for"):
        convert(str(ours), tmp_path / "out", separate=True)
    with pytest.raises(UserError, match="are for a stage's file"):
        convert(str(ours), tmp_path / "out", teacher=str(teacher))


def test_what_is_read_and_what_others_wrote_is_not_replaced(teacher: Path, tmp_path: Path, capsys) -> None:
    delta = save_student(student(teacher), tmp_path / "delta", teacher=teacher, delta=True)
    whole = save_student(student(teacher), tmp_path / "whole", teacher=teacher, delta=False)
    (tmp_path / "link").symlink_to(teacher)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source in (delta, whole):  # the teacher that a student stands on, by any name, and below it
        for target in (teacher, tmp_path / "link", tmp_path / "delta" / ".." / "teacher", teacher / "below", source):
            assert main(["convert", str(source), str(target), "--overwrite"]) == 2
            assert "which is read; give another DST" in capsys.readouterr().err
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    for target, said in (
        (tmp_path / "nothing", "is a link to nothing"),
        (tmp_path / "whole" / "config.json" / "x", "is not a folder"),
        (tmp_path / "delta" / "model.safetensors", "is a file"),
    ):
        assert main(["convert", str(teacher), str(target)]) == 2
        assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    out = convert(str(delta), tmp_path / "out")
    convert(str(whole), out)  # its own, unchanged: replaced
    (out / "notes.md").write_text("mine")
    for flags in ([], ["--overwrite"]):
        assert main(["convert", str(whole), str(out), *flags]) == 2
        assert "holds 'notes.md', which is no part of a model" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- pickled weights


def pickled(folder: Path, shards: int) -> Path:
    """The folder's safetensors as ``pytorch_model*.bin``."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    groups = [names[i::shards] for i in range(shards)]
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
    for file, group in zip(files, groups, strict=True):
        torch.save({name: tensors[name].clone() for name in group}, folder / file)
    if shards > 1:
        table = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read(teacher: Path, tmp_path: Path, shards: int) -> None:
    model = load(teacher)
    equal(load(pickled(teacher, shards)), model)
    equal(load(convert(str(teacher), tmp_path / "out", to="hovle")), model)


class Evil:
    def __reduce__(self):
        return (print, ("owned",))


def test_a_pickle_with_code_is_not_run(teacher: Path, capsys) -> None:
    pickled(teacher, 1)
    torch.save({"x": Evil()}, teacher / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: the pickle holds code or objects"):
        load(teacher)
    (teacher / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load(teacher)
    assert "owned" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_pickle_is_named(teacher: Path, keep: int) -> None:
    file = pickled(teacher, 1) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"pytorch_model\.bin: truncated or not a file of tensors") as error:
        load(teacher)
    assert "\n" not in str(error.value)


def test_a_pickle_of_something_else_is_named(teacher: Path) -> None:
    torch.save([torch.ones(2)], pickled(teacher, 1) / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not hold a table of tensors"):
        load(teacher)


def test_values_that_are_not_finite_are_named(teacher: Path, tmp_path: Path) -> None:
    from mmmamba.checkpoints.io import write_safetensors

    tensors = load_file(teacher / "model.safetensors")
    name = "language_model.model.layers.0.attention.wo.weight"
    tensors[name][3, :2] = float("nan")
    write_safetensors(teacher / "model.safetensors", tensors)
    with pytest.raises(UserError, match=rf"'{name}' has 2 values that are not finite"):
        load(teacher)
    with pytest.raises(UserError, match="not finite"):
        convert(str(teacher), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))  # nothing half-written either


def test_large_finite_values_are_no_error(teacher: Path) -> None:
    from mmmamba.checkpoints.io import write_safetensors

    tensors = load_file(teacher / "model.safetensors")
    tensors["language_model.output.weight"].fill_(3e38)  # their sum overflows
    write_safetensors(teacher / "model.safetensors", tensors)
    load(teacher)


# ---------------------------------------------------------------------------------------------- files of a stage


@pytest.mark.parametrize("layer_map", [LINEAR, HYBRID], ids=["linear", "hybrid"])
def test_files_of_a_stage_are_laid_over_the_teacher(teacher: Path, tmp_path: Path, layer_map) -> None:
    model = student(teacher, layer_map)
    for layer in model.config.new_layers:  # frozen in every stage
        model.mixer(layer).o_proj = load(teacher).mixer(layer).o_proj
    second = stage_file(model, tmp_path / "stage2.pt", 2)
    equal(load(convert(str(second), tmp_path / "a", teacher=str(teacher))), model)
    later = stage_file(model, tmp_path / "stage3.pt", 3)
    equal(load(convert(str(later), tmp_path / "b", teacher=str(teacher), stage2=second)), model)
    assert read_config(tmp_path / "b").layer_map == layer_map
    assert (tmp_path / "b" / "tokenizer.json").is_file()

    fresh = seed(load(teacher), layer_map)
    first = stage_file(fresh, tmp_path / "stage1.pt", 1)
    equal(load(convert(str(first), tmp_path / "c", teacher=str(teacher))), fresh)


def test_a_stage_file_without_decays_is_refused(teacher: Path, tmp_path: Path) -> None:
    file = stage_file(student(teacher), tmp_path / "stage3.pt", 3)
    with pytest.raises(UserError, match=r"A_log_bias.*give it with --stage2"):
        convert(str(file), tmp_path / "out", teacher=str(teacher))
    with pytest.raises(UserError, match="give its teacher with --teacher"):
        convert(str(file), tmp_path / "out")
    torch.save({"something.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match="not a stage's file"):
        convert(str(file), tmp_path / "out", teacher=str(teacher))


def test_a_stage_file_with_a_foreign_or_misshaped_tensor_is_refused(teacher: Path, tmp_path: Path) -> None:
    file = stage_file(student(teacher), tmp_path / "stage2.pt", 2)
    tensors = torch.load(file)
    name = "embedding_model.encoder.0.attention.dt_bias"
    torch.save({**tensors, "extra.weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"1 unexpected tensor \(extra.weight\)"):
        convert(str(file), tmp_path / "out", teacher=str(teacher))
    torch.save({**tensors, name: torch.ones(3)}, file)
    with pytest.raises(UserError, match=rf"{name} is \(3,\)"):
        convert(str(file), tmp_path / "out", teacher=str(teacher))
