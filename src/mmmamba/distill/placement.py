"""Which layers keep softmax: those whose loss would be felt most, by measurement."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch

from mmmamba.data.packed_batch import Batch
from mmmamba.distill import processes
from mmmamba.distill.losses import divergence, token_weights
from mmmamba.distill.objectives import autocast, inputs, total
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.errors import UserError
from mmmamba.model.config import student_layer_map
from mmmamba.model.mixers import Options
from mmmamba.model.model import Model


@torch.no_grad()
def place(
    teacher: Model,
    aligned: Model,
    mixer: Options,
    count: int,
    rows: Sequence[Batch],
    stage: StageConfig,
    precision: torch.dtype,
) -> list[int]:
    """The ``count`` global layers that keep softmax, chosen one after another.

    Each choice is the layer whose softmax, put back among the aligned mixers, brings the student's output nearest to
    the teacher's: KL per token over ``rows``, weighted as in ``stage`` (stage 3). The number of passes grows with
    ``count`` times the number of layers; several processes share the rows. The paper interleaves instead (section 4.3
    compares placements by hand).

    Raises:
        UserError: when the rows score nothing, in all processes together, or a KL is no number: nothing is chosen then.
    """
    layers = range(teacher.config.num_layers)
    weights = [token_weights(row.labels, stage.prompt_weight, row.real) for row in rows]
    divisor = total([weight.sum() for weight in weights], teacher.device)
    if not float(divisor) > 0:
        raise UserError("layers: measured: the samples to measure on have no token that counts")
    with autocast(teacher.device, precision):
        given = [inputs(teacher, row) for row in rows]
        targets = [
            teacher(**x, cu_seqlens=row.cu_seqlens, logits="none").hidden for x, row in zip(given, rows, strict=True)
        ]

    def measure(keep: Sequence[int]) -> float:
        student = seed(teacher, student_layer_map(len(layers), keep, mixer), mixer, aligned=aligned)
        found = torch.zeros((), device=teacher.device)
        with autocast(teacher.device, precision):
            for x, row, weight, target in zip(given, rows, weights, targets, strict=True):
                hidden = student(**x, cu_seqlens=row.cu_seqlens, logits="none").hidden
                found += divergence(hidden, student.head, target, teacher.head, weight, stage.temperature)
        kl = float(processes.total(found) / divisor)
        if not math.isfinite(kl):
            kept = f"layers {sorted(keep)} keep" if keep else "no layer keeps"
            raise UserError(f"layers: measured: the KL is {kl} where {kept} softmax: no layer can be chosen by it")
        return kl

    kept: list[int] = []
    before = measure(kept)
    for _ in range(count):
        found = {i: measure([*kept, i]) for i in layers if i not in kept}
        best = min(found, key=lambda i: found[i])
        if processes.is_main():
            print(f"layer {best} keeps softmax: KL {before:.4f} → {found[best]:.4f}", file=sys.stderr)
        kept.append(best)
        before = found[best]
    return sorted(kept)
