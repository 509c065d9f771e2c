"""The published students' layout: fused and separate, linear and hybrid, there and back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmmamba.checkpoints import load, read_config, save_release
from mmmamba.checkpoints.layouts import RELEASE, SEPARATE, by_part, write_part
from mmmamba.errors import UserError
from mmmamba.model import Mamba2Options

LINEAR = ("mamba2",) * 5
HYBRID = ("attention", "mamba2", "attention", "mamba2", "attention")
GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("name", ["student_A", "student_A_fused", "student_hybrid_A", "student_hybrid_A_fused"])
def test_golden_students_export_to_what_they_were_imported_from(golden_folder, tmp_path: Path, name: str) -> None:
    source = golden_folder(name)
    fused = name.endswith("_fused")
    written = save_release(load(source), None, tmp_path / "out", fused=fused, dtype=torch.float32)
    before, after = load_file(source / "model.safetensors"), load_file(written / "model.safetensors")
    assert before.keys() == after.keys()
    if fused:
        assert {n: list(t.shape) for n, t in after.items()} == json.loads((GOLDEN / f"{name}_keys.json").read_text())
    unused = "language_model.model.tok_embeddings.weight"
    assert all(torch.equal(before[key], after[key]) for key in before if key != unused)
    kinds = [json.loads((folder / "config.json").read_text()) for folder in (source, written)]
    for key in ("embedding_config", "llm_config"):
        assert kinds[0][key]["layers_block_type"] == kinds[1][key]["layers_block_type"]
    assert kinds[1]["model_type"] == "mmMamba_chat"
    assert read_config(written) == read_config(source)


@pytest.mark.parametrize("layer_map", [LINEAR, HYBRID], ids=["linear", "hybrid"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_there_and_back_is_bit_for_bit(tiny_model, tmp_path: Path, same_model, layer_map, fused: bool) -> None:
    model = tiny_model(layer_map)
    layout = RELEASE if fused else SEPARATE
    for part, ours in by_part(model.state_dict(), model.config).items():
        back = layout.read(write_part(layout, ours, model.config, part), model.config, part)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
    folder = save_release(model, None, tmp_path / "out", fused=fused, dtype=torch.float32)
    same_model(load(folder), model)
    same_model(load(save_release(load(folder), None, tmp_path / "o", fused=not fused, dtype=torch.float32)), model)


def test_half_precision_keeps_the_decays_in_float32(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(LINEAR)
    folder = save_release(model, None, tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    wide = {name for name, kind in kinds.items() if kind == "F32"}
    assert len(wide) == 10 and all(name.endswith(("A_log_bias", "dt_bias")) for name in wide)
    half = load(folder, dtype=torch.bfloat16)
    assert torch.equal(half.layers[0].mixer.A_log, model.layers[0].mixer.A_log)
    assert half.layers[0].mixer.dt_bias.dtype == torch.float32 and half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "mixer",
    [
        Mamba2Options(rope=True),
        Mamba2Options(conv_kernel=4),
        Mamba2Options(conv_activation="none"),
        Mamba2Options(qk_norm=True),
        Mamba2Options(qkv_bias=True),
        Mamba2Options(gate_bias=True),
        Mamba2Options(norm_eps=1e-6),
        Mamba2Options(rule="gated_delta", qk_norm=True),
    ],
    ids=["rope", "conv_kernel", "conv_activation", "qk_norm", "qkv_bias", "gate_bias", "norm_eps", "rule"],
)
def test_mixer_options_are_refused_by_name(tiny_model, tmp_path: Path, mixer: Mamba2Options, request) -> None:
    option = request.node.callspec.id
    model = tiny_model(HYBRID, mixer)
    with pytest.raises(UserError, match=rf"'mixer.{option}' is .*published mixer only.*student folder"):
        save_release(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_a_mixer_was_started_does_not_matter(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(LINEAR, Mamba2Options(decay="spread", dt_min=1e-4))
    assert load(save_release(model, None, tmp_path / "out")).config.mixer == Mamba2Options()


@pytest.mark.parametrize("lost", ["A_log_bias", "dt_bias"])
def test_lost_decays_are_refused_with_the_reason(golden_folder, edit_weights, lost: str) -> None:
    folder = golden_folder("student_hybrid_A_fused")
    edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith(f".{lost}")])
    message = rf"2 missing tensors \(embedding_model.encoder.1.attention.{lost}, .*\): A_log_bias and dt_bias are the"
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_mislabelled_hybrid_is_refused_with_the_reason(golden_folder, edit_config) -> None:
    """The published conversion writes Mamba-2 tensors into layers that it calls mha."""
    folder = golden_folder("student_A_fused")
    edit_config(folder, {"embedding_config.layers_block_type": ["mha", "mamba2"]})
    with pytest.raises(UserError, match=r"encoder.0.attention.wqkv.weight.*'layers_block_type' \(mamba2 \| mha\) must"):
        load(folder)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["mamba2"], r"'embedding_config.layers_block_type' has 1 entries for 2 layers"),
        (["mamba2", "mamba3"], r"'embedding_config.layers_block_type' has 'mamba3'"),
        (..., r"'embedding_config.layers_block_type' is missing"),
    ],
)
def test_bad_layer_kinds_are_named(golden_folder, edit_config, kinds, message: str) -> None:
    folder = golden_folder("student_A")
    edit_config(folder, {"embedding_config.layers_block_type": kinds})
    with pytest.raises(UserError, match=message):
        load(folder)
