"""Records, JSONL files and pictures for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def record(identity: str, question: str, answer: str, image: str | None = None, /, **extra: Any) -> dict[str, Any]:
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": identity, **({"image": image} if image else {}), "conversations": turns, **extra}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (56, 56)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
