"""Make the shipped models on one GPU: teachers, then the students of every nano recipe, then their evaluation.

    python scripts/gpu/nano.py data                                       # the sources (the others make them too)
    python scripts/gpu/nano.py teach  --keep OUT                          # nano-teacher
    python scripts/gpu/nano.py teach  --keep OUT --recipes pico-teacher
    python scripts/gpu/nano.py distil --keep OUT                          # the four nano recipes, side by side
    python scripts/gpu/nano.py eval   --keep OUT

Everything is a plain ``mmmamba`` command line, printed before it runs; each run resumes where it stopped. What is
finished is installed among the package's assets, students as rounded deltas, and packed into OUT.
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
    """Put a finished model among the assets (a student rounded), and pack it with its metrics into ``keep``."""
    run, asset = ROOT / "runs" / name, ASSETS / name
    shutil.rmtree(asset, ignore_errors=True)
    if "teacher" in name:
        shutil.copytree(run / "model", asset)
    else:
        code = (
            "import sys, torch; from mmmamba.checkpoints import load, save_student; "
            "save_student(load(sys.argv[1]), sys.argv[2], teacher=sys.argv[3], delta=sys.argv[4], dtype=torch.bfloat16)"
        )
        teacher = json.loads((run / "manifest.json").read_text())["teacher"]["path"]
        form = "mixed" if name.startswith("pico") else "int4"
        words = (str(run / "model"), str(asset), teacher, form)
        finish(**{f"install-{name}": start(f"install-{name}", "-c", code, *words)})
    if keep:
        with tarfile.open(Path(keep) / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(asset, name)
            archive.add(run / "metrics.jsonl", f"{name}.metrics.jsonl")


def overrides(arguments: argparse.Namespace) -> list[str]:
    return [word for item in arguments.set for word in ("--set", item)]


def data(arguments: argparse.Namespace) -> None:
    """The sources, made once; the first run that reads them encodes them into caches beside."""
    finish(data=mmmamba("data", "data", "build", "--out", DATA, "--scale", arguments.scale))


def teach(arguments: argparse.Namespace) -> None:
    data(arguments)
    began = time.monotonic()
    extra = overrides(arguments)
    running = {name: mmmamba(name, "teach", name, "--resume", *extra) for name in arguments.recipes}
    for name, process in running.items():
        finish(**{name: process})
        install(name, arguments.keep)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def distil(arguments: argparse.Namespace) -> None:
    data(arguments)
    began = time.monotonic()
    if (ROOT / "runs/nano-teacher/model").is_dir():  # a teacher made here is the one to distil
        install("nano-teacher", None)
    extra = overrides(arguments)
    for kind in ("linear", "hybrid"):  # a hybrid takes stages 1 and 2 over from a linear run that aligned alike
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
    parser.add_argument("what", choices=("data", "teach", "distil", "eval"))
    parser.add_argument("--keep", help="folder for the results worth keeping")
    parser.add_argument("--scale", default="20", help="size of the sources, where they have to be made")
    parser.add_argument("--limit", type=int, default=200, help="questions an ability")
    parser.add_argument("--set", action="append", default=[], help="recipe keys to change, e.g. stage3.lr=1e-3")
    parser.add_argument(
        "--recipes",
        nargs="*",
        help="teach: teachers to train side by side (default: nano-teacher); "
        "distil: families ({} stands for linear, then hybrid; default: nano-{} nano-{}-paper)",
    )
    parser.add_argument("--models", nargs="*", default=["nano-teacher", "nano-linear", "nano-hybrid",
                                                        "nano-linear-paper", "nano-hybrid-paper"])  # fmt: skip
    arguments = parser.parse_args()
    if not arguments.recipes:
        arguments.recipes = ["nano-teacher"] if arguments.what == "teach" else ["nano-{}", "nano-{}-paper"]
    {"data": data, "teach": teach, "distil": distil, "eval": evaluate}[arguments.what](arguments)


if __name__ == "__main__":
    main()
