"""What verbs may write where: places that can't be written, files that are read, and what somebody else wrote."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmmamba.benchmark.report import check_report
from mmmamba.cli import main
from mmmamba.errors import UserError
from mmmamba.outputs import LEDGER, Ledger, check_file, check_folder


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, links by what they point to."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or stat.S_ISREG(path.stat().st_mode)
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must end with one line of complaint; the complaint."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
        return error

    return run


# ---------------------------------------------------------------------------------------------- places


def test_what_is_no_place_for_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for check, path, said in (
        (check_folder, tmp_path / "file", "is a file; --out takes a folder"),
        (check_folder, tmp_path / "file" / "a" / "b", "is not a folder"),
        (check_file, tmp_path / "folder", "is a folder; --out takes a file"),
        (check_file, tmp_path / "file", "is there already; give another --out, or pass --overwrite"),
        (check_file, tmp_path / "file" / "a", "is not a folder"),
        (check_file, Path("/dev/null"), "is a device or a pipe"),
    ):
        with pytest.raises(UserError, match=said):
            check(path)
    for check in (check_folder, check_file):
        for path, said in (
            (tmp_path / "nothing", "is a link to nothing"),
            (tmp_path / "pipe", "is a device or a pipe"),
            (tmp_path / "loop", "symbolic links"),
            (tmp_path / ("x" * 300), "File name too long"),
            (Path("a\0b"), "null character"),
        ):
            with pytest.raises(UserError, match=said):
                check(path)
    check_folder(tmp_path / "new" / "deep")
    check_file(tmp_path / "new" / "file")
    check_file(tmp_path / "file", overwrite=True)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def read_only() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "locked"
        folder.mkdir()
        os.chmod(name, 0o755)
        os.chmod(folder, 0o555)
        yield folder
        os.chmod(folder, 0o755)


def test_a_read_only_place_is_found(read_only: Path) -> None:
    """Asked by somebody who is not root, whom no permission stops."""
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setuid(65534)
        found = 0
        for check, path in ((check_folder, read_only), (check_folder, read_only / "a"), (check_file, read_only / "a")):
            try:
                check(path)
            except UserError as error:
                found += "is read-only" in str(error)
        os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_what_is_read_is_not_written_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in" / "a.jsonl"
    source.parent.mkdir()
    source.touch()
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "other").symlink_to(source.parent)
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.jsonl", "in/../in/a.jsonl", "hard", "soft", "other/a.jsonl"):
        with pytest.raises(UserError, match="what is read"):
            check_file(Path(name), read=[source], overwrite=True)
    with pytest.raises(UserError, match=r"lies in .*, what is read"):
        check_file(Path("in/a.jsonl"), read=[source.parent], overwrite=True)
    check_file(Path("in/new.jsonl"), read=[source.parent])
    for name in ("in", "in/x/y", "other", "other/z"):
        with pytest.raises(UserError, match="which is read"):
            check_folder(Path(name), read=[source.parent])


# ---------------------------------------------------------------------------------------------- ledgers


def test_a_verb_knows_its_own_files(tmp_path: Path) -> None:
    def check(*names: str, verb: str = "eval", overwrite: bool = False) -> None:
        Ledger(tmp_path, verb).check(names, otherwise="choose another", overwrite=overwrite)

    Ledger(tmp_path, "eval").write({"a": b"1", "b": b"2"})
    check("a", "b", "new")
    with pytest.raises(UserError, match="a: was not written by mmmamba bench; choose another"):
        check("a", verb="bench")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(UserError, match="b: was changed since mmmamba eval wrote it"):
        check("a", "b")
    check("b", overwrite=True)
    Ledger(tmp_path, "eval").write({"c": b"3"})
    assert snapshot(tmp_path).keys() == {LEDGER, "b", "c"}, "what was changed is not removed"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "c")
    for name in ("folder", "link"):
        with pytest.raises(UserError, match=f"{name}: is a {name}, not a file"):
            check(name, overwrite=True)


def test_what_a_killed_verb_left_half_written_is_its_own(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ledger(tmp_path, "eval").write({"a": b"1", "b": fails})
    Ledger(tmp_path, "eval").check(["a", "b"], otherwise="")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"written": 1}', '{"written": {"../x": {"by": "eval", "sha256": null}}}', '{"written": {"a": 1}}'],
)
def test_a_ledger_that_is_none_makes_nothing_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text)
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="was not written by"):
        Ledger(tmp_path, "eval").check(["a"], otherwise="")


# ---------------------------------------------------------------------------------------------- verbs


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    (tmp_path / "p.jpg").touch()
    row = {"question_id": 1, "image": "p.jpg", "text": "Is there a dog?", "label": "yes"}
    file = tmp_path / "coco_pope_random.json"
    file.write_text(json.dumps(row) + "\n")
    return file


def test_data_convert_replaces_nothing(pope: Path, tmp_path: Path, refused) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "link").symlink_to(pope)
    before = snapshot(tmp_path)
    for out in (pope, tmp_path / "link", tmp_path / "p.jpg"):
        for flags in ([], ["--overwrite"]):
            read = ("--image-root", tmp_path) if out.name == "p.jpg" else ()
            assert "what is read" in refused("data", "convert", "pope", pope, *read, "--out", out, *flags)
    assert "is there already" in refused("data", "convert", "pope", pope, "--out", tmp_path / "taken")
    assert "is a device" in refused("data", "convert", "pope", pope, "--out", "/dev/null")
    assert snapshot(tmp_path) == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert main(["data", "convert", "pope", str(pope), "--out", str(tmp_path / "taken"), "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["check.md", "check.json", "check.png"])
def test_data_check_replaces_its_own_report_only(tmp_path: Path, refused, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    (tmp_path / "a.jsonl").write_text("{}\n")
    said = refused("data", "check", tmp_path / "a.jsonl", "--teacher", "pico-teacher", "--out", tmp_path / "out")
    assert f"{name}: was not written by mmmamba data check" in said
    assert "is what is read" in refused("data", "check", tmp_path / "out" / name, "--out", tmp_path / "out")
    assert snapshot(tmp_path / "out") == {name: b"mine"}


def test_demo_throws_away_a_demo_only(tmp_path: Path, refused) -> None:
    for name in ("thesis.tex", "report.html", "aligned/mine.txt"):
        out = tmp_path / name.replace("/", "-") / "out"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        for flags in ([], ["--fresh"]):
            assert "give another --out" in refused("demo", "--out", out, *flags)
        assert snapshot(out) == {name: b"mine"}


def test_ablate_bench_and_data_build_replace_their_own_files_only(tmp_path: Path, refused) -> None:
    (tmp_path / "tables.md").write_text("mine")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "report.md").write_text("mine")
    before = snapshot(tmp_path)
    said = refused("ablate", "pico-ablation", "--report", "--out", tmp_path)
    assert "tables.md: was not written by mmmamba ablate" in said
    assert "was not written by mmmamba data build" in refused("data", "build", "--out", tmp_path)
    with pytest.raises(UserError, match=r"report\.md: was not written by mmmamba bench"):
        check_report(tmp_path, overwrite=False)
    assert snapshot(tmp_path) == before
