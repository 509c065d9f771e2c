"""The least that a step or a prefill can take: its bytes and operations over the rates that this machine reached.

What is counted is what no implementation can avoid: each weight read once, each state read and written, each cached key
and value read, each product of the network's matrices and of its mixers. Intermediate values are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmamba.benchmark.timing import Clock
from mmmamba.model.mixers import StateBytes
from mmmamba.model.model import Model


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes moved and operations done (a multiplication and an addition are two)."""

    bytes: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine reached in this run, a second.

    Attributes:
        bytes: moved by a large copy, those read and those written.
        flops: of a large matrix product in the weights' number format.
    """

    bytes: float
    flops: float

    def ms(self, cost: Cost) -> float:
        """Milliseconds that ``cost`` takes at least: the slower of moving and computing, done side by side."""
        return max(cost.bytes / self.bytes, cost.flops / self.flops) * 1e3


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy and multiply something large, and see how fast that goes."""
    clock, cuda = Clock(device), device.type == "cuda"
    source, target = torch.randn(2, 2**28 if cuda else 2**24, device=device)
    copied = clock.time(lambda: target.copy_(source), seconds=0.5)
    n = 8192 if cuda else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    multiplied = clock.time(lambda: a @ b, seconds=0.5)
    return Rates(bytes=2 * source.nbytes / copied.ms * 1e3, flops=2 * n**3 / multiplied.ms * 1e3)


def step_cost(model: Model, state: StateBytes, *, context: int, batch: int = 1) -> Cost:
    """The cost of a token for each of ``batch`` sequences of ``context`` tokens; steps may read int8 weights."""
    weights = _weight_bytes(model)
    if model.int8_steps:
        weights += int8_bytes(model) - sum(matrix.nbytes for matrix in _matrices(model))
    moved = weights + batch * (2 * state.recurrent + state.per_token * context)
    head = model.head.weight.numel()
    flops = batch * (2 * (_matrix_elements(model) + head) + _mixing(model, context=context))
    return Cost(bytes=moved, flops=flops)


def prefill_cost(model: Model, state: StateBytes, *, length: int) -> Cost:
    """The cost of reading ``length`` tokens, up to the last one's logits. The embedding of pictures is left out."""
    mixing = length * _mixing(model, context=(length + 1) / 2)
    flops = 2 * (_matrix_elements(model) * length + model.head.weight.numel()) + mixing
    return Cost(bytes=_weight_bytes(model) + state.at(length), flops=flops)


def int8_bytes(model: Model) -> int:
    """Of the int8 copies that steps read where the model wants them so: a byte an element, a float32 scale a row."""
    return sum(matrix.numel() + 4 * len(matrix) for matrix in _matrices(model)) if model.int8_steps else 0


def _matrices(model: Model) -> list[Tensor]:
    """What a step multiplies with: the maps of the layers, and the head."""
    return [one.weight for one in (*model.layers.modules(), model.head) if isinstance(one, nn.Linear)]


def _weight_bytes(model: Model) -> int:
    """Of what every pass reads: the layers, the last norm and the head, not the tables of embeddings."""
    parts = (*model.layers.parameters(), *model.norm.parameters(), model.head.weight)
    return sum(parameter.nbytes for parameter in parts)


def _matrix_elements(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.layers.parameters() if parameter.ndim > 1)


def _mixing(model: Model, *, context: float) -> float:
    """Operations that the mixers spend on a token after ``context`` others."""
    return sum(model.mixer(layer).step_flops(context) for layer in range(model.config.num_layers))
