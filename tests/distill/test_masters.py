"""bfloat16 passes over frozen weights that lie in bfloat16: what is trained is its own float32 master copy."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import test_losses
import torch

import small_run
from mmmamba.checkpoints import load, read_safetensors
from mmmamba.data.packed_batch import pack
from mmmamba.distill.checked_tensors import ABOUT, TENSORS
from mmmamba.distill.distill import distill
from mmmamba.distill.objectives import AlignHeads, MatchLogits
from mmmamba.distill.run_folder import RunFolder
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import TrainConfig
from mmmamba.distill.training_step import make_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["align", "match", "hybrid"])
def test_masters_states_and_gradients_are_float32_and_the_rest_is_the_teachers(kind, tiny_model):
    teacher = tiny_model().to(torch.bfloat16)
    student = seed(teacher, test_losses.HYBRID if kind == "hybrid" else None, dtype=torch.float32)
    objective = (AlignHeads if kind == "align" else MatchLogits)(teacher, student, test_losses.stage())
    step = make_step(objective, TrainConfig(steps=1, batch_size=1, lr=1e-3), CPU, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trained = {name: parameter.detach().clone() for name, parameter in objective.trained.items()}
    step([pack(test_losses.SAMPLES)], 1e-3)
    for name, parameter in objective.trained.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        state = step.optimizers.state_of(parameter)
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        assert not torch.equal(parameter, trained[name])
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    new = dict(student.named_parameters()).keys() - {
        name for name, parameter in student.named_parameters() if parameter.data_ptr() in theirs
    }
    assert new == objective.trained.keys()  # one copy of all else in memory
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_step_smaller_than_bfloat16_holds_is_not_lost(tiny_model):
    teacher = tiny_model().to(torch.bfloat16)
    objective = MatchLogits(teacher, seed(teacher, dtype=torch.float32), test_losses.stage())
    weight = objective.trained["layers.0.mixer.q_proj.weight"]
    start = weight.detach().clone()
    config = TrainConfig(steps=50, batch_size=1, lr=1e-6, weight_decay=0.0)
    step = make_step(objective, config, CPU, torch.bfloat16)
    for _ in range(50):
        step([pack(test_losses.SAMPLES[:1])], 1e-6)
    moved = (weight.detach() - start).abs()
    assert 1e-5 < float(moved.mean()) < 6e-5  # about 50 steps of 1e-6 each; bfloat16 rounds 0.1 to 4e-4


@pytest.mark.parametrize("kind", ["align", "match"])
def test_gradients_are_those_of_float32_within_rounding(kind, tiny_model):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        teacher = tiny_model().to(torch.bfloat16).to(dtype)
        student = seed(teacher, dtype=torch.float32)
        objective = (AlignHeads if kind == "align" else MatchLogits)(teacher, student, test_losses.stage())
        loss = objective.backward([pack(test_losses.SAMPLES)], dtype)["loss"]
        found.append((float(loss), torch.cat([p.grad.flatten() for p in objective.trained.values()])))
    (truth, exact), (rounded, ours) = found
    assert rounded == pytest.approx(truth, rel=0.05)
    assert float((ours - exact).norm() / exact.norm()) < 0.1


def test_seeding_keeps_the_decays_wide(tiny_model):
    student = seed(tiny_model().to(torch.bfloat16))
    mixer = student.mixer(0)
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == mixer.gate_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.dt_bias, seed(tiny_model()).mixer(0).dt_bias)


def header(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))["__metadata__"]


def test_a_run(teacher_folder, small_data, tmp_path, monkeypatch):
    """Checkpoints hold what is trained, in float32, and say whose teacher the rest is; the model is in bfloat16."""
    kept: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {}
    save = RunFolder.save_step

    def look(self: RunFolder, stage: str, step: int, tensors) -> None:
        save(self, stage, step, tensors)
        file = self.checkpoints / f"{stage}-step{step:07d}" / TENSORS
        kept[stage] = read_safetensors(file), json.loads(header(file)[ABOUT])

    monkeypatch.setattr(RunFolder, "save_step", look)
    plan = small_run.recipe(frozen="passes", layers="hybrid:4", stage3__recompute="layer")
    recipe = small_run.write_recipe(tmp_path / "small.yaml", plan)
    model = distill(
        str(recipe), teacher=str(teacher_folder), data=(small_data,), out=tmp_path / "run", device="cpu",
        precision="bf16",
    )  # fmt: skip
    teacher = json.loads((tmp_path / "run" / "manifest.json").read_text())["teacher"]
    for stage, names in (("stage1", small_run.STAGE1), ("stage2", small_run.STAGE2), ("stage3", small_run.STAGE2)):
        tensors, about = kept[stage]
        assert {name.split("/")[1].split(".")[3] for name in tensors} == set(names)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert about.pop("sha256") and about.pop("stage") == stage and about.pop("step") == 2
        assert about == {
            "holds": f"what {stage} trains, and its optimizer's state; the rest is the teacher's", "teacher": teacher
        }  # fmt: skip
        finished = tmp_path / "run" / "checkpoints" / stage / TENSORS
        assert {tensor.dtype for tensor in read_safetensors(finished).values()} == {torch.float32}
        assert json.loads(header(finished)[ABOUT])["teacher"] == teacher
    stored = read_safetensors(model / "model.safetensors")
    assert stored["layers.1.mixer.q_proj.weight"].dtype == torch.bfloat16
    assert stored["layers.1.mixer.A_log"].dtype == torch.float32
    frozen = load(teacher_folder).layers[1].mlp.up.weight
    assert torch.equal(stored["layers.1.mlp.up.weight"], frozen.to(torch.bfloat16))
