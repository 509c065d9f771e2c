"""Bad input at the command line: one clear line that names file, line or field, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import small_run
from mmmamba import cli
from mmmamba.checkpoints import load


class Setup:
    """A recipe, a teacher and data of one test's own, free to be broken."""

    def __init__(self, folder: Path, teacher: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.teacher = shutil.copytree(teacher, folder / "teacher")
        cached = shutil.ignore_patterns(".cache")  # by other tests of the same data
        self.data = shutil.copytree(data.parent, folder / "data", ignore=cached) / data.name
        self.out = folder / "runs" / "run"
        self.plan = small_run.recipe(**{f"stage{i}__steps": 3 for i in (1, 2, 3)})

    def command(self) -> list[str]:
        recipe = small_run.write_recipe(self.folder / "recipe.yaml", self.plan)
        shared = ["--teacher", str(self.teacher), "--data", str(self.data), "--out", str(self.out), "--device", "cpu"]
        return ["distill", str(recipe), *shared]

    def distill(self, *more: str) -> tuple[int, list[str]]:
        """Exit code, and the lines on stderr that are not progress."""
        code = cli.main([*self.command(), *more])
        lines = self.capsys.readouterr().err.splitlines()
        return code, [line for line in lines if not line.startswith(("stage1: ", "stage2: ", "stage3: ", "encoding "))]

    def refused(self, *more: str) -> str:
        """The one line of a refusal."""
        code, lines = self.distill(*more)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.data.read_text().splitlines()]

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.out / "manifest.json").read_text())


@pytest.fixture
def setup(tmp_path, teacher_folder, small_data, capsys) -> Setup:
    return Setup(tmp_path, teacher_folder, small_data, capsys)


# ---------------------------------------------------------------------------------------------- samples

BAD_LINE = 4  # of data.jsonl, whose record has the picture 3.png


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has that many pixels, and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def change_line(change: Callable[[dict[str, Any]], object]) -> Callable[[Setup], None]:
    def spoil(setup: Setup) -> None:
        records = setup.records()
        change(records[BAD_LINE - 1])
        small_run.write_jsonl(setup.data, records)

    return spoil


def replace_line(text: str) -> Callable[[Setup], None]:
    def spoil(setup: Setup) -> None:
        lines = setup.data.read_text().splitlines()
        lines[BAD_LINE - 1] = text
        setup.data.write_text("\n".join(lines) + "\n")

    return spoil


def change_picture(change: Callable[[Path], object]) -> Callable[[Setup], None]:
    return lambda setup: change(setup.data.parent / "3.png") and None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


