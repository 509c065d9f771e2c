"""Checks where a verb may write, before its work begins, and records which files of a folder it wrote.

A verb replaces only files that it wrote. A folder of reports records them in :data:`LEDGER`: the name of each file, the
verb that wrote it, and the hash of its content. A file that is not listed, or was changed since, belongs to the user.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json

LEDGER = ".mmmamba.json"


def check_folder(out: Path, option: str = "--out", *, read: Iterable[Path] = ()) -> None:
    """Refuse a folder that can't be made or written, or that is inside a folder that is ``read``.

    Raises:
        UserError: naming ``out`` and what is wrong with it.
    """
    kind = _kind(out, option)
    if kind not in ("", "a folder"):
        raise UserError(f"{out}: is {kind}; {option} takes a folder")
    for source in read:
        if any(same(place, source) for place in (out, *out.absolute().parents)):
            raise UserError(f"{out}: lies in {source}, which is read; give another {option}")
    _check_writable(out)


def check_file(
    out: Path, option: str = "--out", *, read: Iterable[Path] = (), overwrite: bool = False, flag: str = "--overwrite"
) -> None:
    """Refuse a file that exists (unless it may be replaced), can't be written, or is one that is ``read``.

    Raises:
        UserError: naming ``out`` and what is wrong with it.
    """
    kind = _kind(out, option)
    if kind not in ("", "a file"):
        raise UserError(f"{out}: is {kind}; {option} takes a file")
    for source in read:
        if same(out, source) or (kind and source.is_dir() and _inside(out, source)):
            where = "is" if same(out, source) else f"lies in {source},"
            raise UserError(f"{out}: {where} what is read; give another {option}")
    if kind and not overwrite:
        also = f", or pass {flag} to replace it" if flag else ""
        raise UserError(f"{out}: is there already; give another {option}{also}")
    _check_writable(out.parent)


def same(one: Path, other: Path) -> bool:
    """Whether both name the same file or folder, also by a link, a relative path, or another case."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _inside(path: Path, folder: Path) -> bool:
    return any(same(parent, folder) for parent in path.resolve().parents)


def _kind(path: Path, option: str) -> str:
    """What is there: '' (nothing), 'a folder', 'a file', or words for something that can't be written to."""
    if "\0" in str(path):
        raise UserError(f"{option}: a path can't hold a null character")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else ""
    except NotADirectoryError:
        return ""  # the check for a writable place will name what is in the way
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device or a pipe")


def _check_writable(folder: Path) -> None:
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(NotADirectoryError):
            if place.exists() or place.is_symlink():
                break
    if not place.is_dir():
        raise UserError(f"{folder}: can't be made: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: can't be written: {place} is read-only")


class Ledger:
    """The files in ``folder`` that ``verb`` writes.

    Args:
        folder: there or not.
        verb: who writes.
    """

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb = folder, verb
        self._path = folder / LEDGER
        self._entries = _read(self._path)

    def check(
        self, names: Iterable[str], *, otherwise: str, read: Iterable[Path] = (), overwrite: bool = False
    ) -> None:
        """Refuse, before any work, to replace files that the verb did not write.

        Args:
            names: the files that will be written.
            otherwise: what a user can do instead.
            read: files that are read. They are never replaced.
            overwrite: replace other files with these names.

        Raises:
            UserError: naming the file.
        """
        sources = list(read)
        for name in names:
            path = self.folder / name
            if not os.path.lexists(path):
                continue
            if any(same(path, source) for source in sources):
                raise UserError(f"{path}: is what is read, and would be replaced; {otherwise}")
            if path.is_symlink() or not path.is_file():
                raise UserError(f"{path}: is a {'link' if path.is_symlink() else 'folder'}, not a file; {otherwise}")
            if not overwrite and not self.wrote(name):
                why = "was changed since" if self._is_listed(name) else "was not written by"
                raise UserError(f"{path}: {why} mmmamba {self.verb}{' wrote it' * self._is_listed(name)}; {otherwise}")

    def wrote(self, name: str) -> bool:
        """Whether the file is as this verb wrote it. (If the process was killed, any state counts.)"""
        entry = self._entries.get(name)
        if entry is None or entry["by"] != self.verb:
            return False
        return entry["sha256"] is None or entry["sha256"] == file_hash(self.folder / name)

    def _is_listed(self, name: str) -> bool:
        return name in self._entries and self._entries[name]["by"] == self.verb

    def write(self, files: Mapping[str, bytes | Callable[[Path], object]], *, keep: Iterable[str] = ()) -> None:
        """Write the files in this order, and remove those that the verb wrote earlier and does not write now.

        Args:
            files: name → content, or a function that writes it to a path.
            keep: names of earlier files that stay.
        """
        # A lazy import: checkpoints are above data, which uses this module.
        from mmmamba.checkpoints.io import write_atomically

        stale = [
            name for name in self._entries if name not in files and name not in set(keep) and self._is_listed(name)
        ]
        gone = [name for name in stale if self.wrote(name)]
        # In progress: whatever a killed process leaves under these names is ours.
        self._entries |= {name: {"by": self.verb, "sha256": None} for name in files}
        self._save()
        for name, content in files.items():
            write = content if callable(content) else _bytes(content)
            write_atomically(self.folder / name, write)
            self._entries[name]["sha256"] = file_hash(self.folder / name)
        for name in stale:
            if name in gone:
                (self.folder / name).unlink(missing_ok=True)
            del self._entries[name]
        self._save()

    def _save(self) -> None:
        from mmmamba.checkpoints.io import write_atomically

        text = json.dumps({"written": self._entries}, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self._path, lambda path: path.write_text(text, encoding="utf-8"))


def record(folder: Path, verb: str) -> None:
    """Leave a ledger of all files in a folder that was just written as a whole."""
    entries = {
        path.name: {"by": verb, "sha256": file_hash(path)} for path in sorted(folder.iterdir()) if path.name != LEDGER
    }
    text = json.dumps({"written": entries}, indent=1, ensure_ascii=False) + "\n"
    (folder / LEDGER).write_text(text, encoding="utf-8")


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def file_hash(path: Path) -> str:
    """sha256 of a file; '' if it is missing or can't be read. A pipe is not opened: that could wait for ever."""
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a ledger. None if it is missing or damaged; then no file counts as ours."""
    try:
        found = read_json(path, limit=MAX_DATA_BYTES)["written"]
    except (UserError, KeyError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: entry for name, entry in found.items()
        if Path(name).name == name and isinstance(entry, dict) and {"by", "sha256"} <= set(entry)
    }  # fmt: skip
