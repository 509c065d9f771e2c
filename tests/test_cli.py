"""The command line: help that teaches, errors in one line, exit codes, and nothing imported before it is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import mmmamba
from mmmamba import cli
from mmmamba.errors import UserError
from mmmamba.progress import Progress, track
from mmmamba.report.table import show, table_of

LEAVES = {
    " ".join(["mmmamba", *words]): verb
    for word, entry in cli.VERBS.items()
    for words, verb in (
        [([word], entry)] if isinstance(entry, cli.Verb) else [([word, sub], verb) for sub, verb in entry.items()]
    )
}


def python(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """``verb(function)`` makes ``function`` the verb 'try'."""

    def install(function: Callable[..., Any]) -> None:
        module = ModuleType("verb_of_a_test")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entry = cli.Verb(
            function="verb_of_a_test:run", summary="a trial", example="mmmamba try x", go_on="run it again"
        )
        monkeypatch.setattr(cli, "VERBS", {**cli.VERBS, "try": entry})

    return install


# ---------------------------------------------------------------------------------------------- the overview


def test_help_lists_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, verb in LEAVES.items():
        assert name.removeprefix("mmmamba ") in out
        assert verb.summary in out
        assert verb.example in out


def test_help_imports_next_to_nothing() -> None:
    code = (
        "import sys, json, mmmamba.cli as c; c.main(['--help']); "
        "print(json.dumps([m for m in ('torch', 'numpy', 'rich', 'tyro', 'PIL') if m in sys.modules]))"
    )
    assert json.loads(python("-c", code).stdout.splitlines()[-1]) == []


def test_verbs_import_what_they_may_need_later_only_then() -> None:
    modules = "mmmamba.distill.distill, mmmamba.evaluation.evaluate, mmmamba.inference.chat"
    later = ("transformers", "accelerate", "matplotlib", "triton", "torch._dynamo")  # PyTorch's compiler alone: 2 s
    code = f"import sys, json, {modules}; print(json.dumps([m for m in {later} if m in sys.modules]))"
    assert json.loads(python("-c", code).stdout.splitlines()[-1]) == []


def test_data_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "mmmamba data VERB" in out
    assert all(word in out for word in ("build", "check", "convert")) and "distill" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: mmmamba needs a verb: teach, distill"),
        (["data"], "error: mmmamba data needs a verb: build, check, convert"),
        (["destill"], "error: mmmamba has no verb 'destill' (did you mean 'distill'?)"),
        (["data", "biuld"], "error: mmmamba data has no verb 'biuld' (did you mean 'build'?)"),
        (["xyzzy"], "error: mmmamba has no verb 'xyzzy' (known: teach, "),
    ],
)
def test_no_such_verb(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize("args", [["version"], ["--version"]])
def test_version(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert f"mmmamba {mmmamba.__version__}\n" in out
    assert "torch " in out


def test_version_agrees_with_the_package() -> None:
    from importlib.metadata import version

    assert version("mmmamba") == mmmamba.__version__


# ---------------------------------------------------------------------------------------------- one verb


@pytest.mark.parametrize("name", LEAVES)
def test_each_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = LEAVES[name].function.partition(":")[0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist yet")
    assert cli.main([*name.split()[1:], "--help"]) == 0
    out = capsys.readouterr().out
    teaching, _, options = out.partition(f"usage: {name} ")
    assert options
    assert f"{name} " in teaching or LEAVES[name].example in teaching, "no worked example"


def example(model: str, question: str | None = None, *, image: tuple[Path, ...] = (), limit: int | None = None,
            source: tuple[str, ...] = ("a", "b"), quiet: bool = False) -> dict[str, Any]:  # fmt: skip
    """Ask a model.

    It teaches::

        more

    Args:
        model: folder or name,
            over two lines.
        image: a picture.

    Returns:
        Nothing that a terminal should read.
    """
    calls.append(locals())
    return {}


calls: list[dict[str, Any]] = []


def test_signature_becomes_command_line(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(example)
    calls.clear()
    assert cli.main(["try", "nano"]) == 0
    assert cli.main(["try", "nano", "--image", "a.png", "--image", "b.png", "why?", "--limit", "3", "--quiet"]) == 0
    assert cli.main(["try", "nano", "--source", "c"]) == 0
    defaults = {"model": "nano", "question": None, "image": (), "limit": None, "source": ("a", "b"), "quiet": False}
    asked = {"question": "why?", "image": (Path("a.png"), Path("b.png")), "limit": 3, "quiet": True}
    assert calls == [defaults, defaults | asked, defaults | {"source": ("c",)}]
    assert capsys.readouterr().out == ""


def test_help_of_a_verb(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(example)
    assert cli.main(["try", "-h"]) == 0
    out = capsys.readouterr().out
    assert "usage: mmmamba try" in out and "MODEL" in out and "[QUESTION]" in out
    assert "It teaches:\n" in out and "mmmamba try x" in out
    assert "folder or name, over two lines." in out and "repeatable; default: a b" in out
    assert "Returns" not in out and "Nothing that" not in out


def test_parsing_calls_nothing(verb: Any) -> None:
    verb(example)
    calls.clear()
    call = cli.parse(["try", "nano", "--limit", "3"])
    assert calls == []
    assert call() == {} and calls[0]["limit"] == 3


@pytest.mark.parametrize("args", [[], ["nano", "--lmit", "3"], ["nano", "--limit", "x"], ["nano", "why?", "more"]])
def test_wrong_usage(args: list[str], verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(example)
    calls.clear()
    assert cli.main(["try", *args]) == 2
    captured = capsys.readouterr()
    assert calls == []
    assert captured.out == ""
    assert "mmmamba try --help" in captured.err


def test_user_error_is_one_line(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("nano.yaml: unknown key 'stepz'")

    verb(fail)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "error: nano.yaml: unknown key 'stepz'\n"


def test_interruption_says_how_to_go_on(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    verb(interrupt)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted: run it again"


def test_our_own_mistakes_keep_their_traceback(verb: Any) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    verb(broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "mmmamba", "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_module_entry_exits_with_the_code() -> None:
    result = python("-m", "mmmamba", "destill")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------- the Python API


def test_api_names_are_lazy_and_listed() -> None:
    assert set(mmmamba.__all__) <= set(dir(mmmamba))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mmmamba.nonsense


@pytest.mark.parametrize("name", mmmamba.__all__)
def test_api_names_resolve(name: str) -> None:
    home = mmmamba._HOME.get(name, "mmmamba:").partition(":")[0]
    if importlib.util.find_spec(home) is None:
        pytest.skip(f"{home} does not exist yet")
    assert callable(getattr(mmmamba, name))


def test_the_verb_distill_from_python() -> None:
    from mmmamba.distill.distill import distill

    assert mmmamba.distill_teacher is distill


# ---------------------------------------------------------------------------------------------- progress and tables


class Terminal:
    """What rich needs to believe in a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_progress_prints_plain_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("stage 1", total=4, start=1, interval=0.0) as bar:
        assert not bar.live
        bar.update(2, loss=0.123456, tokens=100)
        bar.note("[a] note")
        bar.advance(2, loss=2.5e10, tokens=20_000, skipped=12_345, best=True)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3
    assert lines[0].startswith("stage 1: 2/4  loss 0.1235  ") and "tokens/s" in lines[0] and lines[0].endswith(" left")
    assert lines[1] == "[a] note"
    assert "4/4  loss 2.500e+10  skipped 12,345  best True" in lines[2] and " took 0:00" in lines[2]


def test_plain_lines_come_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(1000), "encode")) == list(range(1000))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["encode: 1/1000", "encode: 1000/1000"]
    assert list(track(iter("ab"), "unknown")) == ["a", "b"]
    assert "unknown: 2  " in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal() -> None:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=120, _environ={"TERM": "xterm"})  # type: ignore[arg-type]
    with Progress("stage [1]", total=2, console=console) as bar:
        assert bar.live
        bar.update(1, loss=1.0)
        bar.note("kept")
        bar.update(2, loss=0.5)
    assert "stage [1]" in terminal.text and "2/2" in terminal.text and "loss 0.5" in terminal.text
    assert "kept" in terminal.text


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    show(table_of("nano [x]", ["ability", "score", "n"], [["read [b]", 0.98765, 1000], ["recall" * 30, None, 2]]))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].strip() == "nano [x]"
    assert lines[1].split() == ["ability", "score", "n"]
    assert lines[3].split() == ["read", "[b]", "0.9877", "1,000"]
    assert lines[4].split() == ["recall" * 30, "2"]
