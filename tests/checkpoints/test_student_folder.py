"""Our student folder: whole or as a delta, tied to its teacher by a fingerprint; built-in names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmmamba.checkpoints import (
    builtin_names,
    fingerprint,
    load,
    model_source,
    read_config,
    resolve,
    save_hovle,
    save_student,
)
from mmmamba.checkpoints.rounded_tensors import read_rounded, round_tensor
from mmmamba.checkpoints.student import same_bits
from mmmamba.convert import convert
from mmmamba.errors import UserError
from mmmamba.model import Mamba2Options, Model, initialise

LINEAR = ("mamba2",) * 5
HYBRID = ("attention", "mamba2", "attention", "mamba2", "attention")
OPTIONS = Mamba2Options(rope=True, conv_kernel=4, conv_activation="none", qk_norm=True, gate_bias=True, norm_eps=1e-6)


@pytest.fixture
def teacher(tiny_model, tiny_processor, tmp_path: Path) -> Path:
    return save_hovle(tiny_model(), tiny_processor, tmp_path / "models" / "teacher")


def student_of(teacher: Path, tiny_model, layer_map=LINEAR, mixer: Mamba2Options | None = None) -> Model:
    """A student whose mixers were trained (q, k, v too) and whose other tensors are the teacher's."""
    student, frozen = tiny_model(layer_map, mixer, seed=5), load(teacher).state_dict()
    changes = [f"layers.{i}.mixer." for i in student.config.new_layers]
    state = student.state_dict()
    keep = [n for n in state if not any(n.startswith(c) for c in changes) or n.endswith("o_proj.weight")]
    student.load_state_dict({**state, **{name: frozen[name] for name in keep}})
    return student


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "whole"])
@pytest.mark.parametrize(
    ("layer_map", "mixer"),
    [(LINEAR, None), (HYBRID, None), (HYBRID, OPTIONS), (HYBRID, replace(OPTIONS, rule="gated_delta"))],
    ids=["linear", "hybrid", "options", "delta rule"],
)
def test_written_and_read_again_is_the_same_model(teacher, tiny_model, same_model, delta, layer_map, mixer) -> None:
    student = student_of(teacher, tiny_model, layer_map, mixer)
    folder = save_student(student, teacher.parent / "student", teacher=teacher, delta=delta)
    assert read_config(folder) == student.config
    same_model(load(folder), student)
    stored = load_file(folder / "model.safetensors")
    if delta:
        mixers = tuple(f"layers.{i}.mixer." for i in student.config.new_layers)
        assert all(name.startswith(mixers) and not name.endswith("o_proj.weight") for name in stored)
        more = 0 if mixer is None else mixer.gate_bias + (mixer.rule == "gated_delta")
        assert len(stored) == (10 + more) * len(mixers)
    else:
        assert stored.keys() == student.state_dict().keys()


def test_a_delta_is_found_by_comparing(teacher, tiny_model, same_model) -> None:
    """What training left alone is not stored, what it changed outside the mixers is."""
    student = student_of(teacher, tiny_model, HYBRID)
    frozen = load(teacher).state_dict()
    with torch.no_grad():
        student.layers[1].mixer.q_proj.weight.copy_(frozen["layers.1.mixer.q_proj.weight"])
        student.layers[3].mixer.o_proj.weight[0, 0] += 1
        student.norm.weight[3] += 1
    folder = save_student(student, teacher.parent / "student", teacher=teacher, delta=True)
    stored = set(load_file(folder / "model.safetensors"))
    assert "layers.1.mixer.q_proj.weight" not in stored and "layers.3.mixer.q_proj.weight" in stored
    assert {name for name in stored if not name.startswith(("layers.1.mixer", "layers.3.mixer"))} == {"norm.weight"}
    assert "layers.3.mixer.o_proj.weight" in stored
    same_model(load(folder), student)


# ---------------------------------------------------------------------------------------------- rounded


