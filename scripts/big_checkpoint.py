"""A HoVLE checkpoint of the full 2.6 B geometry, random, and the memory that converting and loading it take.

    python scripts/big_checkpoint.py OUT                  # write it: fp32 shards, 10.4 GB; run again to go on
    python scripts/big_checkpoint.py OUT --check          # convert it to our layout in bf16 and back, and load it
    python scripts/big_checkpoint.py OUT --check --scale 0.05   # the same in small, for a try

``--check`` runs each step in a process of its own and prints its seconds and peak memory, compares every tensor with
the source bit for bit, and fails when a step took more than ``--limit-gib``. What it converts to lies beside OUT and is
removed in the end.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmmamba.checkpoints import hovle, open_source
from mmmamba.checkpoints.io import CONFIG, WEIGHTS, Weights, write_json, write_safetensors
from mmmamba.checkpoints.layouts import HOVLE, parts, skeleton, write_part
from mmmamba.checkpoints.student import same_bits
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.model import ModelConfig, StackConfig, VisionConfig
from mmmamba.progress import Progress
from mmmamba.report.table import show, table_of

SPARE = 1.05  # of the disk space worked out
GIB = 1 << 30

# A process that does nothing but wait: what it waits for starts from its few MB of memory, not from this script's,
# which the system would count as the peak of its child.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
json.dump({"status": status, "seconds": time.perf_counter() - start, "peak": peak}, open(sys.argv[1], "w"))
"""
LOAD = """
import sys, torch, mmmamba
model = mmmamba.load(sys.argv[1], dtype=torch.bfloat16)
found = sum(parameter.numel() for parameter in model.parameters())
assert found == int(sys.argv[2]), f"{found:,} parameters of {int(sys.argv[2]):,}"
"""


def geometry(scale: float) -> ModelConfig:
    """HoVLE-2.6B; a scale below 1 shrinks the number of layers, the FFNs and the vocabulary, nothing else."""
    stack = StackConfig(
        num_layers=max(1, round(8 * scale)),
        intermediate_size=max(1, round(8192 * scale)),
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
    )
    vocab = max(16, round(92_553 * scale))
    return ModelConfig(
        hidden_size=2048,
        vocab_size=vocab,
        embedding=stack,
        decoder=replace(stack, num_layers=max(1, round(24 * scale))),
        vision=VisionConfig(image_size=448, patch_size=14),
        img_context_token_id=vocab - 7,
    )


# ---------------------------------------------------------------------------------------------- writing


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every tensor that the published checkpoint has, the unused second table of embeddings included."""
    found: dict[str, torch.Size] = {}
    for part, ours in skeleton(config, "geometry").items():
        found |= {name: tensor.shape for name, tensor in write_part(HOVLE, ours, config, part).items()}
    return found | {hovle.UNUSED: torch.Size((config.vocab_size, config.hidden_size))}


def shards(tensors: Mapping[str, torch.Size], limit: int) -> list[dict[str, torch.Size]]:
    """The tensors in groups of at most ``limit`` bytes of float32 (a larger tensor lies alone)."""
    groups: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in tensors.items():
        bytes_ = 4 * shape.numel()
        if groups[-1] and size + bytes_ > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += bytes_
    return groups


def values(name: str, shape: torch.Size) -> Tensor:
    """Random weights that depend on nothing but the name; norms lie around 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)
    return tensor.add_(1.0) if name.endswith("norm.weight") else tensor


def is_whole(file: Path, wanted: Mapping[str, torch.Size]) -> bool:
    """Whether a shard is there already. It gets its name when it is whole, so its header tells."""
    if not file.exists():
        return False
    found = Weights(file, [file])
    if {name: found.shape(name) for name in found} != dict(wanted):
        raise UserError(f"{file}: is a shard of another checkpoint (another --scale?); give an empty folder")
    return True


def write(out: Path, config: ModelConfig, shard_bytes: int) -> None:
    """Write the checkpoint, or what is missing of it; ``config.json`` comes last."""
    groups = shards(shapes(config), shard_bytes)
    stem, kind = WEIGHTS.rsplit(".", 1)
    files = [out / f"{stem}-{i + 1:05d}-of-{len(groups):05d}.{kind}" for i in range(len(groups))]
    strange = sorted(set(out.glob(f"{stem}-*.{kind}")) - set(files)) if out.is_dir() else []
    if strange:
        raise UserError(f"{strange[0]}: is a shard of another checkpoint (another --scale?); give an empty folder")
    sizes = [4 * sum(shape.numel() for shape in group.values()) for group in groups]
    missing = [i for i, (file, group) in enumerate(zip(files, groups, strict=True)) if not is_whole(file, group)]
    need_disk(out, sum(sizes[i] for i in missing))
    out.mkdir(parents=True, exist_ok=True)
    with Progress("shards", total=len(groups), start=len(groups) - len(missing)) as bar:
        for i in missing:
            unfinished = files[i].with_suffix(".part")
            write_safetensors(unfinished, {name: values(name, shape) for name, shape in groups[i].items()})
            unfinished.replace(files[i])
            bar.advance(GB=sizes[i] / 1e9)
    weight_map = {name: file.name for file, group in zip(files, groups, strict=True) for name in group}
    write_json(
        out / f"{WEIGHTS}.index.json",
        {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))},
    )
    write_json(out / CONFIG, hovle.config_to_hovle(config) | {"torch_dtype": "float32"})
    print(f"{out}: {sum(map(torch.Size.numel, shapes(config).values())):,} values, {sum(sizes) / 1e9:.1f} GB")


