"""Files of a checkpoint: read with clear errors, written atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmmamba.checkpoints.pickles import read_pickle
from mmmamba.device import host_bytes
from mmmamba.errors import UserError
from mmmamba.jsonfile import parse_json, read_json
from mmmamba.model.mixers import float32_names

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"

MAX_HEADER = 100_000_000  # bytes of a safetensors file's header: the format's own limit

# ---------------------------------------------------------------------------------------------- reading


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU as stored."""
    path = Path(path)
    _check_header(path)
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    with _opened(Path(path)) as stored:
        return stored.metadata() or {}


def read_with_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file, read at once into memory that they share, and the texts in its header."""
    path = Path(path)
    with _opened(path) as stored:  # the header is sound, and the file as long as it says
        texts = stored.metadata() or {}
        whole = host_bytes(path.stat().st_size)
        with path.open("rb") as file:  # quicker than page by page through the map
            file.readinto(whole.numpy().data)
    begin = 8 + int.from_bytes(whole[:8].numpy().tobytes(), "little")
    tensors = {}
    for name, entry in parse_json(whole[8:begin].numpy().tobytes(), path).items():
        if name != "__metadata__":
            dtype, (first, last) = _dtype(path, name, entry["dtype"]), entry["data_offsets"]
            part = whole[begin + first : begin + last]
            part = part.clone() if (begin + first) % dtype.itemsize else part
            tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors, texts


class Weights(Mapping[str, Tensor]):
    """The tensors of weight files: shapes are known at once, data is read when a tensor is asked for.

    A tensor read is the caller's own memory and finite throughout; nothing else stays in memory, so that a checkpoint
    of any size can be read tensor by tensor.

    Args:
        path: the weight file, or the index of a sharded checkpoint: what a complaint about the whole names.
        files: every file, in the order in which they are searched for duplicates.

    Raises:
        UserError: for a file that is truncated, no weight file, or has a tensor that another has.
    """

    described = CONFIG  # what says which tensors there must be

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self.path = path
        self.files: dict[str, Path] = {}
        self._headers: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._pickle: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            for name, header in self._read_header(file).items():
                if name in self.files:
                    raise UserError(f"{file}: tensor '{name}' is also in {self.files[name].name}")
                self.files[name], self._headers[name] = file, header

    def label(self, name: str) -> str:
        """What a complaint calls the tensor ``name``: its name in the file."""
        return name

    def shape(self, name: str) -> torch.Size:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._headers[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(name)
        wrong = not_finite(tensor)
        if wrong:
            raise UserError(
                f"{self.files[name]}: tensor '{self.label(name)}' has {wrong} values that are not finite "
                "(NaN or infinity)"
            )
        return tensor

    def _read(self, name: str) -> Tensor:
        file = self.files[name]
        if file.suffix != ".safetensors":
            return self._unpickled(file)[name].clone()
        with _opened(file) as stored:
            tensor: Tensor = stored.get_tensor(name).clone()  # off the mapped file, which is let go here
            return tensor

    def _read_header(self, file: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
        if file.suffix != ".safetensors":
            return {name: (tensor.shape, tensor.dtype) for name, tensor in self._unpickled(file).items()}
        with _opened(file) as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}
            return {
                name: (torch.Size(part.get_shape()), _dtype(file, name, part.get_dtype()))
                for name, part in parts.items()
            }

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        if self._pickle is None or self._pickle[0] != file:
            self._pickle = (file, read_pickle(file))
        return self._pickle[1]


def not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite."""
    # A sum is finite unless something in it is not, or it overflows: only then every value is looked at.
    if not tensor.is_floating_point() or math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return 0
    return tensor.numel() - int(tensor.float().isfinite().sum())


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _dtype(path: Path, name: str, told: str) -> torch.dtype:
    if told not in _DTYPES:
        raise UserError(f"{path}: tensor '{name}' is {told}, which this mmmamba does not read")
    return _DTYPES[told]