@pytest.mark.parametrize(("form", "tolerance"), [("int8", 0.01), ("int4", 0.12)])
def test_a_rounded_delta_is_near_and_small(teacher, tiny_model, form, tolerance) -> None:
    student, theirs = student_of(teacher, tiny_model), load(teacher).state_dict()
    exact = save_student(student, teacher.parent / "exact", teacher=teacher, delta=True)
    folder = save_student(student, teacher.parent / "rounded", teacher=teacher, delta=form)
    stored, whole = load_file(folder / "model.safetensors"), load_file(exact / "model.safetensors")
    rounded = {name.removesuffix(f".{form}") for name in stored if name.endswith(f".{form}")}
    assert rounded == {name for name, tensor in whole.items() if tensor.ndim > 1 and tensor.numel() >= 4096}
    assert len(rounded) >= 2 * len(LINEAR) and not rounded & stored.keys()
    ours, read_back = student.state_dict(), load(folder).state_dict()
    for name, tensor in ours.items():
        if name not in rounded:
            assert torch.equal(read_back[name], tensor), name
            continue
        change = tensor - theirs[name] if name in theirs else tensor
        assert 0 < float((read_back[name] - tensor).norm()) < tolerance * float(change.norm()), name
        assert stored[f"{name}.{form}"].nbytes == tensor.numel() // (2 if form == "int4" else 1)


def test_what_is_read_of_codes_is_exact() -> None:
    """The documented arithmetic, value by value, with a last group that is not full."""
    codes = torch.arange(64).remainder(16)
    packed = torch.stack([(codes[0::2] | codes[1::2] << 4).to(torch.uint8)] * 2)
    scales = torch.tensor([0.5, 3.0], dtype=torch.bfloat16)
    shape, base = torch.Size([10, 10]), torch.full((10, 10), 100.0)
    found = read_rounded({"w.int4": packed, "w.scales": scales}, "w", shape, base)
    expected = torch.cat([(codes - 8) * 0.5, (codes - 8) * 3.0])[:100].view(10, 10) + 100
    assert torch.equal(found, expected)
    again = round_tensor("w", expected, base, "int8")
    assert torch.allclose(read_rounded(again, "w", shape, base), expected, atol=0.1)
    flat = round_tensor("w", base, base, "int4")  # no difference, no scale: nothing is divided by zero
    assert torch.equal(read_rounded(flat, "w", shape, base), base)


def test_a_rounded_delta_stays_what_it_is_when_it_is_written_again(teacher, tiny_model, same_model) -> None:
    """Made whole, it is the student that it was read as; stored as it is against the teacher, too."""
    folder = save_student(student_of(teacher, tiny_model), teacher.parent / "a", teacher=teacher, delta="int4")
    whole = convert(str(folder), teacher.parent / "whole")
    assert json.loads((whole / "config.json").read_text())["delta"] is False
    assert load_file(whole / "model.safetensors")["layers.0.mixer.q_proj.weight"].dtype == torch.float32
    exact = save_student(load(folder), teacher.parent / "exact", teacher=teacher, delta=True)
    same_model(load(whole), load(folder))
    same_model(load(exact), load(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}.scales"), r"1 missing tensor \(.*gate_proj.weight.scales\)"),
        (lambda t, n: t.update({f"{n}.int4": t[f"{n}.int4"][1:]}), r"1 tensor of the wrong shape"),
        (lambda t, n: t.update({f"{n}.int4": t[f"{n}.int4"].view(torch.int8)}), r"is int8, expected uint8"),
        (lambda t, n: t.update({f"{n}.scales": t[f"{n}.scales"].float()}), r"float32, expected bfloat16"),
        (lambda t, n: t.update({n: torch.zeros(64, 64)}), r"1 unexpected tensor"),
        (lambda t, n: t.update({f"{n}.int8": t[f"{n}.int4"].clone()}), r"is uint8, expected int8"),
        (lambda t, n: t[f"{n}.scales"].fill_(3e38), r"give values that overflow"),
        (lambda t, n: t[f"{n}.scales"].fill_(float("nan")), r"not finite"),
    ],
)
def test_an_altered_rounded_delta_is_refused(teacher, tiny_model, edit_weights, change, message) -> None:
    folder = save_student(student_of(teacher, tiny_model), teacher.parent / "s", teacher=teacher, delta="int4")
    edit_weights(folder, lambda tensors: change(tensors, "layers.0.mixer.gate_proj.weight"))
    with pytest.raises(UserError, match=message) as refusal:
        load(folder)
    assert str(refusal.value).count("\n") == 0 and "model.safetensors" in str(refusal.value)


