"""A dry run, as a user calls it: it says what a run needs, tries first steps, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import small_run
from mmmamba import cli
from mmmamba.checkpoints import load
from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import Processor
from mmmamba.distill import first_steps
from mmmamba.distill.distill import distill
from mmmamba.distill.gpus import GPUS, LAUNCH
from mmmamba.distill.parameters import parameters_of
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.distill.sample_lengths import SampleLengths, sample_lengths
from mmmamba.distill.seeding import seed
from mmmamba.distill.stage_estimate import estimate_stages
from mmmamba.errors import UserError
from mmmamba.model.geometries import geometry

LARGE = ("hovle-2.6b-linear", "hovle-2.6b-hybrid", "hovle-2.6b-linear-paper", "hovle-2.6b-hybrid-paper")


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: Path, small_data: Path) -> Path:
    plan = small_run.recipe(teacher=str(teacher_folder), data__sources=[{"path": str(small_data)}], layers="hybrid:4")
    return small_run.write_recipe(tmp_path / "small.yaml", plan)


def cells(printed: str, row: str) -> list[str]:
    """The cells of a table's row."""
    line = next(line for line in printed.splitlines() if line.strip().startswith(row))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_from_the_command_line(recipe: Path, tmp_path: Path) -> None:
    before = small_run.hashes(tmp_path)
    done = small_run.run("distill", recipe, "--dry-run", "--gpu", "rtx4090", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert small_run.hashes(tmp_path) == before  # no run folder, no cache
    assert "Work on one rtx4090" in done.stdout and "60% of its matrix rate of 165 TFLOP/s" in done.stdout
    assert "6 samples of 1 sources" in done.stdout
    for stage in ("stage1", "stage2", "stage3"):
        difference = cells(done.stdout.partition("First steps on this CPU")[2], stage)[3]
        assert abs(int(difference.removesuffix(" %"))) <= 40  # of few tokens, where small things count


def test_parameters_are_those_that_the_run_trains(
    recipe: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(str(recipe), dry_run=True, device="cpu")
    printed = capsys.readouterr().out
    plan = load_recipe(DistillRecipe, recipe)
    teacher = load(teacher_folder)
    students = [seed(teacher), seed(teacher), seed(teacher, plan.layer_map(5))]
    trained = [
        sum(p.numel() for p in parameters_of(student, stage.train).values())
        for student, stage in zip(students, (plan.stage1, plan.stage2, plan.stage3), strict=True)
    ]
    everything = [sum(p.numel() for p in student.parameters()) for student in students]
    assert cells(printed, "trained") == [f"{count:,}" for count in trained]
    assert cells(printed, "frozen") == [f"{all_ - moved:,}" for all_, moved in zip(everything, trained, strict=True)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != LARGE[1])) for name in LARGE])
def test_recipes_of_hovles_size_need_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", name, "--dry-run", "--geometry", "hovle-2.6b", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "tokens of a row") == ["8,192"] * 3
    assert cells(printed, "fits h100") == ["yes"] * 3
    peaks = [float(peak) for peak in cells(printed, "peak")]
    assert 8 < peaks[0] < peaks[1] < 20 and peaks[1] < peaks[2] < 40
    assert "teacher's weights, bfloat16" in printed and "bfloat16 passes over bfloat16 weights" in printed
    assert "No real step was taken: there is no GPU here" in printed
    assert not list(tmp_path.iterdir())


def test_a_missing_teacher_says_how_to_estimate_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", "hovle-2.6b-linear", "--dry-run", "--device", "cpu"]) == 2
    assert "(--geometry hovle-2.6b estimates without the folder)" in capsys.readouterr().err


