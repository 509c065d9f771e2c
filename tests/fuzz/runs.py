"""Session files and run folders: what is damaged is refused, or leads to the very same result."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

import small_run
from fuzz import mutate
from fuzz.files import write
from fuzz.models import folder_of
from mmmamba.checkpoints import load
from mmmamba.checkpoints.io import read_with_metadata, write_safetensors
from mmmamba.checkpoints.tensor_hashes import digest
from mmmamba.data.processor import Processor
from mmmamba.distill.distill import distill
from mmmamba.distill.run_folder import RunFolder
from mmmamba.inference.conversation import Chat
from mmmamba.inference.session import HEADER, _json, read_session, save_session
from mmmamba.model import MAMBA2

TENSORS = "tensors.safetensors"


def session_seeds(folder: Path) -> list[tuple[Path, Any, Any]]:
    found = []
    for name, layers in {"softmax": (), "hybrid": ("attention", MAMBA2)}.items():
        made = folder_of(folder / name, layers)
        model, processor = load(made), Processor.from_folder(made)
        chat = Chat(model, processor, max_new_tokens=3)
        "".join(chat.ask("what colour ?"))
        found.append((save_session(folder / f"{name}.state", chat), model, processor))
    return found


def sessions(rng: random.Random, seeds: list[tuple[Path, Any, Any]], here: Path) -> None:
    source, model, processor = rng.choice(seeds)
    path = here / "s.state"
    signed = rng.random() < 0.6
    if signed:  # by somebody who knows how
        tensors, metadata = read_with_metadata(source)
        content = json.loads(metadata[HEADER])
        del content["sha256"]
        if rng.random() < 0.6:
            content = mutate.tree(rng, content)
        else:
            name = rng.choice(sorted(tensors))
            tensors = {**tensors, name: _tensor(rng, tensors[name])}
        if not isinstance(content, dict):
            content = {}
        content["sha256"] = digest([_json(content)], tensors)
        write_safetensors(path, tensors, {HEADER: json.dumps(content)})  # ASCII: half a surrogate pair can be written
    else:
        write(path, mutate.safetensors(rng, source.read_bytes()))
    session = read_session(path)
    if not signed:
        whole = read_session(source)
        assert session.header == whole.header
        assert all(torch.equal(tensor, session.tensors[name]) for name, tensor in whole.tensors.items())
    chat = session.resume(model, processor, max_new_tokens=2)
    "".join(chat.ask("sure ?"))


def _tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    how = rng.randrange(7)
    if how == 0:
        return tensor.flatten()
    if how == 1:
        return tensor[:0]
    if how == 2:
        return torch.cat([tensor, tensor])
    if how == 3:
        return tensor.to(rng.choice([torch.float16, torch.int8, torch.float64, torch.int64, torch.bool]))
    if how == 4:
        return tensor[None].contiguous()
    if how == 5:
        return torch.full_like(tensor, rng.choice([0, 1, 127]))
    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else ~tensor


# ---------------------------------------------------------------------------------------------- run folders


def run_seeds(folder: Path) -> dict[str, Any]:
    """A run that stopped in its last stage, and the weights that it would have ended with."""
    teacher = folder_of(folder / "teacher", hovle=True)
    data = small_run.make_data(folder / "data", 3)
    plan = small_run.recipe(**{f"stage{i}__{key}": value for i in (1, 2, 3) for key, value in
                               {"steps": 3, "batch_size": 1, "checkpoint_every": 1}.items()})  # fmt: skip
    recipe = small_run.write_recipe(folder / "plan.yaml", plan)
    drop = RunFolder._drop
    RunFolder._drop = lambda self, steps: None  # type: ignore[method-assign]  # its checkpoints stay
    try:
        distill(str(recipe), teacher=str(teacher), data=(data,), out=folder / "run")
    finally:
        RunFolder._drop = drop  # type: ignore[method-assign]
    run = folder / "run"
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["stage3"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    for gone in ("stage3", "stage3-step0000003", "stage1-step0000001", "stage1-step0000002", "stage2-step0000001"):
        shutil.rmtree(run / "checkpoints" / gone, ignore_errors=True)
    return {"recipe": recipe, "teacher": teacher, "data": data, "run": run, "weights": weights}


def runs(rng: random.Random, seeds: dict[str, Any], here: Path) -> None:
    run = here / "run"
    shutil.copytree(seeds["run"], run)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    path, other = rng.choice(files), rng.choice(files)
    how = rng.randrange(12)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.unlink()
        path.mkdir()
    elif how == 2:
        path.write_bytes(other.read_bytes())
    elif how == 3:
        path.write_bytes(b"")
    elif how == 4:
        shutil.rmtree(path.parent)
    elif how == 5:
        steps = sorted((run / "checkpoints").iterdir())
        other_name = run / "checkpoints" / f"stage3-step000000{rng.randrange(10)}x"[: rng.choice([19, 18])]
        step = rng.choice(steps)
        if other_name.exists() and other_name != step:  # a folder cannot replace another: the two swap names
            other_name.rename(run / "checkpoints" / "aside")
            step.rename(other_name)
            (run / "checkpoints" / "aside").rename(step)
        else:
            step.rename(other_name)
    elif path.suffix == ".safetensors":
        path.write_bytes(mutate.safetensors(rng, path.read_bytes()))
    elif path.name == "manifest.json":
        path.write_bytes(mutate.json_text(rng, mutate.tree(rng, json.loads(path.read_bytes()))))
    else:
        path.write_bytes(mutate.bytes_(rng, path.read_bytes()))
    distill(str(seeds["recipe"]), teacher=str(seeds["teacher"]), data=(seeds["data"],), out=run, resume=True)
    assert (run / "model" / "model.safetensors").read_bytes() == seeds["weights"], "other weights, without a word"