def _check_header(path: Path) -> None:
    """Refuse what is no ordinary file, and a header that the file has no room for or that no model needs."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        with open(path, "rb", buffering=0) as file:
            size = int.from_bytes(file.read(8) or b"", "little")
            held = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if held < 8 or size > min(MAX_HEADER, held - 8):
        raise UserError(f"{path}: truncated or not a safetensors file (its header is said to be {size:,} bytes long)")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with errors that name it."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from error


def weight_files(folder: Path) -> list[Path]:
    """Every weight file of ``folder``, the indexes of sharded checkpoints included, sorted by name."""
    return sorted(path for pattern in ("*.safetensors", "*.bin", "*.index.json") for path in folder.glob(pattern))


def read_weights(folder: str | Path) -> Weights:
    """The weights of a folder: one file or the shards that an index lists; safetensors before pickles."""
    folder = Path(folder)
    for name in (WEIGHTS, PICKLE):
        single, index = folder / name, folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
        if single.is_file():
            return Weights(single, [single])
    raise UserError(f"{folder}: no weights ({WEIGHTS}, {PICKLE}, or the index of shards)")


def _read_shards(folder: Path, index: Path) -> Weights:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: 'weight_map' must map each tensor to its file")
    shards = sorted(set(table.values()))
    for name in shards:
        if (folder / name).parent != folder or not (folder / name).is_file():
            raise UserError(f"{index}: lists the file '{name}', which is not in {folder}")
    weights = Weights(index, [folder / name for name in shards])
    lost = [key for key in table if weights.files.get(key) != folder / table[key]]
    if lost:
        raise UserError(f"{index}: {len(lost)} tensors are not in the file that it names ({_first(lost)})")
    return weights


def check_tensors(
    found: Weights,
    expected: Mapping[str, torch.Size],
    *,
    ignore: Iterable[str] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
    reason: Callable[[str], str],
) -> None:
    """Refuse weights that are not exactly what ``config.json`` asks for.

    Args:
        found: what the folder holds.
        expected: name → shape of every tensor that must be there.
        ignore: names that may be there and are not used.
        dtypes: name → dtype of tensors that must be of that one; the others may be of any floating point.
        reason: the likely cause, given the name of a missing or an unexpected tensor ('' when there is none).

    Raises:
        UserError: one line that names the file and counts the missing, unexpected and mis-shaped tensors.
    """
    missing, ignored = [name for name in expected if name not in found], set(ignore)
    extra = [name for name in found if name not in expected and name not in ignored]
    there = [name for name in expected if name in found]
    wrong = [name for name in there if found.shape(name) != expected[name]]
    whole = [name for name in there if not (dtypes and name in dtypes) and not found.dtype(name).is_floating_point]
    other = [name for name in dtypes or () if name in found and found.dtype(name) != (dtypes or {})[name]]
    if not (missing or extra or wrong or whole or other):
        return
    odd = wrong or whole or other or extra
    file = found.files[odd[0]] if odd else found.path
    parts = []
    if missing:
        parts.append(f"{_count(missing, 'missing tensor')} ({_first(map(found.label, missing))})")
    if extra:
        parts.append(f"{_count(extra, 'unexpected tensor')} ({_first(map(found.label, extra))})")
    if wrong:
        shapes = [f"{found.label(n)} is {tuple(found.shape(n))}, expected {tuple(expected[n])}" for n in wrong[:3]]
        more = ", …" if len(wrong) > 3 else ""
        parts.append(f"{_count(wrong, 'tensor')} of the wrong shape ({'; '.join(shapes)}{more})")
    if whole:
        kinds = [f"{found.label(n)} is {str(found.dtype(n)).removeprefix('torch.')}" for n in whole]
        parts.append(f"{_count(whole, 'tensor')} not of floating point ({_first(kinds)})")
    if other:
        kinds = [f"{found.label(n)} is {found.dtype(n)}, expected {(dtypes or {})[n]}" for n in other]
        parts.append(f"{_count(other, 'tensor')} of another dtype ({_first(kinds)})".replace("torch.", ""))
    causes = dict.fromkeys(cause for cause in map(reason, missing + extra) if cause)
    because = f": {'; '.join(causes)}" if causes else ""
    raise UserError(f"{file}: does not match {found.described}: {', '.join(parts)}{because}")


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}"


def _first(names: Iterable[str]) -> str:
    first = list(islice(names, 4))
    return ", ".join(name if len(name) <= 120 else f"{name[:117]}..." for name in first[:3]) + ", …" * (len(first) > 3)


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


def half_written(path: Path) -> str | None:
    """The name that a leftover of a writer was to have; None of any other file."""
    found = _LEFTOVER.fullmatch(path.name)
    return found[1] if found else None


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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as the format has them: a header of JSON, then the bytes, the widest numbers first.

    ``metadata`` are texts for the header, by default the mark by which transformers knows a file of PyTorch tensors.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each begins where its kind may
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        entry = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.unlink(missing_ok=True)  # emptied instead, it would take with it tensors that are mapped from it
    with path.open("wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little"))
        _write(file, text)
        for name in order:
            _write(file, tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    """All of some bytes: one call may write less."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


class ShardWriter:
    """Writes tensors as they come, into one file or, past ``limit`` bytes, into numbered shards with their index.

    How many shards there are is known at the end only, so they get their names then.
    """

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        if kind is None:
            self._finish()

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.limit:
            self._flush()
        self._pending[name] = tensor
        self._bytes += size

    def _flush(self) -> None:
        path = self.folder / f"{len(self._shards)}.part"
        write_safetensors(path, self._pending)
        self._shards.append((path, list(self._pending)))
        self._total += self._bytes
        self._pending, self._bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        stem, kind = self.name.rsplit(".", 1)
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self.folder / self.name)
            return
        table: dict[str, str] = {}
        for i, (path, names) in enumerate(self._shards):
            shard = f"{stem}-{i + 1:05d}-of-{count:05d}.{kind}"
            path.rename(self.folder / shard)
            table |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(table.items()))}
        write_json(self.folder / f"{self.name}.index.json", index)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, except the parameters that stay in float32 wherever they are kept.

    Raises:
        UserError: naming the tensor, when a value becomes infinite.
    """
    keep = name.rsplit(".", 1)[-1] in float32_names()
    wanted = torch.float32 if keep and dtype != torch.float64 else dtype
    found = tensor.to(wanted)
    most = torch.finfo(wanted).max
    if most < torch.finfo(tensor.dtype).max and not_finite(found) and not not_finite(tensor):
        raise UserError(
            f"tensor '{name}' has a value of size {float(tensor.abs().max()):.3g}, but "
            f"{str(wanted).removeprefix('torch.')} ends at {most:.3g}: take another dtype"
        )
    return found


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
