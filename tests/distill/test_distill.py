"""The whole verb, in this process: what a run leaves, what it borrows from a neighbour, and that teachers stay."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import small_run
from mmmamba.checkpoints import load, read_safetensors
from mmmamba.data.processor import Processor
from mmmamba.distill.checked_tensors import TENSORS
from mmmamba.distill.distill import distill, seeded
from mmmamba.distill.objectives import AlignHeads, MatchLogits
from mmmamba.distill.optimizers import Optimizers
from mmmamba.distill.recipe import DataConfig, SourceConfig
from mmmamba.distill.run_folder import RunFolder
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.distill.training_data import TrainingData
from mmmamba.errors import UserError
from mmmamba.inference.decoder import Decoder
from mmmamba.locks import alone_in
from mmmamba.model import ATTENTION, MAMBA2


def go(out: Path, teacher: Path, data: Path, *, resume: bool = False, **changes: Any) -> Path:
    """Distil a small recipe into ``out``, of two steps a stage."""
    two = {f"stage{i}__steps": 2 for i in (1, 2, 3)}
    plan = small_run.recipe(**{**two, **changes})
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = small_run.write_recipe(out.parent / f"{out.name}.yaml", plan)
    return distill(str(recipe), teacher=str(teacher), data=(data,), out=out, resume=resume, device="cpu")


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def stages(run: Path) -> list[str]:
    """The stages that the run went through itself."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return sorted({json.loads(line)["stage"] for line in lines})


