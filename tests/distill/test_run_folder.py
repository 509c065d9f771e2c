"""The run folder: another run is refused, a killed one is gone on with, no checkpoint is lost on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import small_run
from mmmamba.checkpoints import io, load, resolve, save_hovle
from mmmamba.config_files import from_dict
from mmmamba.data.loader import Skipped
from mmmamba.distill.checked_tensors import TENSORS, restore
from mmmamba.distill.recipe import DistillRecipe
from mmmamba.distill.run_folder import SHOWN, RunFolder, digest
from mmmamba.errors import UserError

PLAN = from_dict(DistillRecipe, small_run.recipe(), where="small")
IDENTITY = {"kind": "distill", "teacher": "abc", "data": ["data.jsonl ×1.0 0123"]}


def open_run(path: Path, *, resume: bool = False, plan: DistillRecipe = PLAN, **identity) -> RunFolder:
    return RunFolder(path, plan, {**IDENTITY, **identity}, resume=resume)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3,), value)}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# ---------------------------------------------------------------------------------------------- whose folder


def test_a_new_run_explains_itself(tmp_path):
    open_run(tmp_path / "run")
    assert names(tmp_path / "run") == ["manifest.json", "recipe.yaml"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY and {"torch", "python", "mmmamba"} <= set(manifest["versions"])
    from mmmamba.distill.recipe import load_recipe

    assert load_recipe(DistillRecipe, tmp_path / "run" / "recipe.yaml") == PLAN


def test_the_same_run_is_gone_on_with_only_when_asked(tmp_path):
    open_run(tmp_path)
    with pytest.raises(UserError, match="holds this run already; add --resume to go on with it, or give another --out"):
        open_run(tmp_path)
    open_run(tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("identity", "what"),
    [({"teacher": "x"}, "other teacher"), ({"data": []}, "other data"), ({"kind": "teach"}, "other kind")],
)
def test_another_run_is_refused(tmp_path, identity, what, resume):
    open_run(tmp_path)
    before = small_run.hashes(tmp_path)
    with pytest.raises(UserError, match=rf"holds another run \({what}\); give another --out"):
        open_run(tmp_path, resume=resume, **identity)
    other = from_dict(DistillRecipe, small_run.recipe(seed=1), where="other")
    with pytest.raises(UserError, match=r"holds another run \(another recipe\)"):
        open_run(tmp_path, resume=resume, plan=other)
    assert small_run.hashes(tmp_path) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / ".thesis.tex.tmp-1").touch()
    for resume in (False, True):
        with pytest.raises(UserError, match=r"is not empty and not a run \(it holds '.*thesis.*'\); give"):
            open_run(tmp_path, resume=resume)
    assert names(tmp_path) == [".thesis.tex.tmp-1", "thesis.tex"]
    with pytest.raises(UserError, match="not written"):
        open_run(tmp_path / "thesis.tex")


def test_a_damaged_manifest_is_named(tmp_path):
    open_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json:1: not JSON"):
        open_run(tmp_path, resume=True)


def test_a_run_killed_before_its_manifest_was_there_starts_again(tmp_path, dead):
    open_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / f".manifest.json.tmp-{dead}").write_text("{")
    open_run(tmp_path, resume=True)
    assert names(tmp_path) == ["manifest.json", "recipe.yaml"]


def test_a_recipe_that_lies_in_the_folder_is_not_replaced(tmp_path):
    """``mmmamba distill runs/mine/recipe.yaml --out runs/mine`` would lose the comments that are in it."""
    (tmp_path / "recipe.yaml").write_text("# why this teacher\nname: mine\n")
    with pytest.raises(UserError, match=r"is not empty and not a run \(it holds 'recipe.yaml'\)"):
        open_run(tmp_path)
    assert (tmp_path / "recipe.yaml").read_text().startswith("# why")


def test_a_finished_model_that_was_changed_is_found_before_the_training(tmp_path, tiny_model):
    run = open_run(tmp_path)
    save_hovle(tiny_model(), None, run.model)
    open_run(tmp_path, resume=True)
    (run.model / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model: holds 'config.json', which was not written here or was changed"):
        open_run(tmp_path, resume=True)
    (run.model / ".mmmamba.json").unlink()  # a run of an earlier version
    open_run(tmp_path, resume=True)
    (run.model / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis.tex', which is no part of a model"):
        open_run(tmp_path, resume=True)


def test_a_digest_depends_on_content_alone():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


# ---------------------------------------------------------------------------------------------- metrics


def entry(stage: str, step: int) -> dict[str, object]:
    return {"stage": stage, "step": step, "loss": step / 7}


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    run = open_run(tmp_path)
    run.cut_metrics("stage1", 0)
    assert run.metrics() == []
    log = [entry(stage, step) for stage in ("stage1", "stage2") for step in (1, 2, 3)]
    for line in log:
        run.log(line)
    assert run.metrics() == log
    run.cut_metrics("stage2", 1)
    assert run.metrics() == log[:4]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_half_a_line_at_the_end_is_forgotten(tmp_path):
    run = open_run(tmp_path)
    run.log(entry("stage1", 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage1", "st')
    assert run.metrics() == [entry("stage1", 1)]
    run.cut_metrics("stage1", 5)
    run.log(entry("stage1", 2))
    assert run.metrics() == [entry("stage1", 1), entry("stage1", 2)]


# ---------------------------------------------------------------------------------------------- checkpoints


def test_the_older_checkpoint_goes_when_the_newer_is_there(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    assert run.last_step("stage1") is None
    run.save_step("stage1", 2, tensors(2))
    seen = []
    monkeypatch.setattr(io, "_rename", lambda temporary, path: seen.append(names(run.checkpoints)) or os.rename(
        temporary, path
    ))  # fmt: skip
    run.save_step("stage1", 10, tensors(10))
    assert "stage1-step0000002" in seen[0], "the older one stays while the newer is written"
    assert names(run.checkpoints) == ["stage1-step0000010"]
    step, found = run.last_step("stage1")
    assert step == 10 and torch.equal(found["a"], tensors(10)["a"])
    assert run.last_step("stage") is None and run.last_step("stage2") is None


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    run.save_step("stage1", 2, tensors(2))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "_write", full)
    with pytest.raises(UserError, match="stage1-step0000004: not written: No space left on device"):
        run.save_step("stage1", 4, tensors(4))
    with pytest.raises(UserError, match="stage1: not written"):
        run.finish("stage1", tensors(4))
    assert names(run.checkpoints) == ["stage1-step0000002"]
    assert open_run(tmp_path, resume=True).last_step("stage1")[0] == 2
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: not written: No space left"):
        run.log(entry("stage1", 1))


def test_a_finished_stage(tmp_path):
    run = open_run(tmp_path)
    assert run.result("stage1") is None
    run.save_step("stage1", 2, tensors(2))
    run.finish("stage1", tensors(3), steps=3)
    assert names(run.checkpoints) == ["stage1"]
    again = open_run(tmp_path, resume=True)
    assert (
        torch.equal(again.result("stage1")["a"], tensors(3)["a"]) and again.manifest["stages"]["stage1"]["steps"] == 3
    )


def test_killed_between_a_stages_result_and_its_clean_up(tmp_path, dead):
    run = open_run(tmp_path)
    run.finish("stage1", tensors(3))
    io.write_atomically(run.checkpoints / "stage1-step0000002", lambda path: path.mkdir())
    (run.checkpoints / f".stage2-step0000002.tmp-{dead}").mkdir()
    (run.path / f".metrics.jsonl.tmp-{dead}").touch()
    open_run(tmp_path, resume=True)
    assert names(run.checkpoints) == ["stage1"] and names(run.path) == ["checkpoints", "manifest.json", "recipe.yaml"]


def test_skipped_samples_are_listed_once(tmp_path, capsys):
    run = open_run(tmp_path)
    run.report_skipped()
    assert capsys.readouterr().err == ""
    bad = [Skipped(i, f"d.jsonl:{i}", f"reason {i}") for i in range(SHOWN + 2)]
    run.skip("stage1", bad[:1])
    again = open_run(tmp_path, resume=True)
    again.skip("stage1", bad[:2])
    again.skip("stage2", bad[1:])
    assert [entry["where"] for entry in again.manifest["skipped"]["stage1"]] == ["d.jsonl:0", "d.jsonl:1"]
    assert len(again.skipped()) == SHOWN + 2
    again.report_skipped()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"skipped {SHOWN + 2} bad samples:" and lines[1] == "  d.jsonl:0: reason 0"
    assert len(lines) == SHOWN + 2 and lines[-1].startswith("  … and 2 more, all in ") and "manifest.json" in lines[-1]


# ---------------------------------------------------------------------------------------------- leftovers of writers


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_leftovers_of_dead_writers_do_not_pile_up(tmp_path, dead, folder):
    target = tmp_path / "model"
    for kind in ("tmp", "old"):
        (tmp_path / f".model.{kind}-{dead}").mkdir()
        (tmp_path / f".model.{kind}-{dead}" / "half").touch()
    target.mkdir() if folder else target.touch()
    living = tmp_path / f".model.tmp-{os.getppid()}"
    living.touch()
    foreign = tmp_path / f".other.tmp-{dead}"
    foreign.touch()
    io.write_atomically(target, lambda path: (path / "new" if folder else path).write_text("new"), folder=folder)
    assert names(tmp_path) == sorted([living.name, foreign.name, "model"])


def test_a_folder_that_was_moved_aside_comes_back(tmp_path, dead, tiny_model):
    """Killed between moving the old model away and putting the new one in its place."""
    from mmmamba.checkpoints import save_hovle

    model = tiny_model()
    save_hovle(model, None, tmp_path / "model", dtype=torch.float32)
    (tmp_path / "model").rename(tmp_path / f".model.old-{dead}")
    assert resolve(tmp_path / "model").is_dir()
    assert torch.equal(load(tmp_path / "model").head.weight, model.head.weight)
    assert names(tmp_path) == ["model"]

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "model").rename(tmp_path / f".model.old-{dead}")
    with pytest.raises(UserError):
        io.write_atomically(tmp_path / "model", fail, folder=True)
    assert load(tmp_path / "model").config == model.config and names(tmp_path) == ["model"]


def test_result_of_a_stage_is_named_when_it_is_damaged(tmp_path):
    run = open_run(tmp_path)
    run.finish("stage1", tensors(3))
    (run.checkpoints / "stage1" / TENSORS).write_bytes(b"x")
    with pytest.raises(UserError, match=r"stage1/tensors.safetensors: truncated or not a safetensors file"):
        run.result("stage1")


# ---------------------------------------------------------------------------------------------- altered folders


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("finished", [False, True], ids=["step", "finished"])
def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path, finished):
    run = open_run(tmp_path)
    kept = {"weight/a": torch.randn(3, 2), "exp_avg/a": torch.randn(3, 2), "step/a": torch.tensor(4.0)}
    run.finish("stage1", kept) if finished else run.save_step("stage1", 4, kept)
    (folder,) = run.checkpoints.iterdir()
    file = folder / TENSORS
    read = (lambda: run.result("stage1")) if finished else (lambda: run.last_step("stage1"))
    assert read() is not None
    whole = file.read_bytes()
    remedy = "run it again into another --out" if finished else rf"remove {folder} to begin stage1 again"
    for at in range(len(whole)):
        flip(file, at, at % 8)
        try:
            found = read()
        except UserError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error), error
            assert str(error).endswith(remedy), error
        else:  # spaces that fill up the header mean nothing
            tensors = found if finished else found[1]
            assert whole[at : at + 1] == b" " and all(torch.equal(tensors[name], kept[name]) for name in kept)
        file.write_bytes(whole)
    for cut in (0, 7, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"tensors\.safetensors: "):
            read()


def test_a_checkpoint_of_another_step_or_stage_is_not_taken(tmp_path):
    run = open_run(tmp_path)
    run.save_step("stage1", 4, tensors(4))
    (run.checkpoints / "stage1-step0000004").rename(run.checkpoints / "stage1-step0000400")
    with pytest.raises(UserError, match="is of step 4, not of 400"):
        run.last_step("stage1")
    (run.checkpoints / "stage1-step0000400").rename(run.checkpoints / "stage2-step0000004")
    with pytest.raises(UserError, match="is of stage 'stage1', not of 'stage2'"):
        run.last_step("stage2")


def test_a_checkpoint_of_an_earlier_version_is_taken(tmp_path):
    run = open_run(tmp_path)
    folder = run.step_folder("stage1", 4)
    folder.mkdir(parents=True)
    io.write_safetensors(folder / TENSORS, tensors(4), {"about": json.dumps({"holds": "x", "teacher": None})})
    assert torch.equal(run.last_step("stage1")[1]["a"], tensors(4)["a"])
    with pytest.raises(UserError, match=r"tensor 'weight/b' is missing"):
        restore({"b": torch.zeros(3)}, run.last_step("stage1")[1], folder, "weight/")
    with pytest.raises(UserError, match=r"tensor 'a' is \(3,\), expected \(2, 3\)"):  # which copying would spread
        restore({"a": torch.zeros(2, 3)}, run.last_step("stage1")[1], folder)


@pytest.mark.parametrize("key, value, complaint", [
    ("stages", [], "'stages' must be an object"),
    ("stages", {"stage1": 3}, "'stages.stage1' must be an object"),
    ("stages", ..., "'stages' must be there"),
    ("identity", None, "'identity' must be an object"),
    ("skipped", 3, "'skipped' must be an object"),
    ("skipped", {"stage1": [{"where": 3}]}, "'skipped.stage1' must be a list of objects"),
    ("softmax_layers", "0", "'softmax_layers' must be a list of layers"),
    ("fingerprint", 5, "holds another run"),
])  # fmt: skip
def test_an_altered_manifest_is_named(tmp_path, key, value, complaint):
    open_run(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest[key] = value
    if value is ...:
        del manifest[key]
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=complaint):
        open_run(tmp_path, resume=True)


def test_any_cut_of_a_manifest_is_one_line(tmp_path):
    open_run(tmp_path)
    file = tmp_path / "manifest.json"
    whole = file.read_text()
    for cut in range(0, len(whole) - 2, 7):
        file.write_text(whole[:cut])
        with pytest.raises(UserError, match=r"manifest\.json"):
            open_run(tmp_path, resume=True)


@pytest.mark.parametrize("text", ["", "teacher: [", "seed: 1\n", "{}", "seed: 3\nseed: 3\n"])
def test_an_altered_recipe_is_named(tmp_path, text):
    open_run(tmp_path)
    file = tmp_path / "recipe.yaml"
    whole = file.read_text()
    file.write_text(text if text != "seed: 1\n" else whole.replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        open_run(tmp_path, resume=True)
    file.write_text(whole)
    open_run(tmp_path, resume=True)


@pytest.mark.parametrize("line", ["3", "{}", '{"stage": 1, "step": 2}', '{"stage": "stage1", "step": "2"}', "{", "NaN"])
def test_an_altered_log_is_named(tmp_path, line):
    run = open_run(tmp_path)
    run.log(entry("stage1", 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        run.cut_metrics("stage1", 1)
