"""What a command prints through: streams that are closed, full or poor in characters; and what is never obeyed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import small_run
from mmmamba import cli
from mmmamba.errors import LONGEST, UserError, printable
from mmmamba.evaluation.evaluate import compare
from mmmamba.evaluation.plots import Curve, ability_bars, loss_curves
from mmmamba.evaluation.suite import own_suite
from mmmamba.evaluation.tables import print_report
from mmmamba.inference import chat
from mmmamba.progress import Progress, Terminal
from mmmamba.report.plot_style import label, new_figure, render
from mmmamba.report.table import show, table_of

SOURCES = Path(__file__).parents[1] / "src" / "mmmamba"
# What must never mean anything: to a terminal, to rich, to matplotlib, to whoever reads lines.
HOSTILE = ["[/ocr]", "[red]x", ":smile:", "$\\frac{$", "$a$", "_under", "a\x1b]0;title\x07\x1b[31mred", "one\ntwo",
           "中", "\u202edrow", "\\", "", " ", "x" * 300]  # fmt: skip


def command(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A shell's line, with ``mmmamba`` in place of M."""
    run = f"{sys.executable} -m mmmamba"
    return subprocess.run(
        re.sub(r"\bM\b", run, line), shell=True, capture_output=True, timeout=60, executable="/bin/bash",
        env={**small_run.ENVIRONMENT, **environment},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- text of others


@pytest.mark.parametrize(("text", "shown"), [
    ("plain, ünï 中 🙂", "plain, ünï 中 🙂"), ("a\nb\r\tc", "a\\nb\\r\\tc"), ("\x1b[31m", "\\x1b[31m"),
    ("\x9b31m\x7f\0", "\\x9b31m\\x7f\\x00"), ("\u202eabc\u2028", "\\u202eabc\\u2028"), ("caf\udce9", "caf\\xe9"),
    ("\ud800", "\\ud800"), ("\U000e0041", "\\U000e0041"),
])  # fmt: skip
def test_printable(text, shown):
    assert printable(text) == shown == printable(printable(text))
    assert str(UserError(f"x: {text}")) == f"x: {shown}"


@pytest.mark.parametrize("text", ["x" * 10**6, "\x1b" * 10**6, "\n" * 1001, "中" * LONGEST + "end"])
def test_a_message_has_a_bounded_length(text):
    said = str(UserError(f"first: {text} last"))
    assert len(said) <= LONGEST and said.startswith("first: ") and said.endswith(" last") and "characters) …" in said
    assert str(UserError("e" * LONGEST)) == "e" * LONGEST


def test_tables_and_progress_show_text_as_it_is():
    for text in HOSTILE:
        file = io.StringIO()
        console = Terminal(file=file, force_terminal=True, color_system=None, width=4000)
        show(table_of(text, ("", text), [(text, 1), (text, None)]), console)
        with Progress(text, 2, console=console, interval=0) as bar:
            bar.note(text)
            bar.update(1, what=text)
        console.print(f"printed {text}")
        assert printable(text, 200).rstrip() in file.getvalue()
        assert not re.search(r"[^\x20-\x7e\n\u2500-\u257f\u2588中…]", file.getvalue()), repr(file.getvalue())


def test_every_console_is_one_that_obeys_nothing():
    """Markup in data can't be escaped at each use: some are forgotten. No console of ours knows any."""
    users = [path.name for path in SOURCES.rglob("*.py") if re.search(r"\bConsole\b|rich\.markup", path.read_text())]
    assert users == ["progress.py"]
    assert re.findall(r"\bConsole\b\)?:?", (SOURCES / "progress.py").read_text())[1] == "Console):"


def test_labels_of_a_figure_are_text_as_it_is(recwarn):
    curves = [Curve(text, "$\\frac{$", [1, 2], [1.0, 0.5]) for text in HOSTILE]
    figure = loss_curves(curves)
    assert render(figure, "svg") and render(figure, "png") and not recwarn.list
    axis = new_figure(5, 5).subplots()
    for text in ("_under", "$a$"):
        axis.plot([1], [1], label=label(text))
    legend = axis.legend()
    assert [one.get_text().strip() for one in legend.get_texts()] == ["_under", r"\$a\$"]
    assert render(axis.figure, "svg")


def test_a_report_shows_hostile_labels_and_abilities(teacher_folder, tmp_path, capsys):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    records = [
        {"conversations": small_run.conversation("<image> red ?", "red"), "image": "a.png", "ability": text}
        for text in filter(str.strip, HOSTILE)
    ]
    suite = own_suite(small_run.write_jsonl(tmp_path / "d.jsonl", records), max_new_tokens=2)
    report = compare({"[/b]$x^$": teacher_folder}, suite, blind=False)
    for terminal in (True, False):
        file = io.StringIO()
        print_report(report, Terminal(file=file, force_terminal=terminal, width=4000, color_system=None))
        shown = file.getvalue()
        assert "[/b]$x^$" in shown and "[/ocr]" in shown and "\x1b" not in shown and "one\\ntwo" in shown
    assert render(ability_bars(report), "svg")


# ---------------------------------------------------------------------------------------------- streams

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")


@pytest.mark.parametrize(("line", "code", "said"), [
    ("M version >&-", 2, "error: standard output is closed"),
    ("M version >&- 2>&-", 2, ""),
    ("M version 2>&- <&- | cat", 0, ""),
    ("PYTHONUNBUFFERED= M version >/dev/full", 2, "error: standard output: No space left on device"),
    ("PYTHONUNBUFFERED=1 M version >/dev/full", 2, "No space left on device"),
    ("M --help 2>/dev/full", 0, ""),
    ("M nothing 2>/dev/full", 2, ""),
    (r"M chat pico-linear $'caf\xe9?'", 2, r"error: argument 3 is not UTF-8 text: 'caf\xe9?'"),
    ("cd $(mktemp -d) && rmdir $PWD && M version", 2, "error: the folder that this runs in was removed"),
    (r"M inspect $'a\xff'", 2, r"error: argument 2 is not UTF-8 text: 'a\xff'"),
])  # fmt: skip
def test_streams_of_a_shell(line, code, said):
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = command(f"set -o pipefail; {line}")
    assert done.returncode == code, done
    assert said.encode() in done.stderr and b"Traceback" not in done.stderr and done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-16"])
def test_a_stream_that_lacks_a_character_gets_another(encoding):
    done = command("M --help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and not done.stderr and "VERB" in done.stdout.decode(encoding)


@pytest.mark.parametrize("columns", ["0", "1", "5", "-3", "x"])
def test_a_terminal_without_room(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["data", "check", "--help"]) == 0
    assert "--max-length" in capsys.readouterr().out


def test_a_table_through_a_poor_stream(small_data, teacher_folder, monkeypatch, capsys):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert cli.main(["data", "check", str(small_data), "--teacher", str(teacher_folder), "--workers", "0"]) == 0
    assert b"samples cut" in out.getvalue() and b"??" in out.getvalue()  # the bars


def test_lines_of_a_conversation_that_are_no_text(teacher_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nred ?\n"), encoding="utf-8"))
    assert cli.main(["chat", str(teacher_folder), "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert "error: this line is not UTF-8 text" in shown.out and shown.out.count("> ") == 3 and not shown.err


def test_a_line_that_never_ends(teacher_folder, monkeypatch, capsys):
    monkeypatch.setattr(chat, "LONGEST_LINE", 1000)
    for text in ("x" * 5000, "red ?\n" + "x" * 5000 + "\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert cli.main(["chat", str(teacher_folder), "--max-new-tokens", "2"]) == 2
        assert capsys.readouterr().err == "error: standard input: a line of more than 1,000 characters\n"


def test_a_notebooks_backend_is_not_asked_for(small_data, teacher_folder, tmp_path):
    asked = f"M eval {teacher_folder} --data {small_data} --max-new-tokens 1 --no-blind --out {tmp_path / 'e'}"
    done = command(asked, MPLBACKEND="module://of_a_notebook.backend")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_a_folder_whose_name_is_no_text(tmp_path, small_data, teacher_folder, monkeypatch, capsys):
    here = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    here.mkdir()
    monkeypatch.chdir(here)
    asked = ["eval", str(teacher_folder), "--data", str(small_data), "--max-new-tokens", "1", "--no-blind"]
    assert cli.main([*asked, "--out", "e"]) == 0 == cli.main(["convert", str(teacher_folder), "out"])
    assert (here / "out" / "model.safetensors").is_file() and "tiny" in (here / "e" / "results.md").read_text()


def test_a_file_that_the_system_refuses_gives_one_line(tmp_path, monkeypatch, capsys):
    """An error of the system that no verb has words for is still one line that names the file."""

    def version() -> None:
        (tmp_path / "a\nb").read_text()

    monkeypatch.setattr(cli, "version", version)
    assert cli.main(["version"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/a\\nb: No such file or directory\n"
