"""The verb: every point is dealt with and written at once, what does not fit is shown, wrong input is one line."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmmamba
from mmmamba import cli
from mmmamba.benchmark import bench as verb
from mmmamba.benchmark.bench import bench, parse_contexts
from mmmamba.benchmark.results import Results
from mmmamba.benchmark.subjects import random_subjects
from mmmamba.checkpoints import load, save_student
from mmmamba.errors import UserError
from mmmamba.inference.decoder import _QUANTIZED
from mmmamba.model import Mamba2Options
from mmmamba.model.geometries import GEOMETRIES
from tiny import make_config

FILES = {f"{name}.{kind}" for name in ("latency", "memory", "throughput", "prefill") for kind in ("png", "svg")}
FILES |= {"results.json", "report.md", "report.html", ".mmmamba.json"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A geometry that takes no time, and as few samples as there can be."""
    monkeypatch.setitem(GEOMETRIES, "tiny", make_config())
    monkeypatch.setitem(verb.SAMPLE_SECONDS, "cpu", 0.0)
    monkeypatch.setattr("mmmamba.benchmark.measure.MOST_SEQUENCES", {"cpu": 3, "cuda": 3})
    monkeypatch.setattr(
        "mmmamba.benchmark.memory.release", lambda device: None
    )  # collecting a test session's garbage takes a while


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a small report's time: where only its points matter, nothing is drawn."""
    monkeypatch.setattr(verb, "write_report", lambda results, folder: folder / "report.html")


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """``ask(**options)`` → the results of ``bench`` on the tiny geometry, in one folder."""

    def call(**options: Any) -> Results:
        given = {"geometry": "tiny", "contexts": "8,32", "report": tmp_path / "report", "device": "cpu", **options}
        return bench(given.pop("models", ()), **given)

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """``refused(words…)`` → the one line that a wrong command line gets."""

    def call(*words: str | Path) -> str:
        assert cli.main(["bench", "--device", "cpu", *map(str, words)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return call


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_whole_report(ask, tmp_path):
    results = ask()
    assert results.complete
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES
    labels = [
        "teacher", "teacher, published style", "teacher, published style, mask", "teacher, int8 weights",
        "linear", "linear, int8 weights", "hybrid", "hybrid, int8 weights",
    ]  # fmt: skip
    assert [one.label for one in results.series] == labels
    # Eight series decode; three read text and pictures; teacher 1, students 2 kinds of state; at two contexts each.
    assert len(results.points) == 2 * (8 + 3 * 2 + 1 + 2 * 2)
    for point in results.points:
        assert point.measured is not None or (point.task.variant, point.task.context) == ("images", 8)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "://" not in page.replace("http://www.w3.org", "")
    assert all(name in page for name in (results.environment["torch"], "published style", "The greatest batch"))
    assert "shorter than the 4 tokens of one tile" not in page


def test_what_is_written_is_what_was_found(ask, tmp_path):
    results = ask(measure=("decode", "batch"))
    found = read(tmp_path / "report")
    assert len(found["points"]) == len(results.points) and found["complete"]
    assert {"device", "torch", "triton", "python", "mmmamba"} <= set(found["environment"])
    linear = results.measured("linear", "decode", 32)
    teacher = results.measured("teacher", "decode", 32)
    assert linear is not None and teacher is not None
    assert linear.state_bytes == results.measured("linear", "decode", 8).state_bytes
    assert teacher.state_bytes == 4 * results.measured("teacher", "decode", 8).state_bytes
    assert results.measured("linear", "batch", 8, "bfloat16").batch == 3
    assert "bounded by 3 sequences" in (tmp_path / "report" / "report.md").read_text()


def test_int8_weights_are_read_by_their_own_points_and_held_beside_the_models(ask, monkeypatch, unwritten):
    seen = []

    def decode(model, **options):
        seen.append(model.int8_steps)
        return real(model, **options)

    gc.collect()
    real, copies = verb.decode, len(_QUANTIZED)
    monkeypatch.setattr(verb, "decode", decode)
    results = ask(measure=("decode",))
    assert seen == [False, False, True, True] * 3
    ours, int8 = (results.measured(label, "decode", 8) for label in ("linear", "linear, int8 weights"))
    assert ours is not None and int8 is not None
    assert ours.bytes / 4 < int8.bytes < ours.bytes and ours.state_bytes == int8.state_bytes
    assert 1 < int8.resident_bytes / ours.resident_bytes < 1.3
    gc.collect()
    assert len(_QUANTIZED) == copies  # they have gone with their models


def test_out_of_memory_is_a_result(ask, monkeypatch, tmp_path):
    asked = []

    def decode(model, *, context, seconds):
        asked.append(context)
        if context > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, context=context, seconds=seconds)

    real = verb.decode
    monkeypatch.setattr(verb, "decode", decode)
    results = ask(contexts="8,16,32", measure=("decode",))
    for label in ("teacher", "linear", "hybrid"):
        assert [results.find(label, "decode", context).oom for context in (8, 16, 32)] == [False, True, True]
    assert asked == [8, 16] * 6  # what is longer than what did not fit is not tried
    assert results.measured("teacher, published style", "decode", 32) is not None
    assert "out of memory" in (tmp_path / "report" / "report.md").read_text()


def test_another_error_is_no_lack_of_memory(ask, monkeypatch, unwritten):
    def decode(*args, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(verb, "decode", decode)
    with pytest.raises(RuntimeError, match="something else"):
        ask(measure=("decode",))


def test_an_interrupted_report_is_gone_on_with(ask, monkeypatch, tmp_path, unwritten):
    calls = []

    def decode(model, *, context, seconds):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(context)
        return real(model, context=context, seconds=seconds)

    real = verb.decode
    with monkeypatch.context() as patch:
        patch.setattr(verb, "decode", decode)
        with pytest.raises(KeyboardInterrupt):
            ask(measure=("decode",))
    before = read(tmp_path / "report")
    assert len(before["points"]) == 1 and not before["complete"]
    results = ask(measure=("decode",), resume=True)
    assert results.complete and len(results.points) == 16
    assert read(tmp_path / "report")["points"][0] == before["points"][0]
    assert read(tmp_path / "report")["rates"] == before["rates"]


def test_a_gpu_in_another_host_goes_on_with_a_report(ask, monkeypatch, refused, unwritten):
    machine = {"device": "a GPU", "torch": "2", "triton": "3", "weights": "float32", "platform": "one"}
    tiny = {"measure": ("decode",), "contexts": "8"}
    for cuda in ({"cuda": "13"}, {}):
        monkeypatch.setattr(verb, "environment", lambda *_, cuda=cuda: {**machine, **cuda})
        ask(**tiny, overwrite=True)
        monkeypatch.setattr(verb, "environment", lambda *_, cuda=cuda: {**machine, **cuda, "platform": "other"})
        if cuda:
            assert ask(**tiny, resume=True).environment["platform"] == "one"
        else:
            with pytest.raises(UserError, match=r"another machine or version \(platform: one, now other\)"):
                ask(**tiny, resume=True)


def test_what_would_take_too_long_or_too_much_is_skipped_and_said(ask, tmp_path):
    results = ask(measure=("prefill",), point_seconds=1e-9)
    assert results.measured("linear", "prefill", 8, "text") is not None
    assert "--point-seconds" in results.find("linear", "prefill", 32, "text").skipped
    results = ask(measure=("decode",), memory=1e-6, overwrite=True)
    assert all("--memory" in point.skipped for point in results.points)
    page = (tmp_path / "report" / "report.md").read_text()
    assert "allowed by --memory" in page
    assert not (tmp_path / "report" / "prefill.png").exists()  # of the report that was replaced


def test_checkpoints_of_one_geometry(ask, teacher_folder, tmp_path, unwritten):
    student = mmmamba.seed(load(teacher_folder), mixer=Mamba2Options(rope=True))
    linear = save_student(student, tmp_path / "mine", teacher=teacher_folder, delta=False)
    results = ask(models=(str(linear),), geometry=None, measure=("decode",), contexts="8")
    assert [one.subject for one in results.series] == ["teacher (random weights)"] * 4 + ["mine"] * 2
    assert [one.kind for one in results.series][-1] == "linear"
    both = ask(
        models=(str(teacher_folder), str(linear)), geometry=None, measure=("decode",), contexts="8", overwrite=True
    )
    assert [one.subject for one in both.series] == [teacher_folder.name] * 4 + ["mine"] * 2
    assert all(point.measured is not None for point in both.points)


def test_contexts():
    assert parse_contexts("1k,103424, 1M,1024,8_192") == [1024, 8192, 103_424, 2**20]
    for wrong in ("1k,many", "", "0", "-5", "1.5k", "k", "1k,,2k", "9" * 18, "9" * 5000):
        with pytest.raises(UserError, match="is not a number of tokens"):
            parse_contexts(wrong)


def test_wrong_input_is_one_line(refused, tmp_path, teacher_folder):
    assert "no geometry is called 'nanno' (did you mean 'nano'?)" in refused("--geometry", "nanno")
    assert "'many' is not a number of tokens" in refused("--geometry", "tiny", "--contexts", "1k,many")
    assert "leave it out, or the models" in refused(teacher_folder, "--geometry", "nano")
    assert "neither a folder nor a built-in model" in refused("no-such-model")
    assert f"two models are called '{teacher_folder.name}'" in refused(teacher_folder, teacher_folder)
    wrong = refused(teacher_folder, "nano-linear")
    assert "different geometries (hidden_size 64 and 256)" in wrong and "nano-linear" in wrong
    for wrong in ("0", "nan", "inf"):
        assert "--memory must be above 0" in refused("--geometry", "tiny", "--memory", wrong)
        assert "--point-seconds must be above 0" in refused("--geometry", "tiny", "--point-seconds", wrong)
    assert "--device quantum" in refused("--geometry", "tiny", "--device", "quantum")


def test_a_folder_of_something_else_is_refused(refused, ask, tmp_path, unwritten, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    tiny = ("--geometry", "tiny", "--contexts", "8", "--measure", "decode", "--report")
    assert "no report of mmmamba bench" in refused(*tiny, other)
    assert "is a file" in refused(*tiny, other / "thesis.txt")
    (other / "results.json").write_text('{"suite": "nano"}')
    assert "was not written by mmmamba bench" in refused(*tiny, other, "--overwrite")
    assert sorted(path.name for path in other.iterdir()) == ["results.json", "thesis.txt"]
    ask(measure=("decode",), contexts="8")
    capsys.readouterr()
    report = tmp_path / "report"
    assert "pass --resume to continue it, or --overwrite" in refused(*tiny, report)
    assert "pass one of them" in refused(*tiny, report, "--resume", "--overwrite")
    assert "another request (prefill_chunk: 16384, now 16)" in refused(
        *tiny, report, "--resume", "--prefill-chunk", "16"
    )
    results = read(report)
    results["environment"]["device"] = "another one"
    (report / "results.json").write_text(json.dumps(results))
    assert "another machine or version (device: another one, now " in refused(*tiny, report, "--resume")
    results["points"][0]["wrong"] = 1
    (report / "results.json").write_text(json.dumps(results))
    assert "unknown key 'points" in refused(*tiny, report, "--resume")


def test_networks_that_read_text_only_have_no_pictures(ask, monkeypatch, unwritten):
    config = replace(make_config(), vision=None)
    monkeypatch.setitem(GEOMETRIES, "text", config)
    results = ask(geometry="text", measure=("prefill",), contexts="8")
    assert {point.task.variant for point in results.points} == {"text"}


def test_random_weights_have_the_formats_of_loaded_ones():
    hybrid = random_subjects("tiny")[2]
    model = hybrid.open(torch.device("cpu"), torch.bfloat16, seed=0)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide and all(name.endswith(("A_log", "dt_bias")) for name in wide)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert model(torch.arange(8, 40)[None]).logits.isfinite().all()
