"""``mmmamba inspect``: what a model folder holds and what it will cost, from its config and its tensors' headers."""

from __future__ import annotations

import json as json_module
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mmmamba.checkpoints import Source, open_source, resolve, student
from mmmamba.checkpoints.io import CONFIG, Weights, read_weights
from mmmamba.checkpoints.layouts import STUDENT, recognise, skeleton
from mmmamba.config_files import to_dict
from mmmamba.data.image_decoding import load_image
from mmmamba.data.patches import fitted_size
from mmmamba.data.tiling import grid
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import kinds
from mmmamba.model.stack import StackConfig
from mmmamba.model.state import state_bytes
from mmmamba.report.table import show, table_of

LONG = 103_424  # tokens: the 103K of the paper's efficiency figures
SIZES = ((448, 448), (1920, 1080), (768, 1024))  # (width, height) of pictures that stand for common ones
CACHE = torch.bfloat16  # what caches are counted in; the states of recurrences are counted in float32


def inspect(model: str, *, json: bool = False, image: tuple[Path, ...] = ()) -> None:
    """Say what a model is and what it costs, without loading it.

    Any folder that can be loaded can be inspected. Only its config and the headers of its weight files are read: the
    answer is there at once, whatever the size. For example:

        mmmamba inspect pico-hybrid

    It shows the stacks of layers, which layers keep softmax attention and which are Mamba-2, where the parameters are,
    what a sequence leaves in memory (a softmax layer's cache grows with every token, a Mamba-2 layer's state never
    does; beside it the same network with softmax throughout), and how many tokens a picture takes in the prompt:

        mmmamba inspect pico-hybrid --image photo.png

    A cache is counted in bfloat16 and an SSM state in float32, as on a GPU.

    Args:
        model: A checkpoint folder in any layout that can be read, or the name of a built-in model such as pico-linear.
        json: Print the same as JSON, sizes in bytes.
        image: A picture to count the tokens of, instead of some common sizes. Repeat it for several.
    """
    found = describe(model, image)
    if json:
        print(json_module.dumps(found, indent=2))
    else:
        _print(found)


def describe(model: str | Path, images: Sequence[str | Path] = ()) -> dict[str, Any]:
    """What :func:`inspect` prints, as plain data.

    Args:
        model: a folder or a built-in name.
        images: pictures to count the tokens of; without any, those of :data:`SIZES` are counted.

    Raises:
        UserError: when the folder is no model or not a whole one, or a picture cannot be read.
    """
    source = _headers(model)
    config = source.config
    if images and config.vision is None:
        raise UserError(f"--image {images[0]}: this model reads text only")
    counts = _parameters(config, model)
    return {
        "model": str(model),
        "folder": str(source.folder),
        "layout": source.layout,
        "teacher": source.teacher and source.teacher.name,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tied_head": config.tie_word_embeddings,
        "stacks": {name: _stack(stack) for name, stack in _stacks(config).items()},
        "layer_map": list(config.layer_map),
        "new_layers": list(config.new_layers),
        "parameters": {"total": sum(counts.values()), **counts},
        "stored": _stored(source.weights),
        "state": {
            "tokens": LONG,
            "model": _state(config),
            "all_softmax": _state(replace(config, layer_map=())),
        },
        "pictures": _pictures(config, images),
        "mixer": _unpublished(config),
    }


# ---------------------------------------------------------------------------------------------- what there is


def _headers(model: str | Path) -> Source:
    """The model, its config and headers read; a delta without its teacher, all of which would be read and hashed."""
    where = resolve(model) / CONFIG
    if where.is_file() and recognise(data := read_json(where), where) is STUDENT:
        stored = student.folder_from_json(data, where)
        if stored.delta:
            weights = read_weights(where.parent)
            return Source(
                folder=where.parent,
                layout=f"{STUDENT.name} (delta)",
                config=stored.model,
                weights=weights,
                read=partial(student.read_student, weights, stored.model),
                teacher=stored.teacher,
            )
    return open_source(model)


def _stacks(config: ModelConfig) -> dict[str, StackConfig]:
    stacks = {"embedding": config.embedding, "decoder": config.decoder}
    return {name: stack for name, stack in stacks.items() if stack.num_layers}


def _stack(stack: StackConfig) -> dict[str, Any]:
    scaling = stack.rope_scaling
    return to_dict(stack) | {
        "rope_scaling": scaling and {key: value for key, value in to_dict(scaling).items() if value is not None}
    }


def _parameters(config: ModelConfig, where: str | Path) -> dict[str, int]:
    """How many parameters there are of each kind; a tied head is the embeddings'."""
    counts = dict.fromkeys(("embeddings", "vision", *kinds(), "mlp", "norms", "head"), 0)
    for part, tensors in skeleton(config, where).items():
        for name, tensor in tensors.items():
            counts[_kind(name, config, part)] += tensor.numel()
    return counts


def _kind(name: str, config: ModelConfig, layer: int | None) -> str:
    words = name.split(".")
    if "mixer" in words:
        assert layer is not None
        return config.layer_map[layer]
    if words[-2].endswith("norm"):
        return "norms"
    return {"layers": "mlp", "vision": "vision", "head": "head"}.get(words[0], "embeddings")


def _stored(weights: Weights) -> dict[str, Any]:
    """The weight files: how many, their size, and the tensors' bytes by number format."""
    files = set(weights.files.values())
    dtypes: Counter[str] = Counter()
    for name in weights:
        dtype = weights.dtype(name)
        dtypes[str(dtype).removeprefix("torch.")] += weights.shape(name).numel() * dtype.itemsize
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": len(weights),
        "dtypes": dict(dtypes.most_common()),
    }


