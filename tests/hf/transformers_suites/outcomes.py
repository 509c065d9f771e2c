"""A pytest plugin: the outcome of each test of a suite as a line of JSON, in the file that OUTCOMES names."""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        line = {"test": "::".join(report.nodeid.split("::")[1:]), "outcome": report.outcome, "reason": reason}
        with open(os.environ["OUTCOMES"], "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
