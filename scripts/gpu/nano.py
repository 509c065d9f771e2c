"""Make the shipped models on one GPU: teachers, then the students of every nano recipe, then their evaluation.

    python scripts/gpu/nano.py teach  --minutes 6 --keep OUT      # nano-teacher and pico-teacher, side by side
    python scripts/gpu/nano.py distil --keep OUT                  # the four nano recipes, two families side by side
    python scripts/gpu/nano.py eval   --keep OUT

Everything is a plain ``mmmamba`` command line, printed before it runs; each run resumes where it stopped. ``--minutes``
picks the number of steps from the speed of the first ones, to fit a time limit; the recipes hold what was chosen.
What is finished is installed among the package's assets, students as deltas in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "src" / "mmmamba" / "assets"
LOGS = ROOT / "runs" / "logs"
DATA = "data/nano-large"
PROBE = 80  # steps that tell the speed; the first half pays for compilation


def start(name: str, *command: str) -> subprocess.Popen[bytes]:
    """Start a Python command, its output in a log of that name."""
    print("+", *command, flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("ab") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=file,
                                stderr=subprocess.STDOUT)  # fmt: skip


def mmmamba(name: str, *arguments: str) -> subprocess.Popen[bytes]:
    return start(name, "-m", "mmmamba", *arguments)


def finish(**running: subprocess.Popen[bytes]) -> None:
    """Wait for all, show the end of each log, and fail if one failed."""
    for name, process in running.items():
        process.wait()
        lines = (LOGS / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"--- {name} (exit {process.returncode})", *lines[-4:], sep="\n", flush=True)
    failed = [name for name, process in running.items() if process.returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def install(name: str, keep: str | None) -> None:
    """Put a finished model among the assets (a student as a delta), and pack it with its metrics into ``keep``."""
    run, asset = ROOT / "runs" / name, ASSETS / name
    shutil.rmtree(asset, ignore_errors=True)
    if "teacher" in name:
        shutil.copytree(run / "model", asset)
    else:
        code = (
            "import sys, torch; from mmmamba.checkpoints import load, save_student; "
            "save_student(load(sys.argv[1]), sys.argv[2], teacher=sys.argv[3], delta=True, dtype=torch.bfloat16)"
        )
        teacher = json.loads((run / "manifest.json").read_text())["teacher"]["path"]
        finish(**{f"install-{name}": start(f"install-{name}", "-c", code, str(run / "model"), str(asset), teacher)})
    if keep:
        with tarfile.open(Path(keep) / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(asset, name)
            archive.add(run / "metrics.jsonl", f"{name}.metrics.jsonl")


def build() -> None:
    finish(data=mmmamba("data", "data", "build", "--out", DATA, "--scale", "20"))


def teach(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    build()
    print(f"data: {time.monotonic() - began:.0f} s", flush=True)
    # The encoded caches are made once, by the first run that wants them.
    finish(cache=mmmamba("cache", "teach", "nano-teacher", "--out", "runs/cache", "--set", "train.steps=1", "--set",
                         "train.compile=false"))  # fmt: skip
    print(f"cache: {time.monotonic() - began:.0f} s", flush=True)
    few = ["--set", "data.workers=5"]
    pico = mmmamba("pico-teacher", "teach", "pico-teacher", "--resume", *few)
    steps: list[str] = []
    if arguments.minutes:
        finish(probe=mmmamba("probe", "teach", "nano-teacher", "--out", "runs/probe", *few, "--set",
                             f"train.steps={PROBE}", "--set", f"train.log_every={PROBE // 2}"))  # fmt: skip
        last = json.loads((ROOT / "runs/probe/metrics.jsonl").read_text().splitlines()[-1])
        rate = PROBE // 2 * last["tokens_per_s"] / last["tokens"]
        steps = ["--set", f"train.steps={int(arguments.minutes * 60 * rate / 500) * 500}"]
        print(f"{rate:.1f} steps/s: {steps}, {time.monotonic() - began:.0f} s", flush=True)
    nano = mmmamba("nano-teacher", "teach", "nano-teacher", "--resume", *few, *steps)
    finish(**{"pico-teacher": pico})
    install("pico-teacher", arguments.keep)
    finish(**{"nano-teacher": nano})
    install("nano-teacher", arguments.keep)
    print(f"all: {time.monotonic() - began:.0f} s", flush=True)


def distil(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    build()
    extra = [x for item in arguments.set for x in ("--set", item)]
    for kind in ("linear", "hybrid"):  # the hybrid takes stages 1 and 2 from the linear run beside it
        names = [name.format(kind) for name in arguments.recipes]
        finish(**{name: mmmamba(name, "distill", name, "--resume", *extra) for name in names})
        print(f"{kind}: {time.monotonic() - began:.0f} s", flush=True)
        for name in names:
            install(name, arguments.keep)


def evaluate(arguments: argparse.Namespace) -> None:
    running = {}
    for name in arguments.models:
        against = [] if "teacher" in name else ["--against", "nano-teacher"]
        running[f"eval-{name}"] = mmmamba(f"eval-{name}", "eval", name, *against, "--data-dir", DATA, "--limit",
                                          str(arguments.limit), "--overwrite")  # fmt: skip
    finish(**running)
    if arguments.keep:
        for name in arguments.models:
            for file in ("results.md", "results.json"):
                shutil.copy(ROOT / f"runs/eval-{name}/{file}", Path(arguments.keep) / f"eval-{name}.{file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("teach", "distil", "eval"))
    parser.add_argument("--minutes", type=float, help="fit the nano teacher's training into this time")
    parser.add_argument("--keep", help="folder for the results worth keeping")
    parser.add_argument("--limit", type=int, default=200, help="questions an ability")
    parser.add_argument("--set", action="append", default=[], help="recipe keys to change, e.g. stage3.lr=1e-3")
    parser.add_argument("--recipes", nargs="*", default=["nano-{}", "nano-{}-paper"])
    parser.add_argument("--models", nargs="*", default=["nano-teacher", "nano-linear", "nano-hybrid",
                                                        "nano-linear-paper", "nano-hybrid-paper"])  # fmt: skip
    arguments = parser.parse_args()
    {"teach": teach, "distil": distil, "eval": evaluate}[arguments.what](arguments)


if __name__ == "__main__":
    main()
