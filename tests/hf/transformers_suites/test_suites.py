"""transformers' own tests of models and processors, run on our classes (``make test-all``).

What fails must be named in ``known_failures.py``, and what is named there must fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from known_failures import SUITES, Suite
from source import NoSource, unpacked

HERE = Path(__file__).parent


def run(suite: Suite, source: Path, out: Path) -> dict[str, str]:
    """The outcome of each test: passed, failed, or "skipped: why"."""
    paths = [
        str(source),
        str(HERE),
        str(HERE.parents[1]),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths), "OUTCOMES": str(out)}
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", "-p", "outcomes", "-c", os.devnull, "-q"]
    places = ["--rootdir", str(HERE), "--confcutdir", str(HERE), "--import-mode=importlib", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, *places, str(HERE / suite.file)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=1500)
    assert out.is_file(), done.stdout + done.stderr
    found: dict[str, str] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        report = json.loads(line)
        name, outcome = report["test"], report["outcome"]
        if found.get(name) == "failed":  # of a test with parts, one that fails counts
            continue
        found[name] = f"skipped: {report['reason']}" if outcome == "skipped" else outcome
        if outcome == "failed":
            print(f"{name}: {report['reason'].splitlines()[-1]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.file)
def test_what_transformers_asks(
    suite: Suite, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("parameterized", reason="transformers' tests need it: pip install 'mmmamba[test-all]'")
    assert request.config.cache is not None
    try:
        source = unpacked(request.config.cache.mkdir("transformers-source"))
    except NoSource as why:
        pytest.skip(str(why))
    found = run(suite, source, tmp_path / "outcomes.jsonl")
    failed = {name for name, outcome in found.items() if outcome == "failed"}
    counts = Counter(outcome.partition(":")[0] for outcome in found.values())
    with capsys.disabled():
        print(f"\n{suite.file}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
        for name in sorted(failed & suite.known.keys()):
            print(f"  fails as known: {name}: {suite.known[name]}")
    assert failed == suite.known.keys()
    assert counts["passed"] >= suite.passing
