"""The run folder: recipe.yaml, manifest.json, metrics.jsonl, checkpoints/, and the finished model/. Nothing else."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import mmmamba
from mmmamba.checkpoints.io import (
    clear_leftovers,
    half_written,
    read_safetensors,
    write_atomically,
    write_json,
    write_safetensors,
)
from mmmamba.checkpoints.write import check_target
from mmmamba.config import dump_yaml, to_dict
from mmmamba.data.batching import Skipped
from mmmamba.distill import processes
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json, read_lines
from mmmamba.locks import LOCK, alone_in
from mmmamba.outputs import LEDGER, check_folder

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
ABOUT = "about"  # key of its header: JSON that says what the tensors are, and which teacher the rest is from
SHOWN = 20  # skipped samples that are printed; the manifest has them all


def digest(data: Any) -> str:
    """A short hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(to_dict(data), sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """What the run ran on."""
    return {
        "mmmamba": mmmamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


@contextmanager
def alone(folder: Path, *, read: Sequence[Path] = ()) -> Iterator[None]:
    """Only the processes of this run work in its folder, which can be written and is no part of what is ``read``.

    Raises:
        UserError: before anything is loaded, and naming the process that works there already.
    """
    if not processes.is_main():
        yield
        return
    check_folder(folder, read=read)
    with alone_in(folder):
        yield


def check_run(path: Path, recipe: Any, identity: Mapping[str, Any] | None, *, resume: bool) -> dict[str, Any] | None:
    """The manifest of a run folder that may be gone on with; None of one that is still to be made.

    Args:
        identity: as :class:`RunFolder` takes it; None where it is not known, and no recipe is compared.

    Raises:
        UserError: when the folder holds another run, or this one and ``resume`` is off, or something else.
    """
    if (path / MANIFEST).is_file():
        found = read_json(path / MANIFEST)
        if identity is not None and found.get("fingerprint") != digest({"recipe": to_dict(recipe), **identity}):
            changed = [key for key, value in identity.items() if found.get("identity", {}).get(key) != to_dict(value)]
            what = f" (other {', '.join(changed)})" if changed else " (another recipe)"
            raise UserError(f"{path}: holds another run{what}; give another --out")
        if not resume:
            which = "this run already" if identity is not None else "a run already"
            raise UserError(f"{path}: holds {which}; add --resume to go on with it, or give another --out")
        return found
    if foreign := _foreign(path, dump_yaml(recipe)):
        raise UserError(f"{path}: is not empty and not a run (it holds '{foreign}'); give another --out")
    return None


def _foreign(folder: Path, recipe: str) -> str:
    """The name of something in the folder that no run of this recipe left there; '' where there is none.

    A run that was killed before its manifest was there has left its recipe at most, and half-written files.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        ours = entry.name == "recipe.yaml" and entry.is_file() and entry.read_bytes() == recipe.encode()
        if not ours and entry.name != LOCK and half_written(entry) not in ("recipe.yaml", MANIFEST):
            return entry.name
    return ""


class RunFolder:
    """A folder that explains itself and can be gone on with.

    Args:
        path: the folder; made if missing.
        recipe: the whole resolved recipe (a dataclass).
        identity: what else must be the same for a resumed run (teacher, data, device-independent).
        resume: go on with what lies there.

    Of several processes the main one writes, and opens the folder first (:func:`mmmamba.distill.processes.main_first`);
    the others go on with what they find, and keep the same manifest in memory.

    Raises:
        UserError: when the folder holds another run, or this one and ``resume`` is off, or something else.
    """

    def __init__(self, path: str | Path, recipe: Any, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self._writes = processes.is_main()
        self.fingerprint = digest({"recipe": to_dict(recipe), **identity})
        self._manifest = self.path / MANIFEST
        self._metrics = self.path / "metrics.jsonl"
        if (found := check_run(self.path, recipe, identity, resume=resume or not self._writes)) is not None:
            self.manifest = found
            if not self._writes:
                return
            clear_leftovers(self.path)
            clear_leftovers(self.checkpoints)
            check_target(self.model, overwrite=self.replaces_model)  # now, not after the training
            for stage in self.manifest["stages"]:
                self._drop_steps(stage)
        else:
            for name in ("recipe.yaml", MANIFEST):
                clear_leftovers(self.path, name)
            self.manifest = {
                "fingerprint": self.fingerprint,
                "identity": to_dict(dict(identity)),
                "stages": {},
                "versions": versions(),
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            }
            text = dump_yaml(recipe)
            self._write(self.path / "recipe.yaml", lambda p: p.write_text(text, encoding="utf-8"))
            self._write_manifest()

    def _write(self, path: Path, write: Callable[[Path], Any], *, folder: bool = False) -> None:
        if self._writes:
            write_atomically(path, write, folder=folder)

    def _write_tensors(self, folder: Path, tensors: Mapping[str, Tensor], holds: str) -> None:
        """Tensors in a folder of their own; what they are, and whose teacher's, stands in the file's header."""
        # One text: safetensors writes several in any order, and a run's files are the same to the bit.
        about = json.dumps({"holds": holds, "teacher": self.manifest.get("teacher")})
        self._write(folder, lambda p: write_safetensors(p / TENSORS, tensors, {ABOUT: about}), folder=True)

    def _write_manifest(self) -> None:
        self._write(self._manifest, lambda p: write_json(p, self.manifest))

    @property
    def model(self) -> Path:
        """Where the finished model goes."""
        return self.path / "model"

    @property
    def replaces_model(self) -> bool:
        """Whether a model that is there is replaced, whoever wrote it: an earlier version left no ledger in it."""
        return not (self.model / LEDGER).exists()

    def note(self, **entries: Any) -> None:
        """Add entries to the manifest."""
        self.manifest.update(to_dict(entries))
        self._write_manifest()

    # ------------------------------------------------------------------ skipped samples

    def skip(self, stage: str, samples: Sequence[Skipped]) -> None:
        """List bad samples of ``stage`` that were left out, each once, whatever was listed before a kill."""
        listed = self.manifest.setdefault("skipped", {}).get(stage, [])
        known = {entry["where"] for entry in listed}
        new = [{"where": bad.where, "reason": bad.reason} for bad in samples if bad.where not in known]
        if new:
            self.manifest["skipped"][stage] = [*listed, *new]
            self._write_manifest()

    def skipped(self) -> dict[str, str]:
        """``file:line`` → reason of every sample that a stage left out."""
        stages = self.manifest.get("skipped", {}).values()
        return {entry["where"]: entry["reason"] for stage in stages for entry in stage}

    def report_skipped(self) -> None:
        """Say on stderr which samples were left out, if any."""
        skipped = self.skipped()
        if skipped:
            shown = [f"  {where}: {reason}" for where, reason in list(skipped.items())[:SHOWN]]
            if len(skipped) > SHOWN:
                shown.append(f"  … and {len(skipped) - SHOWN} more, all in {self._manifest}")
            print(f"skipped {len(skipped)} bad sample{'s' * (len(skipped) > 1)}:", *shown, sep="\n", file=sys.stderr)

    # ------------------------------------------------------------------ metrics

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if not self._writes:
            return
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"{self._metrics}: not written: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl (a killed process may leave half a line)."""
        if not self._metrics.is_file():
            return []
        return read_lines(self._metrics)

    def cut_metrics(self, stage: str, step: int) -> None:
        """Forget what was logged past ``step`` of ``stage``: it will be logged again."""
        kept = [m for m in self.metrics() if m["stage"] != stage or m["step"] <= step]
        if self._metrics.is_file():
            text = "".join(json.dumps(m) + "\n" for m in kept)
            self._write(self._metrics, lambda p: p.write_text(text, encoding="utf-8"))

    # ------------------------------------------------------------------ checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _steps(self, stage: str) -> list[tuple[int, Path]]:
        pattern = re.compile(rf"{re.escape(stage)}-step(\d+)")
        found = [(int(m[1]), p) for p in self.checkpoints.glob(f"{stage}-step*") if (m := pattern.fullmatch(p.name))]
        return sorted(found)

    def save_step(self, stage: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint to go on from; the one before is removed only when this one is on the disk."""
        older = self._steps(stage)
        target = self.checkpoints / f"{stage}-step{step:07d}"
        holds = f"what {stage} trains, and its optimizer's state; the rest is the teacher's"
        self._write_tensors(target, tensors, holds)
        self._drop(older)

    def last_step(self, stage: str) -> tuple[int, dict[str, Tensor]] | None:
        """The last checkpoint of an unfinished stage."""
        steps = self._steps(stage)
        if not steps:
            return None
        step, path = steps[-1]
        return step, read_safetensors(path / TENSORS)

    def finish(self, stage: str, tensors: Mapping[str, Tensor], **facts: Any) -> None:
        """Write a stage's result and drop its checkpoints."""
        holds = f"the result of {stage}: all that is not the teacher's"
        self._write_tensors(self.checkpoints / stage, tensors, holds)
        self.manifest["stages"][stage] = to_dict(facts)
        self._write_manifest()
        self._drop_steps(stage)

    def _drop_steps(self, stage: str) -> None:
        self._drop(self._steps(stage))

    def _drop(self, steps: Sequence[tuple[int, Path]]) -> None:
        for _, path in steps if self._writes else ():
            shutil.rmtree(path, ignore_errors=True)

    def result(self, stage: str) -> dict[str, Tensor] | None:
        """What a finished stage wrote."""
        if stage not in self.manifest["stages"]:
            return None
        return read_safetensors(self.checkpoints / stage / TENSORS)
