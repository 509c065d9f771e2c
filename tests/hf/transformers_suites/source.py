"""transformers' own tests, of the installed version: a source distribution that is fetched when it is first needed.

Its ``tests/`` leaves out what only transformers' repository holds. Empty stand-ins take their places: the mixins for
``generate`` (our tests in ``test_generation_demands.py`` ask what they ask) and for exporting, and the fetching of
pictures from the hub, for which there is a local one.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "fetch_hub_objects_for_ci.py": (
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from PIL import Image\n"
        "def url_to_local_path(url, return_url_if_not_found=True):\n"
        "    place = Path(__file__).with_name('picture.png')\n"
        "    if not place.is_file():\n"
        "        Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(place)\n"
        "    return str(place)\n"
    ),
}


class NoSource(Exception):
    """The source distribution can't be had here; says why."""


def unpacked(cache: Path) -> Path:
    """A folder to import ``tests.test_modeling_common`` and the like from; made once, in ``cache``.

    Raises:
        NoSource: it is not in the cache and can't be downloaded.
    """
    root = cache / f"transformers-{transformers.__version__}"
    if not (root / "complete").is_file():
        archive = _download(cache)
        with tarfile.open(archive) as packed:
            for member in packed:
                inside = Path(*Path(member.name).parts[1:])
                source = packed.extractfile(member) if member.isfile() and inside.parts[:1] == ("tests",) else None
                if source is not None and ".." not in inside.parts:
                    _write(root / inside, source.read())
        archive.unlink()
        for name, text in STAND_INS.items():
            _write(root / name, text.encode())
        _write(root / "complete", b"")
    return root


def _download(cache: Path) -> Path:
    wanted = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", "transformers", "--disable-pip-version-check", "--no-input", "-q"]
    command = [sys.executable, "-m", "pip", "download", wanted, *options, "--dest", str(cache)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise NoSource(f"{wanted}: its source did not come within five minutes") from error
    archive = cache / f"transformers-{transformers.__version__}.tar.gz"
    if done.returncode != 0 or not archive.is_file():
        said = done.stderr.strip().splitlines() or ["no file came"]
        raise NoSource(f"{wanted}: its source can't be downloaded: {said[-1]}")
    return archive


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
