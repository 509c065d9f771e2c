"""Links in a stranger's model folder: which of them may be followed where the content ends up in a folder of ours."""

from __future__ import annotations

from pathlib import Path

from mmmamba.errors import UserError


def refuse_foreign_link(file: Path) -> Path:
    """Refuse a file of a model folder that is a link to somewhere else; ``file`` otherwise.

    Such a link would have anything that lies on this machine copied under a harmless name. A hub's cache is made of
    links, ``snapshots/REVISION/NAME`` to ``blobs/HASH`` of the same repository; and a folder may be made of links to
    another model's folder, that of its ``config.json``. Those lead nowhere else.

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
