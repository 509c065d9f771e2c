"""GGUF files of the Llama family. We read the config and dequantise the tensors; transformers reads the tokenizer.

What would make another network (RoPE scaling, biases, experts) is refused by name. Of a folder nothing but the GGUF
file is read: neither code nor settings that lie beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmmamba.checkpoints.gguf_file import GgufHeader, read_header
from mmmamba.checkpoints.io import Weights
from mmmamba.checkpoints.llama import FAMILIES, config_from_llama
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig

SUFFIX = ".gguf"

_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOREIGN = {theirs: name for name, theirs in _LAYER.items()}


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file at ``path``, or in that folder if it has no ``config.json``. None if there is no such file.

    Raises:
        UserError: a folder holds several GGUF files.
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
    """The content of a ``config.json`` for a GGUF file.

    Raises:
        UserError: the file is not GGUF, or holds a network that we do not build; the field or tensor is named.
    """
    file, header = _opened(path)
    kind = _refuse_unsupported(file, header)
    values, tokenizer = _of(header, f"{kind}."), _of(header, "tokenizer.ggml.")
    tokens = tokenizer.get("tokens")
    found = {
        "vocab_size": getattr(tokens, "count", None),
        **{name: values[key] for name, key in _FIELDS.items() if key in values},
        **{name: tokenizer[key] for name, key in _TOKENS.items() if key in tokenizer},
    }
    head_dim = values.get("rope.dimension_count", values.get("attention.key_length"))
    return {
        "model_type": kind,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "head_dim": head_dim,
        "sliding_window": values.get("attention.sliding_window") or None,
        **found,
    }


def gguf_config(path: str | Path) -> ModelConfig:
    """Our config for a GGUF file."""
    return config_from_llama(gguf_json(path), path)


class GgufWeights(Weights):
    """The tensors of a GGUF file under transformers' names (for ``read_llama``), dequantised to float32 one by one.

    A tensor that has no place in a Llama keeps its own name.
    """

    described = "what its header says"

    def __init__(self, path: str | Path) -> None:
        self._config = gguf_config(path)
        file, self._header = _opened(path)
        self._kind = self._header.fields["general.architecture"]
        self._own = {_their_name(name): name for name in self._header.tensors}
        super().__init__(file, [file])

    def label(self, name: str) -> str:
        for ours, theirs in _OUTSIDE.items():
            if theirs == name:
                return ours
        _, _, layer, rest = [*name.split(".", 3), "", "", ""][:4]
        module, _, suffix = rest.rpartition(".")
        return f"blk.{layer}.{_FOREIGN[module]}.{suffix}" if module in _FOREIGN else name

    def _read(self, name: str) -> Tensor:
        entry = self._header.tensors[self._own[name]]
        gguf = _package("gguf")
        kind = gguf.GGMLQuantizationType(entry.kind)
        stored = np.fromfile(self.path, np.uint8, entry.size, offset=entry.begin)
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        rows = (*entry.shape[:-1], entry.shape[-1] // numbers * size) if entry.shape else (entry.size,)
        try:
            values = gguf.dequantize(stored.reshape(rows), kind).reshape(entry.shape)
        except NotImplementedError as error:
            raise UserError(f"{self.path}: tensor '{self._own[name]}' is {kind.name}, which is not read") from error
        found = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        if self._kind == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            stack = self._config.decoder
            found = _unpaired(found, stack.num_heads if ".q_proj." in name else stack.num_kv_heads)
        return found

    def _read_header(self, file: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
        tensors = self._header.tensors
        return {name: (torch.Size(tensors[own].shape), torch.float32) for name, own in self._own.items()}


def _their_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    first, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, suffix = rest.rpartition(".")
    if first == "blk" and layer.isdecimal() and module in _LAYER:
        return f"model.layers.{layer}.{_LAYER[module]}.{suffix}"
    return name


def _unpaired(weight: Tensor, heads: int) -> Tensor:
    """Rows in transformers' order. (llama.cpp puts the two channels that RoPE rotates together next to each other.)"""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def gguf_tokenizer(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The contents of a ``tokenizer.json`` and a ``tokenizer_config.json`` for a GGUF file."""
    _opened(path)  # this checks that its lists are not too long to read
    return _read_tokenizer(*_identity(path))


