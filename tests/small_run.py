"""A distillation small enough for a test: a tiny teacher, six samples with pictures, a few steps a stage.

Also how a whole command line is run in a process of its own, as a user runs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from mmmamba.checkpoints.layouts import SEPARATE, by_part, write_part
from mmmamba.model import Model

STAGE1 = ["A_log", "dt_bias", "dt_proj", "conv", "gate_proj", "norm"]
STAGE2 = [*STAGE1, "q_proj", "k_proj", "v_proj"]


def conversation(question: str, answer: str, *more: str) -> list[dict[str, str]]:
    """Human and gpt turns in alternation."""
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate((question, answer, *more))]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def make_data(folder: Path, samples: int = 6) -> Path:
    """A JSONL of ``samples`` records: noise pictures of one tile or two, and text alone."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for i in range(samples):
        record: dict[str, Any] = {"id": f"s{i}", "conversations": conversation(f"how many {i} ?", f"red {i * i}")}
        if i % 3 != 2:
            size = (56, 56) if i % 2 else (112, 56)
            Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
        records.append(record)
    return write_jsonl(folder / "data.jsonl", records)


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe as plain data; ``stage1__steps=3`` changes a nested key."""
    shared = {"steps": 4, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 2, "log_every": 1, "micro_tokens": 120}
    plan: dict[str, Any] = {
        "name": "small",
        "teacher": "unset",
        "seed": 0,
        "data": {"workers": 0, "sources": [{"path": "unset"}]},
        "stage1": {**shared, "train": STAGE1, "loss_scale": 100.0},
        "stage2": {**shared, "train": STAGE2, "loss_scale": 100.0},
        "stage3": {**shared, "train": STAGE2},
    }
    return changed(plan, **changes)


def changed(plan: dict[str, Any], **changes: Any) -> dict[str, Any]:
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = plan
        for parent in parents:
            section = section[parent]
        section[last] = value
    return plan


def teach_recipe(data: Path, **changes: Any) -> dict[str, Any]:
    """A teacher of one layer a stack, as plain data."""
    stack = {"num_layers": 1, "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    plan = {
        "name": "small-teacher",
        "vocab_size": 264,
        "model": {
            "hidden_size": 32,
            "embedding": stack,
            "decoder": stack,
            "vision": {"image_size": 56, "patch_size": 14},
            "system_message": "",
        },
        "data": {"workers": 0, "sources": [{"path": str(data)}]},
        "train": {"steps": 6, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 2, "log_every": 1},
    }
    return changed(plan, **changes)


def write_recipe(path: Path, plan: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    return path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    """``mmmamba ARGS`` in a process of its own, on one thread, so that its sums are always in one order."""
    command = [sys.executable, "-m", "mmmamba", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, **options)


def run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """``mmmamba ARGS`` to its end."""
    process = start(*args, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stage_file(model: Model, path: Path, stage: int) -> Path:
    """What the published trainer keeps of a stage: the tensors that it trained."""
    kinds = ["conv1d.", "in_proj.", "g_norm.", "g_proj."]
    kinds += ["A_log_bias", "dt_bias"] if stage < 3 else []
    kinds += ["q_proj.", "k_proj.", "v_proj."] if stage > 1 else []
    tensors = {}
    for part, ours in by_part(model.state_dict(), model.config).items():
        for name, tensor in write_part(SEPARATE, ours, model.config, part).items():
            if any(kind in name for kind in kinds):
                tensors[name] = tensor.clone()
    torch.save(tensors, path)
    return path