SPOILT: dict[str, tuple[Callable[[Setup], None], str]] = {
    "not JSON": (replace_line("{'id': 1}"), "not JSON: "),
    "half a line": (replace_line('{"id": "s3", "conversat'), "not JSON: "),
    "wrong from": (
        change_line(lambda r: r["conversations"][0].update({"from": "user"})),
        "'conversations[0].from' must be one of human, gpt, system, got 'user'",
    ),
    "two questions": (
        change_line(lambda r: r["conversations"][1].update({"from": "human"})),
        "'conversations[1].from' must be 'gpt' here, got 'human'",
    ),
    "no conversation": (change_line(lambda r: r.pop("conversations")), "'conversations' is missing"),
    "missing picture": (change_picture(lambda path: path.unlink() or True), "'image': no such file: "),
    "truncated picture": (change_picture(truncate), "'image': damaged or unsupported picture ("),
    "empty picture": (change_picture(lambda path: path.write_bytes(b"")), "'image': empty file (zero bytes): "),
    "no pixels": (change_picture(lambda path: path.write_bytes(png_header(0, 0))), "'image': "),
    "50,000 x 50,000": (
        change_picture(lambda path: path.write_bytes(png_header(50_000, 50_000))),
        "larger than 20,000 pixels a side or 64 megapixels",
    ),
    "no picture": (change_picture(lambda path: path.write_text("hello")), "not a picture of a kind that is read"),
    "more marks": (
        change_line(lambda r: r["conversations"][0].update({"value": "<image><image> ?"})),
        "'conversations' has 2 <image> marks for 1 images",
    ),
    "marks without pictures": (
        change_line(lambda r: r.update({"conversations": small_run.conversation("<image> ?", "1")}) or r.pop("image")),
        "'conversations' has 1 <image> marks for 0 images",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_sample_stops_the_run_by_name(setup, name):
    spoil, reason = SPOILT[name]
    spoil(setup)
    line = setup.refused()
    assert line.startswith(f"{setup.data}:{BAD_LINE}: ") and reason in line, line


@pytest.mark.parametrize("option", ["data.workers=2", "data.cache=true"])
@pytest.mark.parametrize("name", ["not JSON", "50,000 x 50,000"])
def test_so_it_does_from_a_worker_and_from_a_cache(setup, name, option):
    spoil, reason = SPOILT[name]
    spoil(setup)
    line = setup.refused("--set", option)
    assert line.startswith(f"{setup.data}:{BAD_LINE}: ") and reason in line, line


@pytest.mark.parametrize("option", ["data.workers=0", "data.workers=2", "data.cache=true"])
def test_bad_samples_can_be_skipped_counted_and_listed(setup, option):
    for name in ("missing picture", "wrong from"):
        SPOILT[name][0](setup)
    replacement = setup.data.read_text().splitlines()
    replacement[0] = "no JSON"
    setup.data.write_text("\n".join(replacement) + "\n")
    code, lines = setup.distill("--on-bad-sample", "skip", "--set", option)
    assert code == 0 and lines[0] == "skipped 2 bad samples:" and len(lines) == 3
    assert sorted(line.split(": ")[0] for line in lines[1:]) == [f"  {setup.data}:1", f"  {setup.data}:{BAD_LINE}"]
    skipped = setup.manifest()["skipped"]
    assert {entry["where"] for stage in skipped.values() for entry in stage} == {
        f"{setup.data}:1",
        f"{setup.data}:{BAD_LINE}",
    }
    reasons = [entry["reason"] for entry in skipped["stage1"] if entry["where"].endswith(f":{BAD_LINE}")]
    assert reasons == ["'conversations[0].from' must be one of human, gpt, system, got 'user'"]


def test_a_set_without_one_good_sample_trains_nothing_and_says_so(setup):
    setup.data.write_text("a\nb\n")
    line = setup.refused("--on-bad-sample", "skip")
    why = "stage1: none of its 3 steps had a good sample, so nothing was trained; one of the bad: "
    assert line.startswith(f"{why}{setup.data}:") and "not JSON" in line


def test_teach_stops_and_skips_too(setup):
    SPOILT["not JSON"][0](setup)
    recipe = small_run.write_recipe(setup.folder / "teach.yaml", small_run.teach_recipe(setup.data, train__steps=3))
    command = ["teach", str(recipe), "--device", "cpu", "--out"]
    assert cli.main([*command, str(setup.folder / "a")]) == 2
    lines = [line for line in setup.capsys.readouterr().err.splitlines() if not line.startswith("teach: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {setup.data}:{BAD_LINE}: not JSON: ")
    assert cli.main([*command, str(setup.folder / "b"), "--on-bad-sample", "skip"]) == 0
    lines = setup.capsys.readouterr().err.splitlines()
    assert lines[-2] == "skipped 1 bad sample:" and lines[-1].startswith(f"  {setup.data}:{BAD_LINE}: not JSON")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such data file"), (b"", "holds no sample"), (b"\n\n", "holds no sample")]
)
def test_no_data(setup, content, message):
    setup.data.unlink()
    if content is not None:
        setup.data.write_bytes(content)
    assert setup.refused() == f"{setup.data}: {message}"


def test_a_source_of_a_recipe_that_is_not_there(setup):
    recipe = setup.folder / "recipe.yaml"
    setup.plan["data"]["root"] = str(setup.folder / "data")
    setup.plan["data"]["sources"] = [{"path": "data.jsonl"}, {"path": "more/x.jsonl"}]
    small_run.write_recipe(recipe, setup.plan)
    assert cli.main(["distill", str(recipe), "--teacher", str(setup.teacher), "--out", str(setup.out)]) == 2
    (line,) = setup.capsys.readouterr().err.splitlines()
    assert line == f"error: {setup.folder / 'data' / 'more' / 'x.jsonl'}: no such file"


def test_a_cache_that_cannot_be_written(setup, monkeypatch):
    (setup.data.parent / ".cache").touch()
    line = setup.refused("--set", "data.cache=true")
    assert "cannot write the cache: " in line and "data.cache=false" in line
    (setup.data.parent / ".cache").unlink()
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **options: Any) -> None:
        if self.name == ".cache":
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only file system" in setup.refused("--set", "data.cache=true")
    assert setup.distill("--set", "data.cache=false")[0] == 0


# ---------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage1__stepz": 3}, "unknown key 'stage1.stepz' (did you mean 'steps'?)"),
        ({"mixer": {"gate_bais": True}}, "unknown key 'mixer.gate_bais' (did you mean 'gate_bias'?)"),
        ({"stage2__steps": "many"}, "'stage2.steps' must be int, got 'many' (str)"),
        ({"stage3__train": "conv"}, "'stage3.train' must be a list of str, got 'conv' (str)"),
        ({"stage3__train": ["o_prok"]}, "'stage3': train: unknown kind of parameter 'o_prok', must be among A_log,"),
        ({"stage3__train": ["attention"]}, "stage3.train: the student has no 'attention' of its own (no layer keeps"),
        ({"layers": "hybrid"}, "layers must be 'linear', 'hybrid:K', 'measured:K' or a list, got 'hybrid'"),
        ({"layers": [5]}, "layers names layer 5, the teacher has 0…4"),
    ],
)
def test_a_mistake_in_a_recipe(setup, changes, message):
    small_run.changed(setup.plan, **changes)
    line = setup.refused()
    assert message in line and line.startswith((f"{setup.folder / 'recipe.yaml'}: ", "recipe small: "))


