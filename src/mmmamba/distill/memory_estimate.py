"""The memory that a stage of distillation needs, by part, estimated before it runs.

Pure functions of the stage's workload and the size of a row of tokens. They follow what autograd keeps of the layers
and the objectives; the mixers say themselves what they keep. Tests hold the estimates against what PyTorch allocates.

Letters as everywhere: ``d`` hidden, ``h`` heads, ``p`` head dim, ``v`` vocabulary. All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mmmamba.distill.gpus import OVERHEAD
from mmmamba.distill.parameters import mixer_parts, parameters_of
from mmmamba.distill.workload import LayerWork, Workload
from mmmamba.model.mixers.cost import WIDE, Passes
from mmmamba.ops.kl import tuning as kl_tuning

UNIT, MOST_ROWS = 256, 4096  # the greatest row is looked for in units of so many tokens, up to so many units


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part: what is there all the time, and what comes on top at each moment of a step."""

    held: Mapping[str, int]
    moments: Mapping[str, Mapping[str, int]]

    @property
    def peak_moment(self) -> str:
        """The moment at which most is in use."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + sum(self.moments[self.peak_moment].values())


def stage_memory(work: Workload, tokens: int) -> Memory:
    """Memory of a stage whose rows hold ``tokens`` tokens (one sequence, all of it scored), without the driver's."""
    return Memory(held=_held(work), moments=_moments(work, tokens))


def greatest_row(work: Workload, memory: float) -> int:
    """The greatest row, in tokens by the :data:`UNIT`, with a peak that leaves :data:`OVERHEAD` of ``memory``, or 0."""
    room = memory - OVERHEAD - sum(_held(work).values())

    def fits(rows: int) -> bool:
        return max(sum(moment.values()) for moment in _moments(work, UNIT * rows).values()) <= room

    low, high = 0, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return UNIT * low


# ---------------------------------------------------------------------------------------------- all the time


def _held(work: Workload) -> dict[str, int]:
    """The teacher whole, new mixers for all its layers (W_o shared), what else the student has copies of, gradients,
    AdamW's two moments; of the matrices that Muon moves there is one.
    """
    once = work.moved_matrices if work.config.optimizer == "muon" else 0
    copied_parts = sorted({*work.config.train, *work.owned} - {*mixer_parts()})
    copied = _count(parameters_of(work.student_model, copied_parts))
    mixers = _count(parameters_of(work.aligned_model, mixer_parts()))
    frozen, moved = work.passes.frozen, work.counts.moved
    return {
        f"teacher's weights, {'float32' if frozen == WIDE else 'bfloat16'}": frozen
        * _count(dict(work.teacher_model.named_parameters())),
        "students' mixers, float32": WIDE * mixers,
        **({"student's copies of what it trains": WIDE * copied} if copied else {}),
        "gradients, float32": WIDE * moved,
        "optimizer's moments, float32": WIDE * (2 * moved - once),
    }


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


# ---------------------------------------------------------------------------------------------- kept for backward


def _norm_saved(work: Workload, passes: Passes) -> int:
    """What an RMSNorm keeps of a token: its input; in PyTorch the inverse root too, and a trained one the product."""
    d = work.teacher.hidden_size
    if passes.kernels:
        return passes.frozen * d
    return passes.frozen * d * (1 + ("norms" in work.config.train)) + WIDE


def _finish_saved(work: Workload, layer: LayerWork, passes: Passes) -> int:
    """What all that follows the heads (W_o, norm, MLP) keeps of a token: the norm's input; gate, up, in PyTorch also
    SiLU(gate).

    Trained matrices keep what they read too: W_o the heads (unless the mixer keeps them itself), the MLP its input and
    the product of gate and up.
    """
    w, wide = passes.width, layer.stack.intermediate_size
    size = _norm_saved(work, passes) + (2 if passes.kernels else 3) * w * wide
    if layer.trains_mlp:
        size += w * (work.teacher.hidden_size + wide)
    if layer.trains_out and not layer.mixer.keeps_heads(passes):
        size += w * layer.heads
    return size


def _finish_recomputed(work: Workload, layer: LayerWork, passes: Passes) -> int:
    """What is kept of a token where all that is computed again: the heads, unless the mixer keeps them, and the layer's
    input, unless the norm before the mixer keeps it.
    """
    heads = 0 if layer.mixer.keeps_heads(passes) else passes.width * layer.heads
    return heads + (0 if layer.reads_gradient else passes.frozen * work.teacher.hidden_size)


def _mixer_casts(layer: LayerWork, passes: Passes) -> int:
    """Bytes of a mixer's matrices in the passes' format."""
    return (passes.cast if layer.trained else passes.cast_frozen) * layer.mixer.matrix_elements()


def _finish_casts(layer: LayerWork, passes: Passes) -> int:
    """Bytes of the matrices after the heads in the passes' format."""
    out = (passes.cast if layer.trains_out else passes.cast_frozen) * layer.out
    return out + (passes.cast if layer.trains_mlp else passes.cast_frozen) * layer.mlp


