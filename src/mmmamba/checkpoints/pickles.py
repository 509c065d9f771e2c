"""Reads weight files of ``torch.save``: only tensors, and none larger than what the file stores."""

from __future__ import annotations

import errno
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.errors import UserError
from mmmamba.jsonfile import shown

MAX_PICKLE = 64 << 20  # bytes of the part with the tensors' names; a thousand layers take one MB


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote. They are mapped, not read. A pickle of anything else is refused.

    Many trainers put the tensors into one outer object (``module``, ``state_dict``, ``model``). It is skipped.

    Raises:
        UserError: naming the file. It holds anything but dense tensors with names, or a tensor that claims more values
            than the file stores, or it is a compressed archive (its size does not limit what it unpacks to).
    """
    _check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols and older formats; whatever matters is an error
        found = _loaded(path)
    for key in ("module", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path}: does not hold a table of tensors")
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: a tensor is named {shown(name)}, which is not text")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: tensor {shown(name)} is not a dense tensor: not read")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {shown(name)} claims {tensor.numel():,} values, more than the file stores")
    return found


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than the size of the file."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise _no_tensors(path, error) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _no_tensors(path, error) from error
    for entry in entries:
        name = shown(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"{path}: {name} in it is compressed, which torch.save never does: not read")
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE:
            raise UserError(f"{path}: {name} in it has {entry.file_size:,} bytes: not read")


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the older format, which is not a zip file, can't be mapped
        return _unmapped(path)
    except Exception as error:  # a wrong byte may cause any error in the reader
        raise _no_tensors(path, error) from error


def _unmapped(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise _no_tensors(path, error) from error


def _no_tensors(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.EACCES, errno.EIO, errno.EISDIR):
        return UserError(f"{path}: {error.strerror}")  # any other error comes from a broken file
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return UserError(f"{path}: the pickle holds code or objects, not only tensors: not read, for safety")
    return UserError(f"{path}: truncated or not a file of tensors ({_reason(error)})")


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