def test_a_recipe_that_is_no_yaml_or_not_there(setup):
    (setup.folder / "bad.yaml").write_text("name: [1,\nteacher: x")
    for recipe, message in (("bad.yaml", "bad.yaml"), ("missing.yaml", "no such recipe file; built-in recipes: ")):
        assert cli.main(["distill", str(setup.folder / recipe)]) == 2
        (line,) = setup.capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("option", ["stage1.stepz=3", "stage1.steps=x", "stage1.steps"])
def test_a_wrong_override(setup, option):
    assert "stage1.step" in setup.refused("--set", option)


# ---------------------------------------------------------------------------------------------- teachers


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


NORM = "language_model.model.norm.weight"
BAD_TEACHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights (model.safetensors, "),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json:1: not JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "missing tensor": (change_weights(lambda t: t.pop(NORM)), f"1 missing tensor ({NORM})"),
    "extra tensor": (change_weights(lambda t: t.update(x=torch.ones(1))), "1 unexpected tensor (x)"),
    "wrong shape": (
        change_weights(lambda t: t.update({NORM: torch.ones(63)})),
        f"1 tensor of the wrong shape ({NORM} is (63,), expected (64,))",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "truncated or not a safetensors file",
    ),
    "not there": (shutil.rmtree, "is neither a folder nor a built-in model"),
}


@pytest.mark.parametrize("name", BAD_TEACHERS)
def test_a_bad_teacher_folder(setup, name):
    spoil, reason = BAD_TEACHERS[name]
    spoil(setup.teacher)
    line = setup.refused()
    assert str(setup.teacher) in line and reason in line, line
    assert not setup.out.exists()


# ---------------------------------------------------------------------------------------------- output folders


def test_an_output_folder_that_holds_something_else(setup):
    assert setup.distill()[0] == 0
    before = small_run.hashes(setup.out)
    assert setup.refused().endswith("holds this run already; add --resume to go on with it, or give another --out")
    setup.plan["seed"] = 1
    for more in ([], ["--resume"]):
        assert setup.refused(*more) == f"{setup.out}: holds another run (another recipe); give another --out"
    assert small_run.hashes(setup.out) == before
    setup.out = setup.folder / "data"
    foreign = min(entry.name for entry in setup.out.iterdir())
    said = f"{setup.out}: is not empty and not a run (it holds '{foreign}'); give another --out"
    assert setup.refused("--resume") == said


def test_an_output_folder_that_cannot_be_made(setup):
    (setup.folder / "runs").write_text("a file")
    assert str(setup.out) in setup.refused()


FULL_DISK = """
import resource, sys
from mmmamba import cli
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file may grow past this
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_full_disk_leaves_the_last_checkpoint(setup, what):
    """The system refuses a write half way, as on a full disk; with room again, --resume ends where it would have."""
    # Of the tiny model, stage 1's checkpoint has 290 KB, stage 2's 780 KB, the model 1.2 MB.
    limit, left = {"checkpoint": (600_000, "stage2: 1/3"), "model": (1_000_000, "stage3: 3/3")}[what]
    setup.plan["stage1"]["checkpoint_every"] = setup.plan["stage2"]["checkpoint_every"] = 2
    command = setup.command()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *command],
        capture_output=True,
        text=True,
        env=small_run.ENVIRONMENT,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith(f"error: {setup.out}/") and ": not written: " in lines[-1], lines
    assert "File too large" in lines[-1] and [line for line in lines if line.startswith("error")] == lines[-1:]
    assert any(line.startswith(left) for line in lines), lines
    assert not list(setup.out.rglob(".*")), "no half-written file is left"
    kept = sorted(path.name for path in (setup.out / "checkpoints").iterdir())
    assert kept == {"checkpoint": ["stage1"], "model": ["stage1", "stage2", "stage3"]}[what]
    assert setup.distill("--resume")[0] == 0
    resumed = (setup.out / "model" / "model.safetensors").read_bytes()
    setup.out = setup.folder / "elsewhere" / "run"
    assert setup.distill()[0] == 0
    assert load(setup.out / "model").config.layer_map == ("mamba2",) * 5
    if torch.get_num_threads() == 1:  # sums of several threads come in another order than the process above had
        assert (setup.out / "model" / "model.safetensors").read_bytes() == resumed


# ---------------------------------------------------------------------------------------------- the other verbs


def test_eval_and_chat_name_what_is_wrong(setup):
    SPOILT["truncated picture"][0](setup)
    evaluation = ["eval", str(setup.teacher), "--data", str(setup.data), "--out", str(setup.folder / "e")]
    picture = str(setup.data.parent / "3.png")
    for command, names in (
        (evaluation, f"{setup.data}:{BAD_LINE}: 'image': damaged"),
        (["chat", str(setup.teacher), "what ?", "--image", picture], picture),
        (["chat", str(setup.folder / "nothing"), "what ?"], "is neither a folder nor a built-in model"),
    ):
        assert cli.main([*command, "--device", "cpu"]) == 2
        errors = [line for line in setup.capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and names in errors[0]


def test_a_picture_as_large_as_allowed_is_fine(setup):
    Image.new("RGB", (2000, 20), "red").save(setup.data.parent / "3.png")
    assert setup.distill()[0] == 0
