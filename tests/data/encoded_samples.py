"""Random encoded samples, and what it means for two batches of them to be equal."""

from __future__ import annotations

import numpy as np
import torch

from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import Encoded


def make_encoded(seed: int) -> Encoded:
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 30))
    ids = random.integers(0, 300, length).astype(np.int32)
    labels = np.where(random.random(length) < 0.5, ids, -100).astype(np.int32)
    tiles = random.integers(0, 256, (int(random.integers(0, 3)), 4, 4, 3)).astype(np.uint8)
    return Encoded(ids, labels, tiles, id=f"id{seed}", where=f"file.jsonl:{seed}")


def equal(a: Batch, b: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "cu_seqlens", "tiles")
    )
    return tensors and a.ids == b.ids
