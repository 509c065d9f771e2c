"""Links in a model folder from somebody else: which may be followed when files are copied to a folder of ours."""

from __future__ import annotations

from pathlib import Path

from mmmamba.errors import UserError


def refuse_foreign_link(file: Path) -> Path:
    """Refuse a file of a model folder that links to another place. Returns ``file`` otherwise.

    Such a link could get any file of this machine copied under a harmless name. Two kinds of links are allowed. The
    cache of a hub links ``snapshots/REVISION/NAME`` to ``blobs/HASH`` of the same repository. And a folder may consist
    of links into another model's folder, the one that has its ``config.json``.

    Raises:
        UserError: naming the file.
    """
    folder = file.parent.resolve()
    allowed = [folder, (file.parent / "config.json").resolve().parent]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    target = file.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(f"{file}: is a link that leads out of the model's folder: put the file there itself")
    return file
