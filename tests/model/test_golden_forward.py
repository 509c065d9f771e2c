"""The published reference's forward values: teacher, linear and hybrid students, fused and not, and the mixer alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.checkpoints import load
from mmmamba.checkpoints.hovle import split_qkv
from mmmamba.checkpoints.io import write_safetensors
from mmmamba.model import Model, ModelConfig, StackConfig
from mmmamba.model.mixers.mamba2 import Mamba2
from mmmamba.model.rope import rotation
from mmmamba.ops import causal_conv, ssd_chunked, ssd_reference

Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]

TOLERANCE = 2e-5
ILL_CONDITIONED = 3e-4  # random weights: float32 and float64 of the reference itself differ by 1e-4
STUDENTS = {
    "student_A": ILL_CONDITIONED,
    "student_A_seeded": TOLERANCE,
    "student_A_fused": ILL_CONDITIONED,
    "student_hybrid_A": TOLERANCE,
    "student_hybrid_A_fused": TOLERANCE,
}


def write_published(folder: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
    """A golden file's weights as the folder that the published code would have written."""
    config = json.loads(json.dumps(info["config"]))
    if "softmax_attention_global_indices" in info:
        softmax = info["softmax_attention_global_indices"]
        config["model_type"] = "mmMamba_chat"
        for key, first in (("embedding_config", 0), ("llm_config", 8)):  # the reference counts decoder layers from 8
            layers = range(config[key]["num_hidden_layers"])
            config[key]["layers_block_type"] = ["mha" if first + i in softmax else "mamba2" for i in layers]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    write_safetensors(folder / "model.safetensors", weights)
    return folder


@pytest.fixture
def published(golden: Golden, tmp_path: Path) -> Callable[[str], tuple[Model, dict[str, Tensor], dict[str, Any]]]:
    """``published(name)`` → (the model loaded from its folder, golden tensors, golden json)."""

    def read(name: str) -> tuple[Model, dict[str, Tensor], dict[str, Any]]:
        tensors, info = golden(name)
        return load(write_published(tmp_path / name, tensors, info)), tensors, info

    return read