@pytest.fixture(scope="module")
def linear(tmp_path_factory, teacher_folder, small_data) -> Path:
    """A finished linear run. Tests copy it."""
    run = tmp_path_factory.mktemp("linear") / "linear"
    go(run, teacher_folder, small_data)
    return run


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_a_finished_run(linear, teacher_folder):
    files = {str(path.relative_to(linear)) for path in linear.rglob("*") if path.is_file()}
    assert files == {
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        *(f"checkpoints/stage{i}/tensors.safetensors" for i in (1, 2, 3)),
        *(f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")),
        *(f"model/{name}_config.json" for name in ("generation", "preprocessor", "processor")),
        "model/chat_template.jinja",
        "model/.mmmamba.json",
    }
    assert set(manifest(linear)["stages"]) == {"stage1", "stage2", "stage3"}
    student, teacher = load(linear / "model"), load(teacher_folder)
    assert student.config.layer_map == (MAMBA2,) * 5
    ours, theirs = student.state_dict(), teacher.state_dict()
    kept = [name for name in theirs if ".mixer." not in name or "o_proj" in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept), "what is frozen is the teacher's to the bit"
    moved = [name for name in theirs if name not in kept]
    assert not any(torch.equal(ours[name], theirs[name]) for name in moved), "q, k, v were trained"
    assert Processor.from_folder(linear / "model").config == student.config


def test_the_model_is_written_again_by_a_resumed_run(linear, teacher_folder, small_data, tmp_path):
    run = shutil.copytree(linear, tmp_path / "linear")
    before = small_run.hashes(run)
    shutil.rmtree(run / "model")
    go(run, teacher_folder, small_data, resume=True)
    after = small_run.hashes(run)
    del before["manifest.json"], after["manifest.json"]  # names the teacher's place
    assert after == before


def test_the_seeded_control_is_where_a_run_starts(teacher_folder, small_data, tmp_path):
    """No step at all: the student of a run is the seeded one, to the bit."""
    none = {f"stage{i}__steps": 0 for i in (1, 2, 3)}
    model = go(tmp_path / "run", teacher_folder, small_data, layers="hybrid:4", **none)
    seeded(str(tmp_path / "run.yaml"), teacher=str(teacher_folder), out=tmp_path / "control")
    control, untrained = load(tmp_path / "control").state_dict(), load(model).state_dict()
    assert all(torch.equal(control[name], untrained[name]) for name in control) and control.keys() == untrained.keys()


AFTER = {"train": [*small_run.STAGE2, "o_proj"], "steps": 2, "batch_size": 2, "lr": 1e-3}


def test_a_fourth_stage_and_more_than_mixers(linear, teacher_folder, small_data, tmp_path):
    """Stage 3 trains MLPs too, stage 4 W_o on top: both are the student's in its checkpoints and in the model."""
    more = {"stage3__train": [*small_run.STAGE2, "mlp"], "stage4": AFTER, "layers": "hybrid:4"}
    shutil.copytree(linear, tmp_path / "linear")
    model = go(tmp_path / "run", teacher_folder, small_data, **more)
    assert stages(tmp_path / "run") == ["stage3", "stage4"], "an alignment is lent to whatever follows it"
    assert set(manifest(tmp_path / "run")["stages"]) == {f"stage{i}" for i in (1, 2, 3, 4)}
    results = [read_safetensors(tmp_path / "run" / "checkpoints" / f"stage{i}" / TENSORS) for i in (1, 3, 4)]
    assert not any(".mlp." in name or ".o_proj." in name for name in results[0])
    assert all(f"layers.{i}.mlp.up.weight" in results[1] for i in range(5))
    assert set(results[2]) - set(results[1]) == {f"layers.{i}.mixer.o_proj.weight" for i in (1, 2, 3)}
    ours, theirs = load(model).state_dict(), load(teacher_folder).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in results[2].items())
    kept = [name for name in theirs if name not in results[2]]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept) and "layers.0.mixer.q_proj.weight" in kept
    assert not torch.equal(ours["layers.0.mlp.up.weight"], theirs["layers.0.mlp.up.weight"])
    # Stage 3 is what it is without a stage 4; and a finished run's model is written again from its checkpoints.
    del more["stage4"]
    go(tmp_path / "three" / "run", teacher_folder, small_data, **more)
    files = [tmp_path / run / "checkpoints" / "stage3" / TENSORS for run in ("run", "three/run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    before = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    go(tmp_path / "run", teacher_folder, small_data, resume=True, stage4=AFTER, **more)
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("init", ["inherit", "scratch"])
def test_a_run_from_another_start(init, linear, teacher_folder, small_data, tmp_path):
    shutil.copytree(linear, tmp_path / "linear")
    changes = {"init": init, "stage3__train": [*small_run.STAGE2, "o_proj"], "layers": "hybrid:4"}
    model = go(tmp_path / "run", teacher_folder, small_data, **changes)
    assert stages(tmp_path / "run") == ["stage1", "stage2", "stage3"], "another start is another alignment"
    held = read_safetensors(tmp_path / "run" / "checkpoints" / "stage2" / TENSORS)
    assert ("layers.1.mixer.o_proj.weight" in held) == (init == "scratch")
    before = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    go(tmp_path / "run", teacher_folder, small_data, resume=True, **changes)
    assert (model / "model.safetensors").read_bytes() == before


def test_a_student_of_the_delta_rule(teacher_folder, small_data, tmp_path):
    """Every stage moves the new projection and lowers its loss; the model that is left speaks with it."""
    new = {
        f"stage{i}__train": [*names, "beta_proj"]
        for i, names in ((1, small_run.STAGE1), (2, small_run.STAGE2), (3, small_run.STAGE2))
    }
    new |= {f"stage{i}__{key}": value for i in (1, 2, 3) for key, value in (("steps", 6), ("batch_size", 6))}
    model = go(tmp_path / "run", teacher_folder, small_data, mixer={"rule": "gated_delta", "qk_norm": True}, **new)
    student, loss = load(model), {}
    assert all(student.layers[i].mixer.beta_proj.weight.any() for i in range(5))
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        loss.setdefault(line["stage"], []).append(line.get("loss", line.get("kl")))
    for values in loss.values():  # every step sees all six samples
        assert values[-1] < values[0]
    ids = torch.randint(8, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    state = student(ids, return_state=True, max_length=12).state
    decoder = Decoder(student, 1, 12, max_length=12)
    decoder.admit(torch.tensor([0]), state)
    more = torch.tensor([11])
    ours, truth = decoder.step(more, torch.tensor([0])), student(torch.cat([ids, more[None]], 1)).logits[:, -1]
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- the teacher stays


def test_the_teachers_files_are_the_same_after_every_stage(teacher_folder, small_data, tmp_path, monkeypatch):
    before = small_run.hashes(teacher_folder)
    seen = []
    finish = RunFolder.finish

    def checked(self: RunFolder, stage: str, *args: Any, **facts: Any) -> None:
        finish(self, stage, *args, **facts)
        seen.append(stage)
        assert small_run.hashes(teacher_folder) == before, stage

    monkeypatch.setattr(RunFolder, "finish", checked)
    go(tmp_path / "run", teacher_folder, small_data, layers="hybrid:2")
    assert seen == ["stage1", "stage2", "stage3"] and small_run.hashes(teacher_folder) == before


@pytest.mark.parametrize("kind", ["align", "match linear", "match hybrid"])
def test_the_teachers_tensors_are_the_same_after_every_step(kind, teacher_folder, small_data):
    teacher = load(teacher_folder)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = StageConfig(steps=3, batch_size=3, lr=0.1, train=tuple(small_run.STAGE2), weight_decay=0.5)
    layer_map = (ATTENTION, MAMBA2) * 2 + (MAMBA2,) if kind.endswith("hybrid") else None
    student = seed(teacher, layer_map)
    objective = (AlignHeads if kind == "align" else MatchLogits)(teacher, student, config)
    data = DataConfig(sources=(SourceConfig(path=str(small_data)),), workers=0)
    encoded = TrainingData(data, Processor.from_folder(teacher_folder), 0)
    optimizer = Optimizers(objective.trained, objective.rules, config, torch.device("cpu"))
    for rows in encoded.rows(config, 0)(0):
        start = {name: p.detach().clone() for name, p in objective.trained.items()}
        optimizer.zero_grad()
        objective.backward(rows, torch.float32)
        optimizer.step()
        assert not any(torch.equal(p, start[name]) for name, p in objective.trained.items()), "everything moves"
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for name, p in teacher.named_parameters())


def test_a_teacher_that_changes_under_the_run_is_noticed(teacher_folder, small_data, tmp_path, monkeypatch):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    finish = RunFolder.finish

    def meddle(self: RunFolder, stage: str, *args: Any, **facts: Any) -> None:
        finish(self, stage, *args, **facts)
        text = (teacher / "config.json").read_text()
        (teacher / "config.json").write_text(text + " ")

    monkeypatch.setattr(RunFolder, "finish", meddle)
    with pytest.raises(UserError, match="the teacher's files changed while the run was under way"):
        go(tmp_path / "run", teacher, small_data)
    assert not (tmp_path / "run" / "model").exists()


# ---------------------------------------------------------------------------------------------- borrowed stages


def test_a_hybrid_beside_a_linear_run_takes_its_stages_over(linear, teacher_folder, small_data, tmp_path, capsys):
    shutil.copytree(linear, tmp_path / "linear")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")  # no affair of this run
    go(tmp_path / "hybrid", teacher_folder, small_data, layers="hybrid:4", name="hybrid")
    assert f"stages 1 and 2 are those of {tmp_path / 'linear'}" in capsys.readouterr().err
    found = manifest(tmp_path / "hybrid")
    assert [found["stages"][f"stage{i}"].get("from") for i in (1, 2, 3)] == [str(tmp_path / "linear")] * 2 + [None]
    assert stages(tmp_path / "hybrid") == ["stage3"]
    # Alone, it comes to the same students, bit for bit.
    go(tmp_path / "alone" / "hybrid", teacher_folder, small_data, layers="hybrid:4", name="hybrid")
    assert stages(tmp_path / "alone" / "hybrid") == ["stage1", "stage2", "stage3"]
    for part in ("checkpoints/stage2/tensors.safetensors", "model/model.safetensors"):
        borrowed, own = ((tmp_path / run / part).read_bytes() for run in ("hybrid", "alone/hybrid"))
        assert borrowed == own, part
    # And what was borrowed does not hang on the neighbour any more.
    shutil.rmtree(tmp_path / "linear")
    go(tmp_path / "hybrid", teacher_folder, small_data, layers="hybrid:4", name="hybrid", resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"mixer": {"rope": True}},
        {"stage1__lr": 2e-3},
        {"stage2__steps": 3},
        {"data__max_length": 100},
        {"data__max_tiles": 1},
        {"data__on_bad_sample": "skip"},
        {"data": "other bytes"},
        {"data": "another place"},
        {"teacher": "other weights"},
        {"linear": "stage 2 unfinished"},
        {"linear": "checkpoints thrown away"},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_nothing_is_borrowed_when_anything_differs(linear, teacher_folder, small_data, tmp_path, changes):
    run = shutil.copytree(linear, tmp_path / "runs" / "linear")
    data, teacher = small_data, teacher_folder
    changes = dict(changes)
    if "data" in changes:  # relative picture paths: the same bytes elsewhere may show other pictures
        data = shutil.copytree(small_data.parent, tmp_path / "data") / small_data.name
        if changes.pop("data") == "other bytes":
            data.write_text(data.read_text().replace("red", "blue"))
    if changes.pop("teacher", None):
        teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
        (teacher / "config.json").write_text((teacher / "config.json").read_text() + "\n")
    broken = changes.pop("linear", None)
    if broken == "stage 2 unfinished":
        content = manifest(run)
        del content["stages"]["stage2"]
        (run / "manifest.json").write_text(json.dumps(content))
    elif broken:
        shutil.rmtree(run / "checkpoints")
    go(tmp_path / "runs" / "hybrid", teacher, data, layers="hybrid:4", **changes)
    assert stages(tmp_path / "runs" / "hybrid") == ["stage1", "stage2", "stage3"]


# ---------------------------------------------------------------------------------------------- many sources


def test_a_cache_changes_nothing_but_the_time(teacher_folder, small_data, tmp_path):
    folder = shutil.copytree(small_data.parent, tmp_path / "data")
    records = [{"id": "x", "conversations": small_run.conversation(f"{i} ?", "red")} for i in range(3)]
    other = small_run.write_jsonl(folder / "other.jsonl", records)
    sources = [{"path": small_data.name, "weight": 2}, {"path": other.name}]
    models = []
    for cache in (False, True):
        plan = small_run.recipe(data={"root": str(folder), "sources": sources, "cache": cache, "workers": 0})
        path = small_run.write_recipe(tmp_path / f"{cache}.yaml", plan)
        models.append(distill(str(path), teacher=str(teacher_folder), out=tmp_path / f"run-{cache}", device="cpu"))
    assert (models[0] / "model.safetensors").read_bytes() == (models[1] / "model.safetensors").read_bytes()
    assert len(list((folder / ".cache").iterdir())) == 4  # two caches and their locks


# ---------------------------------------------------------------------------------------------- whose folder


def test_a_second_run_in_the_same_folder_is_told_of_the_first(tmp_path, teacher_folder, small_data):
    with alone_in(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"run: is in use by .* \({os.getpid()}\); wait"):
                go(tmp_path / "run", teacher_folder, small_data, resume=resume)
    assert not (tmp_path / "run").exists()


def test_a_run_inside_its_teacher_or_where_nothing_can_be_written_is_refused_at_once(
    tmp_path, teacher_folder, small_data
):
    (tmp_path / "file").touch()
    recipe = small_run.write_recipe(tmp_path / "recipe.yaml", small_run.recipe())
    for place, said in (
        (teacher_folder / "run", "which is read; give another --out"),
        (tmp_path / "file", "is a file; --out takes a folder"),
        (tmp_path / "file" / "run", "is not a folder"),
    ):
        with pytest.raises(UserError, match=said):
            distill(str(recipe), teacher=str(teacher_folder), data=(small_data,), out=place, device="cpu")
