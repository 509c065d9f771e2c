"""What a report was made on: versions, device, commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmmamba.version import __version__

SOURCES = Path(__file__).resolve().parents[3]  # the checkout, if this package is run from one


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the figures of a report depend on: machine, versions, the number format of the weights, the commit."""
    cuda = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else f"{_processor()}, {_threads()}",
        "memory": f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB" if cuda else "",
        "weights": str(dtype).removeprefix("torch."),
        "mmmamba": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": str(torch.version.cuda) if cuda else "",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return {name: value for name, value in found.items() if value}


def commit(root: Path = SOURCES) -> str:
    """The commit of the sources in ``root``, and whether they were changed since; '' where they are no checkout."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return ""

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = ask("rev-parse", "--short=12", "HEAD")
    return f"{name}, changed" if name and ask("status", "--porcelain", "--untracked-files=no", "--", "src") else name


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
