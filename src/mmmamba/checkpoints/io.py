"""Files of a checkpoint: read with clear errors, written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmmamba.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FLOAT32_PARAMETERS = ("A_log", "dt_bias")  # they set decays close to 1, which bf16 can't tell apart


# ---------------------------------------------------------------------------------------------- reading


def read_json(path: str | Path, where: str | Path | None = None) -> dict[str, Any]:
    """The object in a JSON file; ``where`` (default: the path) is what a complaint names."""
    path, where = Path(path), where or path
    if not path.is_file():
        raise UserError(f"{where}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(data, dict):
        raise UserError(f"{where}: must hold a JSON object, got {type(data).__name__}")
    return data


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU as stored."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a folder, and where each came from.

    Attributes:
        tensors: name → tensor, on the CPU as stored.
        path: the weight file, or the index of a sharded one.
        files: name → the file that holds it.
    """

    tensors: dict[str, Tensor]
    path: Path
    files: dict[str, Path]


def weight_files(folder: Path) -> list[Path]:
    """Every weight file of ``folder``, the index of a sharded checkpoint included, sorted by name."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])


def read_weights(folder: str | Path) -> Weights:
    """The weights of a folder: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists."""
    folder = Path(folder)
    single, index = folder / WEIGHTS, folder / INDEX
    if index.is_file():
        return _read_shards(folder, index)
    if not single.is_file():
        raise UserError(f"{folder}: no weights ({WEIGHTS} or {INDEX})")
    tensors = read_safetensors(single)
    return Weights(tensors=tensors, path=single, files=dict.fromkeys(tensors, single))


def _read_shards(folder: Path, index: Path) -> Weights:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: 'weight_map' must map each tensor to its file")
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for name in sorted(set(table.values())):
        shard = folder / name
        if shard.parent != folder or not shard.is_file():
            raise UserError(f"{index}: lists the file '{name}', which is not in {folder}")
        for key, tensor in read_safetensors(shard).items():
            if key in tensors:
                raise UserError(f"{shard}: tensor '{key}' is also in {files[key].name}")
            tensors[key], files[key] = tensor, shard
    lost = [key for key in table if files.get(key) != folder / table[key]]
    if lost:
        raise UserError(f"{index}: {len(lost)} tensors are not in the file that it names ({_first(lost)})")
    return Weights(tensors=tensors, path=index, files=files)


def check_tensors(
    found: Weights, expected: Mapping[str, torch.Size], *, ignore: Iterable[str] = (), reason: Callable[[str], str]
) -> None:
    """Refuse weights that are not exactly what ``config.json`` asks for.

    Args:
        found: what the folder holds.
        expected: name → shape of every tensor that must be there.
        ignore: names that may be there and are not used.
        reason: the likely cause, given the name of a missing or an unexpected tensor ('' when there is none).

    Raises:
        UserError: one line that names the file and counts the missing, unexpected and mis-shaped tensors.
    """
    missing = [name for name in expected if name not in found.tensors]
    extra = [name for name in found.tensors if name not in expected and name not in set(ignore)]
    wrong = [name for name in expected if name in found.tensors and found.tensors[name].shape != expected[name]]
    if not (missing or extra or wrong):
        return
    file = found.files[(wrong or extra)[0]] if wrong or extra else found.path
    parts = []
    if missing:
        parts.append(f"{_count(missing, 'missing tensor')} ({_first(missing)})")
    if extra:
        parts.append(f"{_count(extra, 'unexpected tensor')} ({_first(extra)})")
    if wrong:
        shapes = [f"{n} is {tuple(found.tensors[n].shape)}, expected {tuple(expected[n])}" for n in wrong[:3]]
        more = ", …" if len(wrong) > 3 else ""
        parts.append(f"{_count(wrong, 'tensor')} of the wrong shape ({'; '.join(shapes)}{more})")
    causes = dict.fromkeys(cause for cause in map(reason, missing + extra) if cause)
    because = f": {'; '.join(causes)}" if causes else ""
    raise UserError(f"{file}: does not match {CONFIG}: {', '.join(parts)}{because}")


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------- writing


def write_atomically(path: str | Path, writer: Callable[[Path], object], *, folder: bool = False) -> Path:
    """Write a file or a folder so that a crash or a full disk leaves the old one as it was.

    ``writer`` fills a temporary sibling, which is flushed to the disk and then renamed to ``path``. A file is replaced
    in one step; an existing folder is first moved aside, and :func:`clear_leftovers` puts it back should the process
    be killed just then.

    Args:
        path: where the file or folder ends up; its parents are made.
        writer: called with the temporary path. It creates a file there, or a folder.
        folder: make the temporary folder before ``writer`` is called.

    Returns:
        ``path``.

    Raises:
        UserError: naming ``path``, when the disk is full, the place can't be written, ….
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # replace what it points to, not the link
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, path.name)
        if folder:
            temporary.mkdir()
        writer(temporary)
        _flush(temporary)
        _rename(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}") from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise UserError(f"{path}: not written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # don't hide the error that brought us here
            _remove(temporary)
    return path


_LEFTOVER = re.compile(r"\.(.+)\.(tmp|old)-(\d+)")


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Clear away what killed writers left in ``folder`` (of ``name`` only, if given).

    Half-written siblings are removed. A folder that was moved aside comes back if nothing took its place. What belongs
    to a process of this machine that still lives is left alone.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = _LEFTOVER.fullmatch(entry.name)
        if found is None or name not in (None, found[1]) or _alive(int(found[3])):
            continue
        target = folder / found[1]
        if found[2] == "old" and not target.exists():
            entry.rename(target)
        else:
            _remove(entry)


def _alive(pid: int) -> bool:
    """Whether another process has this number (where that can't be asked without harm: yes).

    Our own number on a leftover is that of an earlier process: in a container every run may have the same one.
    """
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no number that a process can have
        return True
    return True


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in order of their names; each gets its own storage, as the format asks."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.numel() * tensor.element_size()
        own[name] = tensor if alone else tensor.clone()
        seen.add(own[name].untyped_storage().data_ptr())
    save_file(own, path, metadata={"format": "pt"})


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, except the parameters that stay in float32 wherever they are kept."""
    keep = name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS
    return tensor.to(torch.float32 if keep and dtype != torch.float64 else dtype)


def _flush(path: Path) -> None:
    """fsync a file, or a folder with all that is in it."""
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows can't open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    replaces_folder = path.is_dir() and not path.is_symlink()
    if replaces_folder:  # rename() replaces a file, but no folder with something in it
        _remove(old)
        path.rename(old)
    try:
        temporary.replace(path)
    except OSError:
        if replaces_folder:
            old.rename(path)
        raise
    _sync(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