def _identity(path: str | Path) -> tuple[Path, int, int]:
    """The arguments of the cached readers. They change with the file, so that a changed file is read again."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


def _opened(path: str | Path) -> tuple[Path, GgufHeader]:
    return Path(path), _read_header(*_identity(path))


@lru_cache(maxsize=4)
def _read_header(file: Path, size: int, time: int) -> GgufHeader:
    sizes = _package("gguf").GGML_QUANT_SIZES
    return read_header(file, {int(kind): (int(numbers), int(size)) for kind, (numbers, size) in sizes.items()})


@lru_cache(maxsize=4)
def _read_tokenizer(file: Path, size: int, time: int) -> tuple[str, dict[str, Any]]:
    auto = _package("transformers").AutoTokenizer
    with _complaints(file), _alone(file) as folder, _offline():
        tokenizer = auto.from_pretrained(
            folder, gguf_file=f"model{SUFFIX}", local_files_only=True, trust_remote_code=False
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: str(token) for key, token in tokenizer.special_tokens_map.items() if key.endswith("_token")},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    return tokenizer.backend_tokenizer.to_str(), config


@contextmanager
def _alone(file: Path) -> Iterator[str]:
    """A folder that holds only this file, so that a reader finds no code and no settings beside it."""
    with tempfile.TemporaryDirectory(prefix="mmmamba-gguf-") as folder:
        target = Path(folder) / f"model{SUFFIX}"
        try:
            target.symlink_to(file.resolve())
        except OSError:  # links are not possible here, as on some Windows systems
            shutil.copyfile(file, target)
        yield folder


@contextmanager
def _offline() -> Iterator[None]:
    """Refuse every request to the hub inside the block."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _of(header: GgufHeader, prefix: str) -> dict[str, Any]:
    """The fields of a header whose names start with ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in header.fields.items() if name.startswith(prefix)}


def _refuse_unsupported(file: Path, header: GgufHeader) -> str:
    """Refuse what we do not build. Returns the architecture's name."""
    kind = header.fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{file}: 'general.architecture' is {kind!r}: only {', '.join(FAMILIES)} are supported")
    _refuse_fields(file, kind, _of(header, f"{kind}."))
    _refuse_tensors(file, kind, header)
    return kind


def _refuse_fields(file: Path, kind: str, values: dict[str, Any]) -> None:
    """Refuse fields that mean another network than the one we build."""
    if values.get("rope.scaling.type", "none") != "none":
        raise UserError(f"{file}: '{kind}.rope.scaling.type' is {values['rope.scaling.type']!r}: not read from GGUF")
    if values.get("expert_count", 0):
        raise UserError(f"{file}: '{kind}.expert_count' is {values['expert_count']}: experts are not supported")
    for name in (*_FIELDS.values(), "rope.dimension_count", "attention.key_length", "attention.value_length"):
        if name in values and (type(values[name]) not in (int, float) or values[name] <= 0):
            raise UserError(f"{file}: '{kind}.{name}' must be a positive number, got {values[name]!r}")
    for name in ("embedding_length", "attention.head_count"):
        if name not in values:
            raise UserError(f"{file}: '{kind}.{name}' is missing")
    window, longest = values.get("attention.sliding_window"), values.get("context_length", 0)
    if window and window < longest:
        raise UserError(f"{file}: '{kind}.attention.sliding_window' is {window}, below the longest text ({longest})")
    head_dim = values["embedding_length"] // values["attention.head_count"]
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if kind == "qwen2" and values.get(name, head_dim) != head_dim:
            raise UserError(f"{file}: '{kind}.{name}' is {values[name]}, but a head has {head_dim} features")
    if len({values[name] for name in ("rope.dimension_count", "attention.key_length") if name in values}) > 1:
        raise UserError(f"{file}: '{kind}.rope.dimension_count' is not '{kind}.attention.key_length'")


def _refuse_tensors(file: Path, kind: str, header: GgufHeader) -> None:
    """Refuse tensors that have no place in our network."""
    biases = ("attn_q.bias", "attn_k.bias", "attn_v.bias") if FAMILIES[kind].bias == "qkv" else ()
    for name in header.tensors:
        if name == "rope_freqs.weight":
            raise UserError(f"{file}: tensor '{name}' scales RoPE, which is not read from GGUF; give the safetensors")
        if name.endswith(".bias") and not name.endswith(biases):
            raise UserError(f"{file}: tensor '{name}' is not read from GGUF; give the safetensors")


def _package(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"GGUF files need the package {name}: pip install 'mmmamba[gguf]'")
    return importlib.import_module(name)


@contextmanager
def _complaints(file: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a broken file into one line."""
    try:
        yield
    except Exception as error:  # a wrong byte may cause any error in the reader
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a usable GGUF file ({reason[:200]})") from error
