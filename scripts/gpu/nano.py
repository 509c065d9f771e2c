"""Make the shipped models on one GPU: teachers, then the students of every nano recipe, then their evaluation.

    python scripts/gpu/nano.py teach  --minutes 6 --keep OUT      # nano-teacher and pico-teacher, side by side
    python scripts/gpu/nano.py distil --keep OUT                  # the four nano recipes, two families side by side
    python scripts/gpu/nano.py eval   --keep OUT

Everything is a plain ``mmmamba`` command line, printed before it runs; each run resumes where it stopped. ``--minutes``
picks the number of steps from the speed of the first 150, to fit a time limit; the recipes hold what was chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = "data/nano-large"


def mmmamba(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start one command of the package, its output in a log file."""
    print("+ mmmamba", *arguments, flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "mmmamba", *arguments], cwd=ROOT, env=environment, stdout=file,
                                stderr=subprocess.STDOUT)  # fmt: skip


def finish(running: dict[str, subprocess.Popen[bytes]], logs: Path) -> None:
    """Wait for all, show the end of each log, and fail if one failed."""
    for name, process in running.items():
        process.wait()
        lines = (logs / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"--- {name} (exit {process.returncode})", *lines[-6:], sep="\n", flush=True)
    failed = [name for name, process in running.items() if process.returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def teach(arguments: argparse.Namespace, logs: Path) -> None:
    names = ["nano-teacher", "pico-teacher"]
    began = time.monotonic()
    finish({"data": mmmamba("data", "build", "--out", DATA, "--scale", "25", log=logs / "data.log")}, logs)
    print(f"data: {time.monotonic() - began:.0f} s", flush=True)
    # The encoded caches are made once, by the first run that wants them.
    cache = mmmamba("teach", names[0], "--out", "runs/cache", "--set", "train.steps=1", log=logs / "cache.log")
    finish({"cache": cache}, logs)
    print(f"cache: {time.monotonic() - began:.0f} s", flush=True)
    steps = {}
    if arguments.minutes:
        probes = {}
        for name in names:
            shutil.rmtree(ROOT / f"runs/speed-{name}", ignore_errors=True)
            probes[name] = mmmamba("teach", name, "--out", f"runs/speed-{name}", "--set", "train.steps=150", "--set",
                                   "train.log_every=50", "--set", "data.workers=5", log=logs / f"{name}.log")  # fmt: skip
        finish(probes, logs)
        left = arguments.minutes * 60
        for name in names:
            last = json.loads((ROOT / f"runs/speed-{name}/metrics.jsonl").read_text().splitlines()[-1])
            steps[name] = int(left * 50 * last["tokens_per_s"] / last["tokens"] / 500) * 500
        print(f"steps: {steps}", flush=True)
    running = {}
    for name in names:
        override = ["--set", f"train.steps={steps[name]}", "--set", "data.workers=5"] if name in steps else []
        running[name] = mmmamba("teach", name, "--resume", *override, log=logs / f"{name}.log")
    try:
        finish(running, logs)
    finally:
        for name in names:
            keep(arguments.keep, name)
    print(f"all: {time.monotonic() - began:.0f} s", flush=True)


def distil(arguments: argparse.Namespace, logs: Path) -> None:
    began = time.monotonic()
    finish({"data": mmmamba("data", "build", "--out", DATA, "--scale", "25", log=logs / "data.log")}, logs)
    extra = [x for item in arguments.set for x in ("--set", item)]
    for kind in ("linear", "hybrid"):  # the hybrid takes stages 1 and 2 from the linear run beside it
        names = [name.format(kind) for name in arguments.recipes]
        running = {name: mmmamba("distill", name, "--resume", *extra, log=logs / f"{name}.log") for name in names}
        finish(running, logs)
        print(f"{kind}: {time.monotonic() - began:.0f} s", flush=True)
        for name in names:
            keep(arguments.keep, name)


def evaluate(arguments: argparse.Namespace, logs: Path) -> None:
    for name in arguments.models:
        against = ["--against", "nano-teacher"] if "teacher" not in name else []
        model = f"runs/{name}/model" if (ROOT / f"runs/{name}/model").is_dir() else name
        finish({name: mmmamba("eval", model, *against, "--data-dir", DATA, "--limit", str(arguments.limit), "--out",
                              f"runs/eval-{name}", "--overwrite", log=logs / f"eval-{name}.log")}, logs)  # fmt: skip
        if arguments.keep:
            shutil.copy(ROOT / f"runs/eval-{name}/results.md", Path(arguments.keep) / f"eval-{name}.md")


def keep(target: str | None, name: str) -> None:
    """Copy what a run is worth keeping for into ``target``."""
    if target is None:
        return
    run = ROOT / "runs" / name
    for path in (run / "metrics.jsonl", *sorted((run / "model").glob("*"))):
        if path.is_file():
            shutil.copy(path, Path(target) / f"{name}.{path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("teach", "distil", "eval"))
    parser.add_argument("--minutes", type=float, help="fit the teachers' training into this time")
    parser.add_argument("--keep", help="folder for the results worth keeping")
    parser.add_argument("--limit", type=int, default=200, help="questions an ability")
    parser.add_argument("--set", action="append", default=[], help="recipe keys to change, e.g. stage3.lr=1e-3")
    parser.add_argument("--recipes", nargs="*", default=["nano-{}", "nano-{}-paper"])
    parser.add_argument("--models", nargs="*", default=["nano-teacher", "nano-linear", "nano-hybrid",
                                                        "nano-linear-paper", "nano-hybrid-paper"])  # fmt: skip
    arguments = parser.parse_args()
    logs = ROOT / "runs" / "logs"
    {"teach": teach, "distil": distil, "eval": evaluate}[arguments.what](arguments, logs)


if __name__ == "__main__":
    main()
