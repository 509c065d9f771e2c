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

from mmmamba.checkpoints.io import (
    clear_leftovers,
    half_written,
    write_atomically,
    write_json,
)
from mmmamba.checkpoints.write import check_target
from mmmamba.config_files import dump_yaml, load_yaml, to_dict
from mmmamba.data.loader import Skipped
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.distill import processes
from mmmamba.distill.checked_tensors import read_checked, write_checked
from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json, read_lines
from mmmamba.locks import LOCK, alone_in
from mmmamba.outputs import LEDGER, check_folder
from mmmamba.version import __version__

MANIFEST = "manifest.json"
SHOWN = 20  # skipped samples that are printed; the manifest has them all


def digest(data: Any) -> str:
    """A short hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(to_dict(data), sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """What the run ran on."""
    return {
        "mmmamba": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def pictures_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Source → by which its pictures were known when a run began; nothing where its manifest does not say."""
    found = manifest.get("pictures")
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


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
        found = checked_manifest(read_json(path / MANIFEST, limit=MAX_DATA_BYTES), path / MANIFEST)
        if identity is not None and found.get("fingerprint") != digest({"recipe": to_dict(recipe), **identity}):
            changed = [key for key, value in identity.items() if found.get("identity", {}).get(key) != to_dict(value)]
            what = f" (other {', '.join(changed)})" if changed else " (another recipe)"
            raise UserError(f"{path}: holds another run{what}; give another --out")
        if not resume:
            which = "this run already" if identity is not None else "a run already"
            raise UserError(f"{path}: holds {which}; add --resume to go on with it, or give another --out")
        if identity is not None:
            _check_recipe(path / "recipe.yaml", recipe)
        return found
    if foreign := _foreign(path, dump_yaml(recipe)):
        raise UserError(f"{path}: is not empty and not a run (it holds '{foreign}'); give another --out")
    return None


def _check_recipe(file: Path, recipe: Any) -> None:
    """Refuse a ``recipe.yaml`` that is no longer the run's: a folder explains itself, or it misleads."""
    if file.exists() and load_yaml(file) != to_dict(recipe):
        raise UserError(f"{file}: was altered: it is not the recipe of this run; remove it or put it back")


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

    def _write_tensors(self, folder: Path, tensors: Mapping[str, Tensor], **about: Any) -> None:
        """Write tensors into a new folder, with what they are and which teacher the rest is from."""
        about |= {"teacher": self.manifest.get("teacher")}
        self._write(folder, lambda p: write_checked(p, tensors, about), folder=True)

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

    def check_pictures(self, picture_hashes: Mapping[str, PictureHashes]) -> dict[str, str]:
        """By which the sources' pictures are known, to be noted; refuses to go on with others.

        Raises:
            UserError: naming a picture that is not what it was when the run began.
        """
        kept = pictures_of(self.manifest)
        for source, now in picture_hashes.items():
            changed = now.changed(kept.get(source, ""))
            if changed is not None:
                raise UserError(f"{changed}: changed since the run in {self.path} began; give another --out")
        return {source: kept.get(source) or now.text for source, now in picture_hashes.items()}

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
        found = read_lines(self._metrics)
        for number, entry in enumerate(found, start=1):
            if not isinstance(entry.get("stage"), str) or type(entry.get("step")) is not int:
                raise UserError(f"{self._metrics}:{number}: was altered or damaged: it has no 'stage' and 'step'")
        return found

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

    def step_folder(self, stage: str, step: int) -> Path:
        """Where a stage's checkpoint lies."""
        return self.checkpoints / f"{stage}-step{step:07d}"

    def save_step(self, stage: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint to go on from; the one before is removed only when this one is on the disk."""
        older = self._steps(stage)
        target = self.step_folder(stage, step)
        holds = f"what {stage} trains, and its optimizer's state; the rest is the teacher's"
        self._write_tensors(target, tensors, holds=holds, stage=stage, step=step)
        self._drop(older)

    def last_step(self, stage: str) -> tuple[int, dict[str, Tensor]] | None:
        """The last checkpoint of an unfinished stage.

        Raises:
            UserError: when it is not what was written down.
        """
        steps = self._steps(stage)
        if not steps:
            return None
        step, path = steps[-1]
        remedy = f"remove {path} to begin {stage} again"
        return step, read_checked(path, {"stage": stage, "step": step}, remedy=remedy)

    def finish(self, stage: str, tensors: Mapping[str, Tensor], **facts: Any) -> None:
        """Write a stage's result and drop its checkpoints."""
        holds = f"the result of {stage}: all that is not the teacher's"
        self._write_tensors(self.checkpoints / stage, tensors, holds=holds, stage=stage)
        self.manifest["stages"][stage] = to_dict(facts)
        self._write_manifest()
        self._drop_steps(stage)

    def _drop_steps(self, stage: str) -> None:
        self._drop(self._steps(stage))

    def _drop(self, steps: Sequence[tuple[int, Path]]) -> None:
        for _, path in steps if self._writes else ():
            shutil.rmtree(path, ignore_errors=True)

    def result(self, stage: str) -> dict[str, Tensor] | None:
        """What a finished stage wrote.

        Raises:
            UserError: when it is not what was written down.
        """
        if stage not in self.manifest["stages"]:
            return None
        return read_checked(self.checkpoints / stage, {"stage": stage}, remedy="run it again into another --out")


def checked_manifest(manifest: dict[str, Any], where: Path) -> dict[str, Any]:
    """A manifest whose entries are of the kinds that are written.

    Raises:
        UserError: naming the entry that was altered.
    """

    def refuse(key: str, kind: str) -> None:
        raise UserError(f"{where}: was altered or damaged: '{key}' must be {kind}")

    for key in ("identity", "stages", "skipped"):
        if not isinstance(manifest.get(key, {}), dict):
            refuse(key, "an object")
    if "stages" not in manifest:
        refuse("stages", "there")
    for stage, facts in manifest["stages"].items():
        if not isinstance(facts, dict):
            refuse(f"stages.{stage}", "an object")
    for stage, entries in manifest.get("skipped", {}).items():
        texts = [entry.get(key) for entry in entries for key in ("where", "reason")] if _objects(entries) else [None]
        if not all(isinstance(text, str) for text in texts):
            refuse(f"skipped.{stage}", "a list of objects with 'where' and 'reason'")
    layers = manifest.get("softmax_layers", [])
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        refuse("softmax_layers", "a list of layers")
    return manifest


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
