"""Checkpoints: foreign layouts ↔ ours by name maps, read with clear errors, written atomically."""

from mmmamba.checkpoints.hovle import from_hovle, to_hovle
from mmmamba.checkpoints.io import read_json, read_safetensors, write_atomically
from mmmamba.checkpoints.read import builtin_names, fingerprint, load, read_config, read_state, resolve
from mmmamba.checkpoints.release import from_release, to_release
from mmmamba.checkpoints.write import save_hovle, save_release, save_student

__all__ = [
    "builtin_names",
    "fingerprint",
    "from_hovle",
    "from_release",
    "load",
    "read_config",
    "read_json",
    "read_safetensors",
    "read_state",
    "resolve",
    "save_hovle",
    "save_release",
    "save_student",
    "to_hovle",
    "to_release",
    "write_atomically",
]
