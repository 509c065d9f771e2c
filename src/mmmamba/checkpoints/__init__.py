"""Checkpoints: foreign layouts ↔ ours by name maps, read with clear errors, written atomically."""

from mmmamba.checkpoints.io import read_safetensors, write_atomically
from mmmamba.checkpoints.model_source import Source, builtin_names, fingerprint, load, open_source, read_config, resolve
from mmmamba.checkpoints.write import save_hovle, save_release, save_student
from mmmamba.jsonfile import read_json

__all__ = [
    "Source",
    "builtin_names",
    "fingerprint",
    "load",
    "open_source",
    "read_config",
    "read_json",
    "read_safetensors",
    "resolve",
    "save_hovle",
    "save_release",
    "save_student",
    "write_atomically",
]