def test_the_students_that_ship_are_read_by_transformers_too() -> None:
    from transformers import AutoModelForImageTextToText

    import mmmamba  # noqa: F401

    theirs = AutoModelForImageTextToText.from_pretrained(model_source.ASSETS / "pico-hybrid", dtype=torch.float32)
    ours = load("pico-hybrid").state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


def test_same_bits_is_stricter_than_equal() -> None:
    zero, nan = torch.zeros(2), torch.tensor([1.0, float("nan")])
    assert same_bits(zero, zero.clone()) and same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero) and not same_bits(zero, zero.double()) and not same_bits(zero, torch.zeros(3))


def test_half_precision_keeps_the_decays(teacher, tiny_model) -> None:
    student = student_of(teacher, tiny_model)
    folder = save_student(student, teacher.parent / "s", teacher=teacher, delta=True, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    wide = {name.rsplit(".", 1)[-1] for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias"}
    assert torch.equal(load(folder).layers[2].mixer.A_log, student.layers[2].mixer.A_log)


def test_tokenizer_files_come_from_the_processor_or_the_teacher(teacher, tiny_model, tiny_processor) -> None:
    student = student_of(teacher, tiny_model)
    copied = save_student(student, teacher.parent / "a", teacher=teacher, delta=True)
    saved = save_student(student, teacher.parent / "b", teacher=teacher, delta=True, processor=tiny_processor)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (copied / name).read_bytes() == (saved / name).read_bytes() == (teacher / name).read_bytes()


# ---------------------------------------------------------------------------------------------- the teacher


def test_teacher_and_student_move_together_but_not_apart(teacher, tiny_model, tmp_path: Path) -> None:
    save_student(student_of(teacher, tiny_model), teacher.parent / "student", teacher=teacher, delta=True)
    shutil.copytree(teacher.parent, tmp_path / "elsewhere")
    shutil.rmtree(teacher.parent)
    load(tmp_path / "elsewhere" / "student")
    shutil.rmtree(tmp_path / "elsewhere" / "teacher")
    with pytest.raises(UserError, match=r"config.json: .*differs from its teacher '../teacher', which is not there"):
        load(tmp_path / "elsewhere" / "student")


def test_a_teacher_from_elsewhere_is_named_by_its_full_path(teacher, tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_student(student_of(teacher, tiny_model), "out/student", teacher="models/teacher", delta=True)
    assert json.loads(Path("out/student/config.json").read_text())["teacher"]["name"] == str(teacher)
    monkeypatch.chdir("out")
    load("student")


def test_a_changed_teacher_is_refused_with_the_reason(teacher, tiny_model, edit_weights) -> None:
    student = student_of(teacher, tiny_model)
    delta = save_student(student, teacher.parent / "delta", teacher=teacher, delta=True)
    whole = save_student(student, teacher.parent / "whole", teacher=teacher, delta=False)
    edit_weights(teacher, lambda t: t["language_model.output.weight"].add_(1))
    message = r"the teacher '../teacher' has changed or is another one: its fingerprint is \w{12}…, .* from \w{12}…"
    with pytest.raises(UserError, match=message):
        load(delta)
    shutil.rmtree(teacher)
    load(whole)


def test_a_lost_or_foreign_tensor_is_refused(teacher, tiny_model, edit_weights, edit_config) -> None:
    folder = save_student(student_of(teacher, tiny_model), teacher.parent / "s", teacher=teacher, delta=True)
    edit_weights(folder, lambda t: t.pop("layers.0.mixer.q_proj.weight"))  # the teacher has one of that name
    with pytest.raises(UserError, match=r"holds 49 tensors, config.json says 50"):
        load(folder)
    edit_weights(folder, lambda t: t.pop("layers.0.mixer.A_log"))
    with pytest.raises(UserError, match=r"s/model.safetensors: .*1 missing tensor \(layers.0.mixer.A_log\)"):
        load(folder)
    edit_weights(folder, lambda t: t.update({"layers.0.mixer.odd": torch.ones(1)}))
    with pytest.raises(UserError, match=r"1 unexpected tensor \(layers.0.mixer.odd\)"):
        load(folder)
    edit_config(folder, {"model.mixer.ropes": True})
    with pytest.raises(UserError, match=r"config.json: unknown key 'model.mixer.ropes' \(did you mean 'rope'\?\)"):
        load(folder)


def test_the_teachers_own_folder_is_never_replaced(teacher, tiny_model) -> None:
    before = fingerprint(teacher)
    with pytest.raises(UserError, match="is the teacher's folder"):
        save_student(student_of(teacher, tiny_model), teacher, teacher=teacher, delta=True)
    assert fingerprint(teacher) == before


def test_a_tied_head_stays_tied(tiny_config, tmp_path: Path) -> None:
    model = initialise(Model(tiny_config(LINEAR, tie_word_embeddings=True)), 0).eval()
    teacher = initialise(Model(tiny_config(tie_word_embeddings=True)), 1)
    base = save_student(teacher, tmp_path / "base", teacher=save_hovle(teacher, None, tmp_path / "t"), delta=False)
    for delta in (True, False):
        read_back = load(save_student(model, tmp_path / f"s{delta}", teacher=base, delta=delta))
        assert read_back.head.weight is read_back.text_embeddings.weight
        ids = torch.tensor([[1, 9, 12, 40]])
        assert torch.equal(read_back(ids).logits, model(ids).logits)


# ---------------------------------------------------------------------------------------------- names


@pytest.fixture
def assets(teacher, tmp_path: Path, monkeypatch) -> Path:
    """An installation that comes with one model, nano-teacher."""
    folder = tmp_path / "assets"
    shutil.copytree(teacher, folder / "nano-teacher")
    monkeypatch.setattr("mmmamba.checkpoints.model_source.ASSETS", folder)
    monkeypatch.setattr("mmmamba.checkpoints.write.ASSETS", folder)
    return folder


def test_builtin_names_and_aliases(assets: Path, tmp_path: Path, monkeypatch) -> None:
    assert builtin_names() == ["nano-teacher"]
    assert resolve("nano") == resolve("nano-teacher") == assets / "nano-teacher"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert resolve("nano") == assets / "nano-teacher" and resolve("./nano") == Path("nano")
    with pytest.raises(UserError, match=r"'pico-teacher' is not part of this installation \(built-in: nano-teacher\)"):
        resolve("pico")
    with pytest.raises(UserError, match=r"'nanoo' is neither a folder nor a built-in model \(built-in: nano-teacher\)"):
        resolve("nanoo")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve("file")


def test_a_student_of_a_builtin_teacher_needs_no_path(assets: Path, teacher, tiny_model, tmp_path, same_model) -> None:
    student = student_of(teacher, tiny_model)
    for name in ("nano", str(assets / "nano-teacher")):
        folder = save_student(student, tmp_path / "s", teacher=name, delta=True)
        assert json.loads((folder / "config.json").read_text())["teacher"]["name"] == "nano-teacher"
        same_model(load(folder), student)
    shutil.rmtree(assets / "nano-teacher")
    with pytest.raises(UserError, match=r"its teacher 'nano-teacher', which is not there \(no built-in models"):
        load(folder)


def test_fingerprint_covers_config_and_weights(teacher, edit_config) -> None:
    before = fingerprint(teacher)
    (teacher / "README.md").write_text("not part of it")
    assert fingerprint(teacher) == before and len(before) == 64
    edit_config(teacher, {"max_dynamic_patch": 5})
    assert fingerprint(teacher) != before
    (teacher / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: no such file"):
        fingerprint(teacher)


def test_assets_are_looked_up_in_the_package() -> None:
    assert model_source.ASSETS.name == "assets" and model_source.ASSETS.parent.name == "mmmamba"