def need_disk(folder: Path, size: float) -> None:
    """Refuse to begin what the disk has no room for."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < SPARE * size:
        raise UserError(f"{folder}: needs {SPARE * size / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")


# ---------------------------------------------------------------------------------------------- checking


def measured(log: Path, *command: str) -> tuple[float, int]:
    """(seconds, peak bytes) of a Python command; its output is shown as it comes."""
    subprocess.run([sys.executable, "-c", MEASURE, str(log), sys.executable, *command], check=True)
    found = read_json(log)
    log.unlink()
    if found["status"]:
        raise UserError(f"failed with exit code {found['status']}: python {' '.join(command)}")
    return found["seconds"], found["peak"]


def differences(source: Path, ours: Path, back: Path) -> Iterator[str]:
    """Tensors that are not the source's, rounded to bfloat16; one part in memory at a time."""
    original, converted, returned = (open_source(folder) for folder in (source, ours, back))
    config = original.config
    if converted.config != config or returned.config != config:
        yield CONFIG
    for part in parts(config):
        truth = {name: tensor.to(torch.bfloat16) for name, tensor in original.read(part).items()}
        for where, found in ((ours, converted.read(part)), (back, returned.read(part))):
            yield from (f"{where.name}: {name}" for name in truth.keys() ^ found.keys())
            yield from (
                f"{where.name}: {name}"
                for name, tensor in truth.items()
                if name in found and not same_bits(tensor, found[name])
            )


def check(source: Path, limit: int, keep: bool) -> bool:
    """Convert there and back, load, compare; whether all is as it should be."""
    ours, back = (source.with_name(f"{source.name}-{name}") for name in ("mmmamba", "back"))
    original = open_source(source)
    half = sum(original.weights.shape(name).numel() for name in original.weights) * 2
    need_disk(source, 2 * half)
    parameters = sum(tensor.numel() for part in skeleton(original.config, source).values() for tensor in part.values())
    convert = ("-m", "mmmamba", "convert")
    steps = {
        "HoVLE to ours, bf16": (*convert, str(source), str(ours), "--to", "mmmamba", "--dtype", "bfloat16"),
        "ours to HoVLE": (*convert, str(ours), str(back), "--to", "hovle"),
        "load ours": ("-c", LOAD, str(ours), str(parameters)),
    }
    took = {name: measured(source.with_name(f".{source.name}.json"), *command) for name, command in steps.items()}
    wrong = list(differences(source, ours, back))
    rows = [
        (name, round(seconds, 1), round(peak / GIB, 2), "yes" if peak <= limit else "NO")
        for name, (seconds, peak) in took.items()
    ]
    show(
        table_of(
            f"{source}: {parameters:,} parameters", ("step", "seconds", "peak GiB", f"≤ {limit / GIB:g} GiB"), rows
        )
    )
    print(
        f"{len(wrong)} tensors differ: {', '.join(wrong[:3])}" if wrong else "every tensor is the source's, bit for bit"
    )
    if not keep:
        shutil.rmtree(ours)
        shutil.rmtree(back)
    return not wrong and all(peak <= limit for _, peak in took.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the checkpoint's folder; run again to go on with it")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink layers, FFNs and vocabulary (default: 1)")
    parser.add_argument("--shard-gib", type=float, default=1.0, help="GiB a shard: what writing holds in memory")
    parser.add_argument("--check", action="store_true", help="convert it there and back, and load it")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="most memory that a step may take")
    parser.add_argument("--keep", action="store_true", help="keep the converted folders")
    arguments = parser.parse_args()
    if not 0 < arguments.scale <= 1 or arguments.shard_gib <= 0:
        parser.error("--scale must be above 0 and at most 1, --shard-gib above 0")
    try:
        write(arguments.out, geometry(arguments.scale), round(arguments.shard_gib * GIB))
        good = not arguments.check or check(arguments.out, round(arguments.limit_gib * GIB), arguments.keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