def test_a_config_alone_is_enough(recipe: Path, teacher_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    distill(str(recipe), teacher=str(bare), set=("data.max_length=100",), dry_run=True, device="cpu")


def test_what_a_dry_run_alone_takes(recipe: Path) -> None:
    with pytest.raises(UserError, match="--geometry nano goes with --dry-run"):
        distill(str(recipe), geometry="nano", device="cpu")
    with pytest.raises(UserError, match="--gpu a100 goes with --dry-run"):
        distill(str(recipe), gpu="a100", device="cpu")
    with pytest.raises(UserError, match="no geometry is called 'mano'"):
        distill(str(recipe), geometry="mano", dry_run=True, device="cpu")


def test_a_student_is_no_teacher(recipe: Path) -> None:
    with pytest.raises(UserError, match="layer 0 is mamba2; a teacher has softmax attention in every layer"):
        distill(str(recipe), teacher="pico-linear", dry_run=True, device="cpu")


def test_lengths_are_those_of_the_samples(recipe: Path, teacher_folder: Path, small_data: Path) -> None:
    source = EncodedSource(JsonlDataset(small_data), Processor.from_folder(teacher_folder))
    lengths = [len(source.encode(i).input_ids) for i in range(len(source))]
    size = sample_lengths(load_recipe(DistillRecipe, recipe))
    assert size.mean == pytest.approx(sum(lengths) / 6)
    assert size.length == pytest.approx(sum(n * n for n in lengths) / sum(lengths))
    assert size.longest == max(lengths)


def test_bad_samples_are_passed_over(recipe: Path, tmp_path: Path) -> None:
    file = small_run.make_data(tmp_path / "data")
    file.write_text(file.read_text() + "{}\n")
    size = sample_lengths(load_recipe(DistillRecipe, recipe, [f"data.sources=[{{path: {file}}}]"]))
    assert "6 samples" in size.source and "1 more are bad" in size.source
    file.write_text("{}\n")
    with pytest.raises(UserError, match="none of the samples that were looked at is good"):
        sample_lengths(load_recipe(DistillRecipe, recipe, [f"data.sources=[{{path: {file}}}]"]))


def test_without_data_every_sample_is_full(recipe: Path) -> None:
    plan = load_recipe(DistillRecipe, recipe, ["data.sources=[{path: none.jsonl}]", "data.max_length=100"])
    size = sample_lengths(plan)
    assert (size.mean, size.longest) == (100, 100) and "none.jsonl: no such data file" in size.source


def test_rows_hold_what_micro_tokens_lets_them() -> None:
    plan = load_recipe(DistillRecipe, "nano-linear")
    data = SampleLengths(mean=90.0, length=120.0, longest=3200, source="")
    aligned, _, matched = estimate_stages(plan, geometry("nano"), data, "h100")
    assert aligned.row == plan.stage1.micro_tokens
    assert (aligned.tokens, aligned.rows) == (128 * 90.0, 1.0)
    assert matched.work.stage.layer_local is False and aligned.work.stage.layer_local
    short = SampleLengths(mean=90.0, length=120.0, longest=200, source="")
    assert estimate_stages(plan, geometry("nano"), short, "h100")[0].row == 128 * 200  # no step has more
    assert estimate_stages(plan, geometry("nano"), data, "rtx4090")[0].seconds < 8 * LAUNCH


@pytest.mark.parametrize("where", ["step", "models"])
def test_what_does_not_fit_is_an_error(
    where: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(first_steps, "make_step" if where == "step" else "seed", full)
    monkeypatch.setattr(first_steps, "total_memory", lambda device: GPUS["h100"].memory)
    message = r"stage1: rows of \d+ tokens do not fit" if where == "step" else "mixers alone do not fit into this GPU"
    with pytest.raises(UserError, match=message):
        distill(str(recipe), dry_run=True, device="cpu")
    assert ("did not fit" in capsys.readouterr().out) == (where == "step")


def refusals(recipe: Path, tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What a run refuses, and the words of it."""
    other = tmp_path / "stranger"
    other.mkdir()
    (other / "mine.txt").touch()
    (tmp_path / "file").touch()
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.touch()
    good = Path(load_recipe(DistillRecipe, recipe).data.sources[0].path)
    bad.write_text('{"id": 1, "id": 2}\n' + good.read_text())
    for picture in good.parent.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    return {
        "not a teacher": ({"teacher": "pico-linear"}, "layer 0 is mamba2; a teacher has softmax"),
        "layers": ({"set": ("layers=[9]",)}, "layers names layer 9"),
        "kinds": ({"set": ("layers=linear", "stage3.train=[attention]")}, "the student has no 'attention' of its own"),
        "no data": ({"data": (tmp_path / "none.jsonl",)}, "none.jsonl: no such data file"),
        "no relative data": ({"set": ("data.sources=[{path: mine.jsonl}]",)}, "mine.jsonl: no such file"),
        "a folder": ({"data": (tmp_path,)}, "is a folder, not a file"),
        "empty data": ({"data": (empty,)}, "empty.jsonl: holds no sample"),
        "bad sample": ({"data": (bad,)}, "bad.jsonl:1: the key 'id' appears twice"),
        "stranger's": ({"out": other}, "stranger: is not empty and not a run"),
        "file": ({"out": tmp_path / "file"}, "file: is a file"),
    }


@pytest.mark.parametrize("name", [
    "not a teacher", "layers", "kinds", "no data", "no relative data", "a folder", "empty data", "bad sample",
    "stranger's", "file",
])  # fmt: skip
def test_what_a_run_refuses_a_dry_run_refuses(name: str, recipe: Path, tmp_path: Path) -> None:
    options, words = refusals(recipe, tmp_path)[name]
    for dry in (True, False):
        with pytest.raises(UserError) as error:
            distill(str(recipe), device="cpu", dry_run=dry, **{"out": tmp_path / "run", **options})
        assert words in str(error.value), dry


def test_a_folder_that_holds_a_run_is_refused_too(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = tuple(f"stage{n}.steps=0" for n in (1, 2, 3))
    distill(str(recipe), out=out, set=steps, device="cpu")
    before = small_run.hashes(tmp_path)
    for dry in (True, False):
        with pytest.raises(UserError, match=r"holds (this|a) run already; add --resume"):
            distill(str(recipe), out=out, set=steps, device="cpu", dry_run=dry)
        with pytest.raises(UserError, match=r"holds another run \(another recipe\)"):
            distill(str(recipe), out=out, set=(*steps, "seed=1"), resume=True, device="cpu", dry_run=dry)
    distill(str(recipe), out=out, set=steps, resume=True, device="cpu", dry_run=True)
    assert small_run.hashes(tmp_path) == before
