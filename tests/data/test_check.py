"""Checking a conversation set: everything wrong is listed, everything counted, the same for any number of workers."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmmamba import cli
from mmmamba.data.check import MAX_LENGTH, check
from mmmamba.data.check_survey import BINS, KINDS, SHOWN, BadList, histogram, kind, quantile, survey
from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.distill.recipe import DataConfig, SourceConfig
from mmmamba.errors import UserError
from small_run import conversation, make_data, run, write_jsonl

SCORED = conversation("how many red circles are there ?", "one")


def picture(path: Path, width: int = 112, height: int = 56) -> Path:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four good samples, one of them too long, among every kind of bad one; lines 5 and 17 are blank."""
    whole = picture(tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    lines: list[Any] = [
        {"id": "a", "image": "good.png", "conversations": SCORED},
        {"id": "b", "conversations": SCORED + SCORED},
        {"id": "a", "conversations": conversation("short ?", "long " * 200)},
        {"id": 7, "image": ["good.png", "good.png"], "conversations": SCORED},
        "",
        {"image": "torn.png", "conversations": SCORED},
        {"image": "empty.png", "conversations": SCORED},
        {"image": "text.jpg", "conversations": SCORED},
        {"image": "nowhere.png", "conversations": SCORED},
        '{"conversations": [',
        "[1, 2]",
        {"id": "c"},
        {"conversations": SCORED[:1]},
        {"conversations": conversation("long " * 200, "never reached")},
        {"id": "b", "image": "good.png", "conversations": conversation("long " * 200 + "<image>", "one")},
        {"conversations": conversation("<image> and <image>", "two pictures")},
        "",
        {"conversations": [{"from": "user", "value": "who ?"}, SCORED[1]]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


REASONS = {
    6: "'image': damaged or unsupported picture",
    7: "'image': empty file (zero bytes)",
    8: "'image': not a picture of a kind that is read",
    9: "'image': no such file",
    10: "not JSON: ",
    11: "the line must be a JSON object, got a list",
    12: "'conversations' is missing",
    13: "'conversations' has no 'gpt' turn, so nothing is scored",
    14: "nothing is scored within max_length 100",
    15: "'image': the image tokens do not fit into max_length 100",
    16: "'conversations' has 2 <image> marks for 0 images",
    18: "'conversations[0].from' must be one of human, gpt, system, got 'user'",
}


@pytest.fixture
def found(mixed: Path, teacher_folder: Path, tmp_path: Path) -> dict[str, Any]:
    with pytest.raises(UserError, match=r"mixed\.jsonl: 12 of 16 samples are bad; all are listed in .*check\.json$"):
        check(mixed, teacher=str(teacher_folder), workers=0, max_length=100, out=tmp_path / "out")
    return json.loads((tmp_path / "out" / "check.json").read_text())


def test_every_bad_sample_is_listed_with_its_line_and_reason(found: dict[str, Any]) -> None:
    listed = {bad["line"]: bad["reason"] for bad in found["bad_samples"]}
    assert list(listed) == list(REASONS)
    for line, reason in REASONS.items():
        assert listed[line].startswith(reason), line
    assert sum(found["bad_kinds"].values()) == found["bad"] == 12


def test_counts_are_those_of_the_samples_encoded_one_by_one(
    found: dict[str, Any], mixed: Path, tiny_processor: Any
) -> None:
    dataset = JsonlDataset(mixed)
    whole = [tiny_processor.encode(dataset[row]) for row in range(4)]
    fitted = [tiny_processor.encode(dataset[row], max_length=100) for row in range(4)]
    assert (found["samples"], found["good"]) == (16, 4)
    assert (found["images"], found["turns"]) == (3, 10)
    assert found["tokens"] == sum(len(one.input_ids) for one in fitted)
    assert found["scored_tokens"] == sum((one.labels != -100).sum() for one in fitted)
    assert found["scored_share"] == pytest.approx(found["scored_tokens"] / found["tokens"], abs=1e-6)
    assert found["lengths"]["largest"] == max(len(one.input_ids) for one in whole)
    assert found["lengths"]["median"] == sorted(len(one.input_ids) for one in whole)[1]
    assert found["tiles"]["largest"] == max(len(one.tiles) for one in whole)
    assert found["cut"]["samples"] == 1
    assert found["cut"]["tokens"] == sum(one.cut for one in fitted) == len(whole[2].input_ids) - 100
    assert found["nothing_scored"] == 2


def test_ids_that_come_twice_are_named_whether_good_or_bad(found: dict[str, Any]) -> None:
    examples = [{"id": "a", "lines": [1, 3]}, {"id": "b", "lines": [2, 15]}]
    assert found["duplicates"] == {"ids": 2, "samples": 4, "examples": examples}


def test_the_report_is_the_same_for_any_number_of_workers(
    found: dict[str, Any], mixed: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    lines = mixed.read_text().splitlines(keepends=True)
    long = mixed.with_name("long.jsonl")
    long.write_text("".join(lines * 4))  # several chunks
    seen = []
    for workers in (0, 1, 2):
        out = tmp_path / f"out{workers}"
        with pytest.raises(UserError, match="48 of 64 samples are bad"):
            check(long, teacher=str(teacher_folder), workers=workers, max_length=100, out=out)
        report = json.loads((out / "check.json").read_text())
        assert report.pop("speed")["workers"] == workers
        seen.append((report, (out / "check.svg").read_bytes(), (out / "check.png").read_bytes()))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0]["cut"]["tokens"] == 4 * found["cut"]["tokens"]


def test_the_report_folder(found: dict[str, Any], tmp_path: Path) -> None:
    names = {".mmmamba.json", "check.json", "check.md", "check.png", "check.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    page = (tmp_path / "out" / "check.md").read_text()
    assert "![Histograms](check.svg)" in page and "mixed.jsonl:18 |" in page
    assert "<svg" in (tmp_path / "out" / "check.svg").read_text()
    with Image.open(tmp_path / "out" / "check.png") as image:
        assert image.width > image.height


def test_speed_is_measured(found: dict[str, Any]) -> None:
    speed = found["speed"]
    assert speed["samples_a_minute_a_worker"] >= speed["samples_a_minute"] > 0  # reading is all that a worker does
    took = [one["seconds"] for one in speed["slowest"]]
    assert took == sorted(took, reverse=True) and len(took) == 5


def test_a_good_set_ends_in_silence(
    teacher_folder: Path, small_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["data", "check", str(small_data), "--teacher", str(teacher_folder), "--workers", "0", "--out", str(out)]
    assert cli.main(args) == 0
    printed = capsys.readouterr()
    assert "6 good, 0 bad" in printed.out and "█" in printed.out and "What is wrong" not in printed.out
    assert "error" not in printed.err
    assert json.loads((out / "check.json").read_text())["bad_samples"] == []


def test_from_the_command_line(mixed: Path, teacher_folder: Path) -> None:
    done = run("data", "check", mixed, "--teacher", teacher_folder, "--workers", "2", "--max-tiles", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {mixed}: 10 of 16 samples are bad"  # nothing is too long here
    assert f"{mixed}:18" in done.stdout and "Traceback" not in done.stderr


def test_the_terminal_shows_the_first_ones_only(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "bad.jsonl", [{"conversations": []}] * (SHOWN + 5))
    with pytest.raises(UserError, match=f"{SHOWN + 5} of {SHOWN + 5} samples are bad"):
        check(file, teacher=str(teacher_folder), workers=0, out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("bad.jsonl:") == SHOWN and f"the first {SHOWN} of {SHOWN + 5}" in printed
    assert len(json.loads((tmp_path / "out" / "check.json").read_text())["bad_samples"]) == SHOWN + 5
    assert "`check.json` lists every bad sample" in (tmp_path / "out" / "check.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "--workers must be from 0 to 128, got -1"),
        ({"workers": 10**6}, "--workers must be from 0 to 128"),
        ({"max_length": 0}, "--max-length must be at least 1, got 0"),
        ({"max_tiles": 0}, "--max-tiles must be at least 1, got 0"),
        ({"teacher": "nobody"}, "nobody"),
    ],
)
def test_a_wrong_request_ends_before_anything_is_read(
    options: dict[str, Any], message: str, small_data: Path, teacher_folder: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check(small_data, **{"teacher": str(teacher_folder), **options})


def test_files_that_are_no_set(tmp_path: Path, teacher_folder: Path, small_data: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no sample"):
        check(empty, teacher=str(teacher_folder))
    with pytest.raises(UserError, match=r"none\.jsonl: no such data file"):
        check(tmp_path / "none.jsonl", teacher=str(teacher_folder))
    with pytest.raises(UserError, match="is a file; --out takes a folder"):
        check(small_data, teacher=str(teacher_folder), out=empty)


def test_an_error_of_no_one_sample_ends_the_reading(
    tiny_processor: Any, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("this model reads a picture as rows of patches, not as tiles")

    monkeypatch.setattr(tiny_processor, "encode", refuse)
    with BadList() as bad, pytest.raises(UserError, match="rows of patches"):
        survey(EncodedSource(JsonlDataset(small_data), tiny_processor), bad)


def test_the_default_length_is_that_of_a_recipe() -> None:
    assert DataConfig(sources=(SourceConfig(path="x"),)).max_length == MAX_LENGTH


def test_kinds_of_badness_are_bounded_and_free_of_particulars() -> None:
    assert kind("'image': no such file: /a/b.png") == kind("'image': no such file: /c d/e.png")
    assert (
        kind("nothing is scored within max_length 64 (the sample takes 99)") == "nothing is scored within max_length N"
    )
    assert kind("'image': 90000x90000 is larger: /a b/c.png") == kind("'image': 80000x70000 is larger: /d.png")
    with BadList() as bad:
        for number in range(KINDS + 10):
            bad.add(number, "".join(chr(ord("a") + int(digit)) for digit in str(number)))
        assert len(bad.kinds) == KINDS + 1 and bad.kinds["anything else"] == 10


def test_histograms() -> None:
    assert histogram({}) == []
    assert histogram({5: 3}) == [(5, 5, 3)]
    assert histogram(Counter([0, 0, 1, 3])) == [(0, 0, 2), (1, 1, 1), (2, 2, 0), (3, 3, 1)]
    random = np.random.default_rng(0)
    for scale in (3, 50, 4000):
        values = Counter(int(value) for value in random.gamma(2, scale, 1000))
        bars = histogram(values)
        assert len(bars) <= BINS and sum(n for _, _, n in bars) == 1000
        for first, last, count in bars:
            assert count == sum(n for value, n in values.items() if first <= value <= last)


def test_one_huge_value_does_not_squeeze_the_others() -> None:
    bars = histogram(Counter([*range(100)] * 10 + [1_000_000]))
    assert len(bars) > 5 and bars[-1][1] >= 1_000_000 and bars[-1][2] >= 1


def test_quantiles() -> None:
    counts = Counter([1, 2, 2, 3, 10])
    assert [quantile(counts, share) for share in (0.0, 0.2, 0.5, 0.8, 1.0)] == [1, 1, 2, 3, 10]
    assert quantile({}, 0.5) is None


def test_no_figure_is_made_of_nothing(teacher_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("broken\nbroken\n")
    with pytest.raises(UserError, match="2 of 2 samples are bad"):
        check(path, teacher=str(teacher_folder), workers=0, out=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found["scored_share"] is None
    for name in ("lengths", "tiles", "cut"):
        assert [found[name][key] for key in ("median", "p90", "p99", "largest")] == [None] * 4, name
    page = (tmp_path / "out" / "check.md").read_text()
    assert "| tokens of a sample | – |" in page and "| tokens | 0 |" in page and "nan" not in page.lower()


def test_samples_that_fit_are_not_cut(teacher_folder: Path, tmp_path: Path) -> None:
    file = make_data(tmp_path)
    check(file, teacher=str(teacher_folder), workers=0, out=tmp_path / "out")
    cut = json.loads((tmp_path / "out" / "check.json").read_text())["cut"]
    assert (cut["samples"], cut["tokens"], cut["histogram"]) == (0, 0, [])
