"""The tree and the wheel stay light: a clone, an installation and every copy to another machine carry them."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = 32 << 20
WHEEL = 20_000_000


def tracked() -> list[Path]:
    """Every file of the checkout that git tracks; none where this is no checkout."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_are_light() -> None:
    files = tracked()
    if not files:
        pytest.skip("not a git checkout")
    size = sum(path.stat().st_size for path in files if not path.is_symlink())
    largest = sorted(((path.stat().st_size, str(path.relative_to(ROOT))) for path in files), reverse=True)[:5]
    assert size <= TREE, f"tracked files take {size / (1 << 20):.1f} MiB; the largest: {largest}"


def test_the_wheel_is_light(tmp_path: Path) -> None:
    """Zipped as a wheel is (deflate): every file of the package, as ``pyproject.toml`` says."""
    package = ROOT / "src" / "mmmamba"
    with zipfile.ZipFile(tmp_path / "wheel.zip", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md":
                wheel.write(path, path.relative_to(package.parent))
    size = (tmp_path / "wheel.zip").stat().st_size
    assert size <= WHEEL, f"the wheel takes {size / 1e6:.1f} MB"
