"""Build the sdist and the wheel, check what is in them, and chat from the wheel in a fresh environment.

    python scripts/dist.py                               # what make dist runs
    python scripts/dist.py --no-chat                     # build and check only: half a minute
    python scripts/dist.py --torch "torch==2.13.0"       # what the fresh environment installs first

The wheel is built from the sdist. The sdist must hold every file that git tracks, so that the tests run from it. The
wheel must hold every file of the package but the READMEs, and nothing else. The fresh environment is made in a
temporary folder, outside the clone. There a built-in student says what it sees in a picture of a red circle. Needs
``pip install 'mmmamba[dist]'``. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUESTION, ANSWER = "What is in the picture?", "red circle"
PICTURE = """
from PIL import Image, ImageDraw
picture = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
picture.save("picture.png")
"""


def build(out: Path) -> tuple[Path, Path]:
    """Build into ``out``; return the paths of the sdist and of the wheel."""
    for old in [*out.glob("mmmamba-*.tar.gz"), *out.glob("mmmamba-*.whl")]:
        old.unlink()
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True)
    [sdist], [wheel] = out.glob("mmmamba-*.tar.gz"), out.glob("mmmamba-*.whl")
    return sdist, wheel


def tracked() -> set[str]:
    """Return every file that git tracks, without the link ``recipes``, whose files are in ``src/mmmamba/recipes``."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


def check_sdist(sdist: Path) -> None:
    """Exit if a tracked file is missing in the sdist."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted(tracked() - names):
        sys.exit(f"{sdist.name} lacks {len(missing)} tracked files: {', '.join(missing[:10])}")
    print(f"{sdist.name}: {len(names)} files, {sdist.stat().st_size / 1e6:.1f} MB; no tracked file is missing")


def check_wheel(wheel: Path) -> None:
    """Exit if the wheel lacks a tracked file of the package, or holds another file."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = (Path(name) for name in tracked() if name.startswith("src/"))
    wanted = {path.relative_to("src").as_posix() for path in package if path.name != "README.md"}
    if different := sorted(wanted ^ names):
        sys.exit(f"{wheel.name} and src/ differ in {len(different)} files: {', '.join(different[:10])}")
    print(
        f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB; the files of the package and no others"
    )


def chat(wheel: Path, torch: str, model: str) -> None:
    """Install the wheel in a fresh environment, ask ``model`` about a picture, and exit if the answer is wrong."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    with tempfile.TemporaryDirectory(prefix="mmmamba-dist-") as name:
        place = Path(name)
        venv.create(place / "venv", with_pip=True)
        python = str(place / "venv" / "bin" / "python")

        def run(*command: str) -> str:
            print("+", shlex.join(command), flush=True)
            done = subprocess.run(command, cwd=place, env=outside, stdout=subprocess.PIPE, text=True, check=True)
            return done.stdout.strip()

        install = (python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input")
        run(*install, *shlex.split(torch))
        run(*install, str(wheel.resolve()))
        run(python, "-c", PICTURE)
        answer = run(str(place / "venv" / "bin" / "mmmamba"), "chat", model, "--image", "picture.png", QUESTION)
    if answer != ANSWER:
        sys.exit(f"{model}, asked about a picture of a {ANSWER}, answered {answer!r}")
    print(f"{model}: {QUESTION} {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder of the sdist and the wheel")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs before the wheel, options included")
    parser.add_argument("--model", default="nano-linear", help="the built-in student that is asked")
    parser.add_argument("--no-chat", action="store_true", help="leave the fresh environment out")
    given = parser.parse_args()
    sdist, wheel = build(given.out)
    check_sdist(sdist)
    check_wheel(wheel)
    if not given.no_chat:
        chat(wheel, given.torch, given.model)


if __name__ == "__main__":
    main()
