"""The time that a step of distillation takes on a GPU, estimated from its work. Work is in FLOP, traffic in bytes."""

from __future__ import annotations

from mmmamba.distill.gpus import BANDWIDTH_USED, LAUNCH, RATE_USED, REPLAY, Gpu
from mmmamba.distill.workload import LayerWork, Workload
from mmmamba.model.mixers.cost import WIDE

HALF = 2  # bytes of a value: passes are in bfloat16


def step_work(work: Workload, length: float) -> tuple[float, float]:
    """(FLOP of matrix products, bytes of memory traffic) that a token of a step costs, weights not counted.

    A frozen matrix costs 2 FLOP a parameter forward and 2 for the gradient of its input, a trained one 2 more. What is
    computed again (``stage.recompute``) costs its forward pass once more, up to the last product that is needed.

    Args:
        length: tokens of a token's own sequence, on average: softmax's work grows with it.
    """
    d, vocabulary = work.teacher.hidden_size, work.teacher.vocab_size
    flop = traffic = 0.0
    for layer in work.layers:
        # Each value is written and read; norms and products read and write the residual and the MLP once each.
        h, g, p = layer.stack.num_heads, layer.stack.num_kv_heads, layer.stack.head_dim
        around = HALF * 2 * (6 * d + 4 * layer.stack.intermediate_size) + HALF * 2 * (3 * h + 4 * g) * p
        if work.stage.reads_teacher:
            flop += 2 * (layer.source.matrix_elements() + layer.out + layer.mlp) + layer.source.pass_flops(length / 2)
            traffic += around
        more = (
            _layer_local_work(layer, length)
            if work.stage.layer_local
            else _end_to_end_work(layer, length, around, work.config.recompute)
        )
        flop, traffic = flop + more[0], traffic + more[1]
    if not work.stage.layer_local:
        flop += (2 + work.stage.reads_teacher + ("head" in work.config.train)) * 2 * vocabulary * d
        traffic += 4 * HALF * vocabulary
    return flop, traffic


def _layer_local_work(layer: LayerWork, length: float) -> tuple[float, float]:
    """The mixer forward, and backward as far as its parameters: its input needs no gradient."""
    mixer = layer.mixer
    flop = 2 * (mixer.matrix_elements() + mixer.matrix_elements(layer.trained)) + 3.5 * mixer.pass_flops(length / 2)
    return flop, 3 * mixer.pass_traffic()


def _end_to_end_work(layer: LayerWork, length: float, around: float, recompute: str) -> tuple[float, float]:
    mixer, rest = layer.mixer, layer.out + layer.mlp
    inside, moved = mixer.pass_flops(length / 2), mixer.pass_traffic()
    trained = mixer.matrix_elements(layer.trained) + layer.trains_out * layer.out + layer.trains_mlp * layer.mlp
    flop = 4 * (mixer.matrix_elements() + rest) + 2 * trained + 3.5 * inside
    traffic = 3 * (around + moved)
    if recompute != "none":
        flop += 2 * (layer.out + 2 / 3 * layer.mlp)
        traffic += around
    if recompute == "layer":
        flop += 2 * mixer.matrix_elements() + inside
        traffic += moved
    return flop, traffic


def step_seconds(work: Workload, gpu: Gpu, tokens: float, rows: float, length: float) -> float:
    """Seconds of a step of ``tokens`` tokens in ``rows`` rows on one GPU at the assumed shares of its rates.

    No less than what the host takes to launch it.
    """
    flop, traffic = step_work(work, length)
    models = 2 if work.stage.reads_teacher and not work.stage.layer_local else 1
    casts = (WIDE + HALF + HALF if work.passes.cast_frozen else HALF) * work.counts.total * models  # a pass: cast, read
    update = 7 * WIDE * work.counts.moved  # AdamW reads four tensors and writes three
    moved = tokens * traffic + rows * casts + update
    launched = rows * work.teacher.num_layers * (REPLAY if work.config.graph else LAUNCH)
    return max(tokens * flop / (RATE_USED * gpu.rate) + moved / (BANDWIDTH_USED * gpu.bandwidth), launched)