@torch.no_grad()
def stages(model: Model, tensors: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Every stage of one forward under its golden name, each as it leaves the model (padding already dropped)."""
    found: dict[str, Tensor] = {}
    vision = model.vision
    assert vision is not None
    patches = vision.patches(tensors["in.pixel_values"])
    found["out.vision_embeddings"] = patches.flatten(1, 2)
    found["out.pixel_shuffle_proj"] = vision(tensors["in.pixel_values"])
    found["out.embed.input"] = model.embed(tensors["in.input_ids"], tensors["in.pixel_values"])
    names = [f"out.embed.layer{i}" for i in range(model.config.embedding.num_layers)]
    names += [f"out.llm.layer{i}" for i in range(model.config.decoder.num_layers)]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: found.__setitem__(name, output[0]))
        for name, layer in zip(names, model.layers, strict=True)
    ]
    hooks.append(model.norm.register_forward_hook(lambda _m, _i, output: found.__setitem__("out.llm.norm", output)))
    output = model(tensors["in.input_ids"], tensors["in.pixel_values"], mask)
    for hook in hooks:
        hook.remove()
    found["out.logits"] = output.logits
    assert torch.equal(output.hidden[mask], found["out.llm.norm"][0]) if mask is not None else True
    return found


@torch.no_grad()
def greedy(model: Model, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy ids (b, n) and the logits they came from (b, n, v), by prefill and one-token steps through the state."""
    steps = tensors["out.greedy_ids"].shape[1]
    output = model(tensors["in.input_ids"], tensors["in.pixel_values"], logits="last", return_state=True)
    ids, logits = [], []
    for _ in range(steps):
        logits.append(output.logits)
        ids.append(output.logits.argmax(-1))
        output = model(ids[-1][:, None], state=output.state, logits="last", return_state=True)
    return torch.stack(ids, 1), torch.stack(logits, 1)


def assert_stages(
    found: dict[str, Tensor], tensors: dict[str, Tensor], atol: float, mask: Tensor | None = None
) -> None:
    expected = {name: tensor for name, tensor in tensors.items() if name in found}
    assert "out.logits" in expected
    for name, tensor in expected.items():
        value = found[name]
        if mask is not None and tensor.shape[:2] == mask.shape:  # padded positions have no meaning
            tensor = tensor[mask]
            value = value[0] if value.shape[0] == 1 else value[mask]
        torch.testing.assert_close(value, tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------- teacher


def test_teacher_every_stage(published) -> None:
    model, tensors, _ = published("hovle_tiny_A")
    found = stages(model, tensors, None)
    kinds = ("out.vision_embeddings", "out.pixel", "out.embed", "out.llm", "out.logits")
    assert set(found) == {name for name in tensors if name.startswith(kinds) and not name.endswith("_70")}
    assert_stages(found, tensors, TOLERANCE)


def test_teacher_greedy(published) -> None:
    model, tensors, _ = published("hovle_tiny_A")
    ids, logits = greedy(model, tensors)
    assert torch.equal(ids, tensors["out.greedy_ids"])
    torch.testing.assert_close(logits, tensors["out.greedy_last_logits"], atol=TOLERANCE, rtol=0)
    top = logits.topk(2, dim=-1).values
    torch.testing.assert_close(top[..., 0] - top[..., 1], tensors["out.greedy_margin"], atol=2 * TOLERANCE, rtol=0)


@torch.no_grad()
def test_teacher_text_only(published) -> None:
    model, tensors, _ = published("hovle_tiny_A")
    logits = model(tensors["in.text_only_ids"]).logits
    torch.testing.assert_close(logits, tensors["out.text_only_logits"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_teacher_resizes_positions_for_an_image_of_another_size(published) -> None:
    model, tensors, _ = published("hovle_tiny_A")
    patches = model.vision.patches(tensors["in.pixel_values_70"]).flatten(1, 2)
    torch.testing.assert_close(patches, tensors["out.vision_embeddings_70"], atol=TOLERANCE, rtol=0)


def test_teacher_right_padded(published) -> None:
    model, tensors, _ = published("hovle_pad_A")
    mask = tensors["in.attention_mask"]
    assert not mask[1, -4:].any() and mask[0].all()
    assert_stages(stages(model, tensors, mask), tensors, TOLERANCE, mask)


@torch.no_grad()
def test_teacher_left_padded_gives_the_same(published) -> None:
    model, tensors, _ = published("hovle_pad_A")
    mask, ids = tensors["in.attention_mask"], tensors["in.input_ids"].clone()
    rolled = mask.clone()
    ids[1], rolled[1] = ids[1].roll(4), rolled[1].roll(4)
    logits = model(ids, tensors["in.pixel_values"], rolled).logits
    torch.testing.assert_close(logits[rolled], tensors["out.logits"][mask], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_teacher_that_merges_patches_late_with_scaled_positions(published) -> None:
    """Of ``post``, with dynamic scaling: 44 positions in the embedding stack and 20 in the decoder, 24 unscaled."""
    model, tensors, _ = published("hovle_tiny_C_post")
    ids, pixels = tensors["in.input_ids"], tensors["in.pixel_values"]
    found: dict[str, Tensor] = {}
    names = ["out.embed.layer0", "out.embed.layer1", "out.llm.layer0", "out.llm.layer1"]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: found.__setitem__(name, output[0]))
        for name, layer in zip(names, model.layers, strict=True)
    ]
    output = model(ids, pixels)
    for hook in hooks:
        hook.remove()
    assert_stages(found | {"out.logits": output.logits, "out.llm.norm": output.hidden}, tensors, TOLERANCE)
    for step in range(tensors["out.greedy_ids"].shape[1]):  # each as the published code reads it: the base grows
        logits = model(ids, pixels, logits="last").logits
        torch.testing.assert_close(logits, tensors["out.greedy_last_logits"][:, step], atol=TOLERANCE, rtol=0)
        ids = torch.cat([ids, tensors["out.greedy_ids"][:, step : step + 1]], 1)


# ---------------------------------------------------------------------------------------------- students


@pytest.mark.parametrize("name", STUDENTS)
def test_student_every_stage(published, name: str) -> None:
    model, tensors, info = published(name)
    first = model.config.embedding.num_layers
    softmax = tuple(i if i < 8 else i - 8 + first for i in info["softmax_attention_global_indices"])
    assert model.config.attention_layers == softmax
    assert_stages(stages(model, tensors, None), tensors, STUDENTS[name])


@pytest.mark.parametrize("name", ["student_A", "student_hybrid_A"])
def test_student_greedy(published, name: str) -> None:
    model, tensors, _ = published(name)
    ids, logits = greedy(model, tensors)
    assert torch.equal(ids, tensors["out.greedy_ids"])
    torch.testing.assert_close(logits, tensors["out.greedy_last_logits"], atol=STUDENTS[name], rtol=0)


@pytest.mark.parametrize("name", ["student_A", "student_hybrid_A"])
def test_fused_and_separate_projections_are_one_model(published, name: str) -> None:
    separate, fused = published(name)[0].state_dict(), published(f"{name}_fused")[0].state_dict()
    assert separate.keys() == fused.keys()
    assert all(torch.equal(separate[key], fused[key]) for key in separate)


# ---------------------------------------------------------------------------------------------- mixer


@pytest.fixture(params=["mixer_A", "mixer_A_pert"])
def mixer_case(request: pytest.FixtureRequest, golden: Golden) -> tuple[Mamba2, ModelConfig, dict[str, Tensor], str]:
    """(mixer with the golden weights, its config, tensors, the stage its outputs are stored under)."""
    tensors, info = golden(request.param)
    c = info["config"]
    heads = c["num_attention_heads"]
    stack = StackConfig(
        num_layers=1,
        intermediate_size=c["intermediate_size"],
        num_heads=heads,
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // heads,
        rope_theta=c["rope_theta"],
        max_position_embeddings=c["max_position_embeddings"],
    )
    none = StackConfig(num_layers=0, intermediate_size=1, num_heads=1, num_kv_heads=1, head_dim=2)
    config = ModelConfig(
        hidden_size=c["hidden_size"], vocab_size=c["vocab_size"], embedding=none, decoder=stack, layer_map=("mamba2",)
    )
    mixer = Mamba2(config.hidden_size, stack, config.mixer)
    w = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    names = {"dt_proj.weight": "in_proj.weight", "gate_proj.weight": "g_proj.weight", "norm.weight": "g_norm.weight"}
    names |= {"A_log": "A_log_bias", "dt_bias": "dt_bias", "conv.bias": "conv1d.bias"}
    names |= {f"{part}_proj.weight": f"{part}_proj.weight" for part in "qkvo"}
    state = {ours: w[theirs] for ours, theirs in names.items()}
    state["conv.weight"] = w["conv1d.weight"][:, 0]
    mixer.load_state_dict(state)
    return mixer, config, tensors, "stage1" if request.param == "mixer_A" else "stage2"


@torch.no_grad()
def test_mixer_heads_and_final_state(mixer_case) -> None:
    mixer, config, tensors, stage = mixer_case
    x = tensors["in.hidden_states"]
    turn = rotation(config.decoder, tensors["in.position_ids"], x.shape[1], x.dtype)
    heads, state = mixer.heads(x, rotation=turn, keep_state=True)
    torch.testing.assert_close(heads.transpose(1, 2), tensors[f"out.{stage}.y_pred"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(state.ssm, tensors["out.mid.final_state"], atol=TOLERANCE, rtol=0)
    out, _ = mixer(x, rotation=turn)
    torch.testing.assert_close(out, tensors["out.stage3.out"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_mixer_intermediates(mixer_case) -> None:
    """What goes into the scan (groups repeated to heads in the golden file) and what comes out of it."""
    mixer, _, tensors, _ = mixer_case
    x, h, g, p = tensors["in.hidden_states"], mixer.heads_count, mixer.groups, mixer.head_dim
    vkq = torch.cat([mixer.v_proj(x), mixer.k_proj(x), mixer.q_proj(x)], dim=-1)
    vkq, _ = causal_conv(vkq, mixer.conv.weight, mixer.conv.bias, activation="silu")
    v, k, q = (part.unflatten(-1, (-1, p)) for part in vkq.split([g * p, g * p, h * p], dim=-1))
    dt = mixer.step_size(x)
    for name, value in {"x": v, "B": k, "C": q, "dt": dt}.items():
        value = value.repeat_interleave(h // g, 2) if name in "xB" else value
        torch.testing.assert_close(value, tensors[f"out.mid.{name}"], atol=TOLERANCE, rtol=0)
    for scan in (ssd_reference, ssd_chunked):
        y, final = scan(v, dt, -torch.exp(mixer.A_log), k, q, return_final_state=True)
        torch.testing.assert_close(y, tensors["out.mid.y"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(final, tensors["out.mid.final_state"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_mixer_projections_are_rows_of_wqkv(golden: Golden, mixer_case) -> None:
    """A fresh mixer's q, k, v are its attention's (invariant of seeding, and of how ``wqkv`` is laid out)."""
    mixer, config, _, stage = mixer_case
    tensors, _ = golden("mixer_A")
    if stage == "stage1":
        for ours, theirs in zip("qkv", split_qkv(tensors["base.wqkv.weight"], config.decoder), strict=True):
            assert torch.equal(getattr(mixer, f"{ours}_proj").weight, theirs)


@torch.no_grad()
def test_base_attention_heads(mixer_case) -> None:
    """The attention that the mixer imitates: outputs of its heads and behind W_o."""
    from mmmamba.model.mixers import Attention, AttentionOptions

    _, config, tensors, stage = mixer_case
    attention = Attention(config.hidden_size, config.decoder, AttentionOptions())
    q, k, v = split_qkv(tensors["base.wqkv.weight"], config.decoder)
    parts = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": tensors["base.wo.weight"]}
    attention.load_state_dict({f"{name}.weight": tensor for name, tensor in parts.items()})
    x = tensors["in.hidden_states"]
    turn = rotation(config.decoder, tensors["in.position_ids"], x.shape[1], x.dtype)
    heads, _ = attention.heads(x, rotation=turn)
    torch.testing.assert_close(heads.transpose(1, 2), tensors[f"out.{stage}.y_true"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(attention(x, rotation=turn)[0], tensors["out.base_attention"], atol=TOLERANCE, rtol=0)
