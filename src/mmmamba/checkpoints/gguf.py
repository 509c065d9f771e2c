"""GGUF files of the Llama family, read through transformers: config, dequantised tensors, tokenizer.

transformers leaves out what it has no field for (RoPE scaling, biases, experts); a file that has any of it is refused
here by name, because what came out would be another network.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints.io import Weights
from mmmamba.checkpoints.llama import FAMILIES, config_from_llama
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig

SUFFIX = ".gguf"
_PACKAGES = ("gguf", "transformers", "accelerate")


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that ``path`` is or, when there is no ``config.json`` beside it, holds; None when there is none.

    Raises:
        UserError: when a folder holds several.
    """
    path = Path(path)
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if (path / "config.json").exists():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
        raise UserError(f"{path}: holds {len(files)} GGUF files ({names}); give the path of one")
    return files[0] if files else None


def gguf_json(path: str | Path) -> dict[str, Any]:
    """What ``config.json`` of a GGUF file would hold.

    Raises:
        UserError: for a file that is no GGUF, or whose network transformers would change, naming the field or tensor.
    """
    return _read_config(*_identity(path))


def gguf_config(path: str | Path) -> ModelConfig:
    """Our config of a GGUF file."""
    return config_from_llama(gguf_json(path), path)


class GgufWeights(Weights):
    """The tensors of a GGUF file under transformers' names (for ``read_llama``), dequantised to float32: in memory as
    long as this object lives. A tied head is not among them."""

    def __init__(self, path: str | Path) -> None:
        file, config = Path(path), gguf_config(path)
        auto = _transformers().AutoModelForCausalLM
        with _complaints(file):
            model = auto.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        self._state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        super().__init__(file, [file])

    def __getitem__(self, name: str) -> Tensor:
        if not bool(self._state[name].isfinite().all()):
            raise UserError(f"{self.path}: tensor '{name}' has values that are not finite (NaN or infinity)")
        return self._state[name].clone()

    def _read_header(self, file: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._state.items()}


def gguf_tokenizer(path: str | Path) -> tuple[str, dict[str, Any]]:
    """What ``tokenizer.json`` and ``tokenizer_config.json`` of a GGUF file would hold."""
    return _read_tokenizer(*_identity(path))


def _identity(path: str | Path) -> tuple[Path, int, int]:
    """The arguments of the cached readers: a file that changes is read anew."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=4)
def _read_config(file: Path, size: int, time: int) -> dict[str, Any]:
    auto = _transformers().AutoConfig
    _refuse_unsupported(file)
    with _complaints(file):
        return auto.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).to_dict()


@lru_cache(maxsize=4)
def _read_tokenizer(file: Path, size: int, time: int) -> tuple[str, dict[str, Any]]:
    auto = _transformers().AutoTokenizer
    with _complaints(file):
        tokenizer = auto.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: str(token) for key, token in tokenizer.special_tokens_map.items() if key.endswith("_token")},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    return tokenizer.backend_tokenizer.to_str(), config


def _refuse_unsupported(file: Path) -> None:
    """What transformers would leave out without a word."""
    with _complaints(file):
        reader = importlib.import_module("gguf").GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()
        values = {
            name.removeprefix(f"{kind}."): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(f"{kind}.")
        }
        tensors = [tensor.name for tensor in reader.tensors]
        head_dim = values["embedding_length"] // values["attention.head_count"] if kind in FAMILIES else 0
    if kind not in FAMILIES:
        raise UserError(f"{file}: 'general.architecture' is {kind!r}: only {', '.join(FAMILIES)} are supported")
    if values.get("rope.scaling.type", "none") != "none":
        raise UserError(f"{file}: '{kind}.rope.scaling.type' is {values['rope.scaling.type']!r}: not read from GGUF")
    if values.get("expert_count", 0):
        raise UserError(f"{file}: '{kind}.expert_count' is {values['expert_count']}: experts are not supported")
    window, longest = values.get("attention.sliding_window"), values.get("context_length", 0)
    if window and window < longest:
        raise UserError(f"{file}: '{kind}.attention.sliding_window' is {window}, below the longest text ({longest})")
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if kind == "qwen2" and values.get(name, head_dim) != head_dim:
            raise UserError(f"{file}: '{kind}.{name}' is {values[name]}, but a head has {head_dim} features")
    if len({values[name] for name in ("rope.dimension_count", "attention.key_length") if name in values}) > 1:
        raise UserError(f"{file}: '{kind}.rope.dimension_count' is not '{kind}.attention.key_length'")
    biases = ("attn_q.bias", "attn_k.bias", "attn_v.bias") if FAMILIES[kind].bias == "qkv" else ()
    for name in tensors:
        if name == "rope_freqs.weight":
            raise UserError(f"{file}: tensor '{name}' scales RoPE, which is not read from GGUF; give the safetensors")
        if name.endswith(".bias") and not name.endswith(biases):
            raise UserError(f"{file}: tensor '{name}' is not read from GGUF; give the safetensors")


def _transformers() -> Any:
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"GGUF files need the package {name}: pip install 'mmmamba[gguf]'")
    return importlib.import_module("transformers")


@contextmanager
def _complaints(file: Path) -> Iterator[None]:
    """What a reader raises on a broken file, as one line."""
    try:
        yield
    except Exception as error:  # the readers let through whatever a wrong byte leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a usable GGUF file ({reason[:200]})") from error
