"""The published trainer's ``.pt`` files: what one stage trained, to be laid over the teacher.

A stage's file has its trainable tensors only, with separate projections, under the release's names. Stage 1 lacks
q, k and v, which are still the teacher's then. Stage 3 lacks ``A_log_bias`` and ``dt_bias``: stage 2's file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from mmmamba.checkpoints import release
from mmmamba.checkpoints.hovle import layer_prefix, split_qkv
from mmmamba.checkpoints.io import Weights, check_tensors
from mmmamba.checkpoints.layouts import HOVLE, SEPARATE, stored_shapes
from mmmamba.checkpoints.model_source import Source, open_source
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import ATTENTION, MAMBA2, Mamba2Options

_QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def open_partial(file: str | Path, *, teacher: str | Path, stage2: str | Path | None = None) -> Source:
    """The student that a stage's file makes of a teacher, ready to be read part by part.

    Args:
        file: the published trainer's file of a stage.
        teacher: the folder of the HoVLE that it was trained from.
        stage2: stage 2's file, for the decays that stage 3's lacks.

    Raises:
        UserError: naming the file and what it lacks, has too much of, or has in another shape.
    """
    base = open_source(teacher)
    if base.layout != HOVLE.name:
        raise UserError(f"{base.folder}: a stage's file is laid over a teacher in the HoVLE layout, not {base.layout}")
    trained = [Weights(Path(name), [Path(name)]) for name in (file, stage2) if name is not None]
    config = _config(base.config, trained[0])
    prefixes = {f"{layer_prefix(config, layer)}attention.": layer for layer in config.new_layers}
    expected = {
        name: shape
        for name, shape in stored_shapes(SEPARATE, config, file).items()
        if name.startswith(tuple(prefixes)) and not name.endswith(".o_proj.weight")
    }
    if not any(name.endswith(_QKV) for name in trained[0]):
        expected = {name: shape for name, shape in expected.items() if not name.endswith(_QKV)}
    for i, found in enumerate(trained):
        elsewhere = {name for other in trained if other is not found for name in other} if i == 0 else set(expected)
        wanted = {name: shape for name, shape in expected.items() if name in found or name not in elsewhere}
        check_tensors(found, wanted, reason=_reason)
    state = _Overlay(trained, base.weights, config, prefixes)
    read = partial(release.read_release, state, config)
    own = trained[0]
    return Source(folder=base.folder, layout="partial", config=config, weights=own, read=read, places=base.places)


def _config(teacher: ModelConfig, trained: Weights) -> ModelConfig:
    """The teacher's config, with Mamba-2 in the layers of which ``trained`` has tensors."""
    prefixes = [f"{layer_prefix(teacher, layer)}attention." for layer in range(teacher.num_layers)]
    touched = [any(name.startswith(prefix) for name in trained) for prefix in prefixes]
    if not any(touched):
        raise UserError(f"{trained.path}: has no tensor of a mixer of this teacher: not a stage's file")
    return replace(teacher, layer_map=tuple(MAMBA2 if t else ATTENTION for t in touched), mixer=Mamba2Options())


@dataclass(frozen=True)
class _Overlay(Mapping[str, Tensor]):
    """The release's names of a student: what was trained, and the teacher's for the rest."""

    trained: list[Weights]
    teacher: Weights
    config: ModelConfig
    prefixes: dict[str, int]

    def __getitem__(self, name: str) -> Tensor:
        for weights in (*self.trained, self.teacher):
            if name in weights:
                return weights[name]
        head, _, kind = name.partition("attention.")
        prefix = f"{head}attention."
        if prefix in self.prefixes and kind == "o_proj.weight":
            return self.teacher[f"{prefix}wo.weight"]
        if prefix in self.prefixes and kind in _QKV:
            stack = self.config.stack_of(self.prefixes[prefix])
            return split_qkv(self.teacher[f"{prefix}wqkv.weight"], stack)[_QKV.index(kind)]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(name in weights for weights in (*self.trained, self.teacher))

    def __iter__(self) -> Iterator[str]:
        return iter({name for weights in (*self.trained, self.teacher) for name in weights})

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _reason(name: str) -> str:
    hint = release.reason(name)
    return f"{hint}: give it with --stage2" if name.endswith((".A_log_bias", ".dt_bias")) else hint