def student_saved(work: Workload, tokens: int) -> dict[str, int]:
    """What an end-to-end stage keeps of a row for its backward pass, by part; ``casts``: weights in the passes' format.

    What it computes again (``stage.recompute``) is left out.
    """
    d, config = work.student.hidden_size, work.config
    # What flows between layers begins in the embeddings' format: trained ones lie in float32.
    flow = replace(work.passes, frozen=WIDE) if "embeddings" in config.train else work.passes
    last = tokens * (_norm_saved(work, flow) + flow.width * d)  # the final norm, its result
    if config.recompute == "layer":
        kept = sum(layer.gives_gradient for layer in work.layers)
        return {"layers' inputs": tokens * flow.frozen * d * kept, "norms and MLPs": last}
    parts = dict.fromkeys(("mixers", "softmax", "norms and MLPs", "casts of weights"), 0)
    parts["norms and MLPs"] = last
    for layer in work.layers:
        if layer.mixer.seeded or layer.trained or layer.reads_gradient:
            parts["mixers" if layer.mixer.seeded else "softmax"] += work.saved(layer, tokens)
        if layer.reads_gradient:  # it goes through the projections, and the norm before them
            parts["casts of weights"] += _mixer_casts(layer, work.passes)
            parts["norms and MLPs"] += tokens * _norm_saved(work, flow)
        if layer.gives_gradient and config.recompute == "mlp":
            parts["norms and MLPs"] += tokens * _finish_recomputed(work, layer, flow)
        elif layer.gives_gradient:
            parts["norms and MLPs"] += tokens * _finish_saved(work, layer, flow)
            parts["casts of weights"] += _finish_casts(layer, work.passes)
    return parts


def _recomputed(work: Workload, tokens: int) -> int:
    """What comes back, of one layer at a time, where a backward pass computes again: the most of any layer."""
    if work.config.recompute == "none":
        return 0
    found = []
    for layer in work.layers:
        size = tokens * _finish_saved(work, layer, work.passes) + _finish_casts(layer, work.passes)
        if work.config.recompute == "layer":
            size += work.saved(layer, tokens) + _mixer_casts(layer, work.passes)
        found.append(size)
    return max(found)


# ---------------------------------------------------------------------------------------------- moments of a step


def _moments(work: Workload, tokens: int) -> dict[str, dict[str, int]]:
    passed = {"teacher's pass": {"activations of the teacher": _teacher_passing(work, tokens)}}
    if work.stage.layer_local:
        return {**passed, **_layer_local_moments(work, tokens)}
    return {**(passed if work.stage.reads_teacher else {}), **_end_to_end_moments(work, tokens)}


def _teacher_passing(work: Workload, tokens: int) -> int:
    """One layer of the teacher: residual before and after, MLP's gate, SiLU, up, and a matrix in the passes' format."""
    d, passes = work.teacher.hidden_size, work.passes
    return max(
        tokens * (2 * passes.frozen * d + passes.width * (d + 3 * layer.stack.intermediate_size))
        + passes.cast_frozen * d * layer.stack.intermediate_size
        for layer in work.layers
    )


def _layer_local_moments(work: Workload, tokens: int) -> dict[str, dict[str, int]]:
    """Stages 1 and 2: the activations of one layer's mixer are alive at a time."""
    d, passes = work.teacher.hidden_size, work.passes
    heads = max(layer.heads for layer in work.layers)
    return {
        "a mixer's backward pass": {
            "activations of the teacher": tokens * (passes.frozen * d + passes.width * heads),
            "mixer, saved for backward": max(work.saved(layer, tokens) for layer in work.layers),
            "error of the heads": tokens * WIDE * heads,
            "casts of weights": passes.cast * work.moved_matrices,
            "workspace": tokens * (2 * WIDE * heads + passes.width * heads) + _mixer_workspace(work, tokens),
        }
    }


def _end_to_end_moments(work: Workload, tokens: int) -> dict[str, dict[str, int]]:
    d, passes = work.teacher.hidden_size, work.passes
    w, reads_teacher = passes.width, work.stage.reads_teacher
    given = passes.frozen * d + (w * d if reads_teacher else 0)
    saved = {f"{part}, saved for backward": size for part, size in student_saved(work, tokens).items()}
    shared = {"embeddings, teacher's hidden states" if reads_teacher else "embeddings": tokens * given, **saved}
    mlp = tokens * (2 * passes.frozen * d + 4 * w * max(layer.stack.intermediate_size for layer in work.layers))
    return {
        "logits": {**shared, "logits of a chunk, head": _logits(work, tokens)},
        "backward pass": {
            **shared,
            "computed again, of a layer": _recomputed(work, tokens),
            "workspace": max(mlp, _mixer_workspace(work, tokens)),
        },
    }


def _mixer_workspace(work: Workload, tokens: int) -> int:
    """The most that the backward pass of any new mixer needs beside what was kept for it."""
    return max(layer.mixer.backward_bytes(work.passes, tokens) for layer in work.layers if layer.mixer.seeded)


def _logits(work: Workload, tokens: int) -> int:
    """Logits of a chunk of tokens, the head in the passes' format for each model, the gradients to the hidden states
    and to a trained head.
    """
    passes, v, d = work.passes, work.teacher.vocab_size, work.teacher.hidden_size
    w = passes.width
    heads = 2 * w * v * d if "head" in work.config.train else 0  # a gradient, and the same scaled
    around = tokens * w * d + heads
    if not work.stage.reads_teacher:  # log-softmax, its gradient and that of its input
        return min(tokens, kl_tuning.CHUNK) * v * (3 * WIDE + passes.cast) + passes.cast_frozen * v * d + around
    if not passes.kernels:  # logits, both log-softmaxes and their inputs, probabilities, gradient
        return min(tokens, kl_tuning.CHUNK) * v * WIDE * 6 + around
    row = 2 * w * -(-v // kl_tuning.BLOCK) * kl_tuning.BLOCK
    return min(tokens * row, max(kl_tuning.MEMORY, 128 * row)) + 2 * passes.cast_frozen * v * d + around