def _state(config: ModelConfig) -> dict[str, int]:
    """Bytes that one sequence leaves: of any length (recurrences), a token (caches), and at ``LONG`` tokens."""
    size = state_bytes(config, CACHE)
    return {"recurrent": size.recurrent, "cache_per_token": size.per_token, "at_tokens": size.at(LONG)}


def _pictures(config: ModelConfig, images: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Size, grid, tiles and tokens (positions that pixels fill, the marks around them apart) of each picture."""
    vision = config.vision
    if vision is None:
        return []
    least, most = (config.min_dynamic_patch, config.max_dynamic_patch) if config.dynamic_image_size else (1, 1)
    found = []
    for name, (width, height) in _sizes(images):
        if vision.max_side is not None:
            side = vision.patch_size
            columns, rows = (length // side for length in fitted_size(width, height, side, vision.max_side))
            tiles = columns * rows
        else:
            columns, rows = grid(width, height, vision.image_size, min(least, most), most)
            tiles = columns * rows + (config.use_thumbnail and columns * rows > 1)
        shape = {"width": width, "height": height, "columns": columns, "rows": rows}
        found.append({"picture": name, **shape, "tiles": tiles, "tokens": tiles * vision.tokens_per_tile})
    return found


def _sizes(images: Sequence[str | Path]) -> Iterable[tuple[str | None, tuple[int, int]]]:
    if not images:
        return [(None, size) for size in SIZES]
    return [(str(path), load_image(path, "--image").size) for path in images]


def _unpublished(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The options of the new layers that differ from their kind's defaults, which are the published ones."""
    found = {}
    for kind in dict.fromkeys(config.layer_map[layer] for layer in config.new_layers):
        options = config.options(kind)
        for field in fields(options):
            here, published = getattr(options, field.name), getattr(type(options)(), field.name)
            if here != published:
                found[field.name] = {"here": here, "published": published}
    return found


# ---------------------------------------------------------------------------------------------- tables


def _print(found: dict[str, Any]) -> None:
    stored, total, layer_map = found["stored"], found["parameters"]["total"], found["layer_map"]
    dtypes = " + ".join(f"{dtype} ({_bytes(size)})" for dtype, size in stored["dtypes"].items())
    about = {
        "folder": found["folder"],
        "layout": found["layout"],
        "made from": found["teacher"],
        "on disk": f"{_bytes(stored['bytes'])} in {_plural(stored['files'], 'file')}, {dtypes}",
        "vocabulary": f"{found['vocab_size']:,} tokens, {'tied' if found['tied_head'] else 'untied'}",
        "mixer": "as published" if found["new_layers"] and not found["mixer"] else None,
    }
    show(table_of("Model", ("", found["model"]), [(name, value) for name, value in about.items() if value is not None]))

    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "layers": lambda stack: stack["num_layers"],
        "hidden": lambda stack: found["hidden_size"],
        "heads": lambda stack: stack["num_heads"],
        "kv heads": lambda stack: stack["num_kv_heads"],
        "head dim": lambda stack: stack["head_dim"],
        "FFN": lambda stack: stack["intermediate_size"],
        "RoPE theta": lambda stack: stack["rope_theta"],
        "scaling": lambda stack: _scaling(stack["rope_scaling"]),
        "positions": lambda stack: stack["max_position_embeddings"],
        "norm eps": lambda stack: stack["rms_norm_eps"],
        "biases": lambda stack: _biases(stack),
    }
    rows = [(name, *(read(stack) for read in columns.values())) for name, stack in found["stacks"].items()]
    show(table_of("Stacks", ("stack", *columns), rows))

    places = {kind: [i for i, here in enumerate(layer_map) if here == kind] for kind in dict.fromkeys(layer_map)}
    rows = [(kind, len(at), _ranges(at)) for kind, at in places.items()]
    show(table_of("Layers", ("mixer", "count", "layers"), rows))

    rows = [(kind, count, f"{100 * count / total:.1f} %") for kind, count in found["parameters"].items() if count]
    show(table_of("Parameters", ("kind", "parameters", "share"), [*rows[1:], rows[0]]))

    state = found["state"]
    both = (state["model"], state["all_softmax"])
    lines = {
        "state, at any length": "recurrent",
        "cache, a token": "cache_per_token",
        f"both, at {state['tokens']:,} tokens": "at_tokens",
    }
    rows = [(line, *(_bytes(one[key]) for one in both)) for line, key in lines.items()]
    show(table_of("Memory of one sequence", ("", "this model", "all softmax"), rows))

    if found["pictures"]:
        rows = [
            (p["picture"] or "", *(f"{p[a]} × {p[b]}" for a, b in (("width", "height"), ("columns", "rows"))),
             p["tiles"], p["tokens"])
            for p in found["pictures"]
        ]  # fmt: skip
        show(table_of("Pictures", ("picture", "pixels", "grid", "tiles", "tokens"), rows))
    if found["mixer"]:
        rows = [(name, str(option["here"]), str(option["published"])) for name, option in found["mixer"].items()]
        show(table_of("Mixer options", ("option", "here", "published"), rows))


def _scaling(scaling: dict[str, Any] | None) -> str:
    return "none" if scaling is None else f"{scaling['type']} × {scaling['factor']:g}"


def _biases(stack: dict[str, Any]) -> str:
    return ", ".join(key.removesuffix("_bias") for key in ("qkv_bias", "o_bias") if stack[key]) or "none"


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, runs shortened: 0, 4–7."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    """A size in the largest unit that leaves at least one of it."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count:,} B" if power == 0 else f"{count / 1024**power:,.2f} {units[power]}"
