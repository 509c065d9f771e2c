"""What a distillation will need, reckoned before it runs: parameters, memory by part, tokens, hours.

Pure functions of the network's config, the stage's config and the size of a row of tokens. They follow what autograd
keeps of the modules in ``mmmamba.model`` and the objectives; tests hold them against what PyTorch allocates.

Letters as everywhere: ``d`` hidden, ``h`` heads, ``g`` key/value groups, ``p`` head dim (also the state dim), ``v``
vocabulary, ``q`` tokens a chunk of the recurrence. All sizes are in bytes, all work in FLOP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mmmamba.distill.parameters import kind_of, parameters_of
from mmmamba.distill.recipe import KINDS, MIXER_PARAMETERS, StageConfig
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import MAMBA2, Mamba2Options
from mmmamba.model.model import Model
from mmmamba.model.stack import StackConfig
from mmmamba.ops.kl.tuning import CHUNK as KL_CHUNK  # of the cross-entropy too
from mmmamba.ops.packing import chunk_size

WIDE = 4  # bytes of a trained weight, its gradient, a moment of AdamW
SSD_CHUNK, DELTA_CHUNK = 64, 64  # tokens a chunk of the recurrences' kernels (ops.ssd.tuning, ops.gated_delta.tuning)
LOGITS = 800_000_000  # bytes of logits that the KL's kernel has alive at once (ops.kl.tuning.MEMORY)
BLOCK = 2048  # and the multiple that it rounds the vocabulary up to
MATRICES = ("q_proj", "k_proj", "v_proj", "gate_proj")  # which autocast casts, once a row while they are trained
REST = ("o_proj", "mlp")  # the matrices behind the heads


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its maker states it: memory in bytes, dense bfloat16 FLOP/s, bytes/s of its memory."""

    memory: float
    rate: float
    bandwidth: float


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(memory=80e9, rate=989e12, bandwidth=3.35e12),  # SXM5
    "h200": Gpu(memory=141e9, rate=989e12, bandwidth=4.8e12),
    "a100": Gpu(memory=80e9, rate=312e12, bandwidth=2.04e12),  # SXM4, 80 GB
    "rtx4090": Gpu(memory=24e9, rate=165e12, bandwidth=1.01e12),  # with sums in float32
}
# Shares of those rates that a step is assumed to reach; large products alone reach 0.76 and copies 0.90 on an H100.
RATE_USED, BANDWIDTH_USED = 0.6, 0.7
# Seconds that a host takes to launch a layer's kernels for a row, in all passes (HoVLE's stage 1 on an H200's host);
# and a GPU to run them for a row of a small model when they are replayed from a graph (nano's stage 3 on an H100).
LAUNCH, REPLAY = 5e-3, 1.2e-3
UNIT, MOST_ROWS = 256, 4096  # rows are reckoned in units of so many tokens, up to so many units
OVERHEAD = 1.5e9  # bytes of GPU memory that the driver, cuBLAS and the allocator's gaps take


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How passes run: bytes of a value in them, of a frozen weight (and of what flows between layers), and whether the
    operators are the GPU's kernels or PyTorch's.
    """

    width: int = 2
    frozen: int = WIDE
    kernels: bool = True

    @property
    def cast(self) -> int:
        """Bytes of a float32 weight's copy in the passes' format."""
        return self.width * (self.width != WIDE)

    @property
    def cast_frozen(self) -> int:
        """The same of a frozen weight."""
        return self.width * (self.width != self.frozen)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a student in a stage: those trained by kind (``conv``, …), and all."""

    trained: Mapping[str, int]
    total: int

    @property
    def moved(self) -> int:
        return sum(self.trained.values())


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


# ---------------------------------------------------------------------------------------------- parameters


def student_config(teacher: ModelConfig, layer_map: Sequence[str], mixer: Mamba2Options) -> ModelConfig:
    """The config of the teacher's student."""
    return replace(teacher, layer_map=tuple(layer_map), mixer=mixer)


def count_parameters(student: ModelConfig, stage: StageConfig) -> Counts:
    """What ``stage`` trains and what it leaves frozen, by the modules themselves (without memory for them)."""
    with torch.device("meta"):
        model = Model(student)
    found = dict.fromkeys(KINDS, 0)
    for name, parameter in parameters_of(model, stage.train).items():
        found[kind_of(name, student)] += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return Counts(trained={kind: count for kind, count in found.items() if count}, total=total)


def _held(
    teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, owned: Collection[str]
) -> dict[str, int]:
    """Always there: the teacher whole, new mixers for all its layers (W_o shared), what else the student has copies of,
    gradients, AdamW's two moments.

    Of the matrices that Muon moves there is one.
    """
    counts = count_parameters(student, stage)
    moved = ("q_proj", "k_proj", "v_proj", "gate_proj", *REST)
    once = sum(counts.trained.get(kind, 0) for kind in moved) if stage.optimizer == "muon" else 0
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Model(teacher).parameters())
        aligned = Model(student_config(teacher, (MAMBA2,) * teacher.num_layers, student.options(MAMBA2)))
        copied = parameters_of(Model(student), sorted({*stage.train, *owned} - {*MIXER_PARAMETERS}))
    mixers = sum(parameter.numel() for parameter in parameters_of(aligned, MIXER_PARAMETERS).values())
    return {
        f"teacher's weights, {'float32' if passes.frozen == WIDE else 'bfloat16'}": passes.frozen * weights,
        "students' mixers, float32": WIDE * mixers,
        **({"student's copies of what it trains": WIDE * sum(p.numel() for p in copied.values())} if copied else {}),
        "gradients, float32": WIDE * counts.moved,
        "optimizer's moments, float32": WIDE * (2 * counts.moved - once),
    }


# ---------------------------------------------------------------------------------------------- activations


def mixer_saved(
    d: int, stack: StackConfig, mixer: Mamba2Options, stage: StageConfig, passes: Passes, tokens: int
) -> int:
    """What a Mamba-2 mixer keeps of ``tokens`` tokens, one sequence, for its backward pass (up to W_o)."""
    w, (h, g, p) = passes.width, (stack.num_heads, stack.num_kv_heads, stack.head_dim)
    heads, channels = h * p, (h + 2 * g) * p
    values = {"u": w * d, "step size": 2 * WIDE * h}  # what the projections read; softplus's input, and its result
    if w != WIDE and not passes.kernels:
        values["u, float32"] = WIDE * d * len({"dt_proj", "beta_proj"} & {*stage.train})
    if mixer.qk_norm:
        values["unit keys and queries"] = (w * p + (0 if passes.kernels else 2 * WIDE)) * (h + g)
    if mixer.rule == "gated_delta":
        values["strength"] = WIDE * h
        if passes.kernels:
            values["decays and inverses"] = h * (WIDE + w * DELTA_CHUNK)
    if passes.kernels:
        values["convolution and recurrence"] = 2 * w * channels  # the inputs of each
        values["norm and gate"] = 2 * w * heads
    else:
        values["convolution"] = w * channels * (mixer.conv_kernel + (mixer.conv_activation == "silu"))
        values["norm and gate"] = 5 * w * heads
    return tokens * sum(values.values()) + (0 if passes.kernels else _chunked_saved(stack, mixer, tokens))


def _chunked_saved(stack: StackConfig, mixer: Mamba2Options, tokens: int) -> int:
    """What the recurrence keeps of a sequence in PyTorch (``ops.ssd``, ``ops.gated_delta``), by whole chunks."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    q = chunk_size(tokens, p)
    if mixer.rule == "gated_delta":
        inside = 6 * h * q + 10 * h * p + 3 * g * p + 5 * h  # both products and the system; its sides, keys, queries
        between = h * p + 2 * h * p * p // q  # queries as decayed; the states that enter the chunks
    else:
        inside = 4 * h * q + 2 * h * p + 4 * g * p + 6 * h  # scores, decays, weights; C; weighted x; B, x
        between = 2 * h * p + 2 * h * p * p // q  # C as read and as decayed; the states that enter the chunks
    return WIDE * -(-tokens // q) * q * (inside + (between if tokens > q else 0))


def attention_saved(stack: StackConfig, passes: Passes, tokens: int) -> int:
    """What softmax attention keeps of ``tokens`` tokens when its input has a gradient and its weights have none."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    rows = 2 * h * p + 2 * g * p if passes.kernels else 3 * h * p + 4 * g * p  # q, k, v, y; or q, k, v padded too, y
    return tokens * (passes.width * rows + WIDE * h)


def finish_saved(d: int, stack: StackConfig, stage: StageConfig, passes: Passes, tokens: int, kind: str) -> int:
    """What follows the heads (W_o, norm, MLP): the norm's input; gate, up, in PyTorch also SiLU(gate).

    Trained matrices keep what they read too: W_o the heads (softmax, in the kernels, keeps its own), the MLP its input
    and their product.
    """
    w, wide = passes.width, stack.intermediate_size
    size = _norm(d, stage, passes) + (2 if passes.kernels else 3) * w * wide
    if "mlp" in stage.train:
        size += w * (d + wide)
    if _trains_out(kind, stage) and not (passes.kernels and kind != MAMBA2):
        size += w * stack.num_heads * stack.head_dim
    return tokens * size


def _norm(d: int, stage: StageConfig, passes: Passes) -> int:
    """What an RMSNorm keeps of a token: its input; in PyTorch the inverse root too, and a trained one the product."""
    if passes.kernels:
        return passes.frozen * d
    return passes.frozen * d * (1 + ("norms" in stage.train)) + WIDE


def _trains_out(kind: str, stage: StageConfig) -> bool:
    """Whether a stage moves the W_o of a layer with this mixer."""
    return ("o_proj" if kind == MAMBA2 else "attention") in stage.train


def finish_recomputed(d: int, stack: StackConfig, kind: str, passes: Passes, tokens: int, kept: bool) -> int:
    """What is left of it where it is computed anew: the heads, unless softmax keeps them, and the layer's input,
    unless the norm before the mixer keeps it.
    """
    heads = 0 if kind != MAMBA2 and passes.kernels else passes.width * stack.num_heads * stack.head_dim
    return tokens * (heads + (0 if kept else passes.frozen * d))


def student_saved(student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int) -> dict[str, int]:
    """What stage 3 keeps of a row for its backward pass, by part; ``casts``: weights in the passes' number format.

    What it computes anew (``stage.recompute``) is left out.
    """
    d, w = student.hidden_size, passes.width
    # What flows between layers begins in the embeddings' format: trained ones lie in float32.
    flow = replace(passes, frozen=WIDE) if "embeddings" in stage.train else passes
    new = [layer for layer, kind in enumerate(student.layer_map) if kind == MAMBA2 or "attention" in stage.train]
    everywhere = {"mlp", "norms", "embeddings"} & {*stage.train}
    trains = 0 if everywhere else new[0]  # the first layer that does: what is before it keeps nothing
    if stage.recompute == "layer":
        inputs = tokens * flow.frozen * d * (student.num_layers - trains)
        return {"layers' inputs": inputs, "norms and MLPs": tokens * (_norm(d, stage, flow) + w * d)}
    parts = dict.fromkeys(("mixers", "softmax", "norms and MLPs", "casts of weights"), 0)
    gradient = "embeddings" in stage.train  # whether the layer's input has one: from the first layer on that trains
    for layer, kind in enumerate(student.layer_map):
        stack = student.stack_of(layer)
        normed = gradient or "norms" in stage.train  # whether the mixer's input has one
        if kind == MAMBA2:
            parts["mixers"] += mixer_saved(d, stack, student.options(MAMBA2), stage, passes, tokens)
        elif normed or layer in new:
            parts["softmax"] += attention_saved(stack, passes, tokens) + tokens * w * d * (layer in new)
        sizes = _matrices(d, stack)
        if normed:  # it goes through the projections, and the norm before them
            names = MATRICES if kind == MAMBA2 else MATRICES[:3]
            parts["casts of weights"] += (passes.cast if layer in new else passes.cast_frozen) * _sum(sizes, names)
            parts["norms and MLPs"] += tokens * _norm(d, stage, flow)
        gradient = gradient or layer >= trains
        if gradient and stage.recompute == "mlp":
            parts["norms and MLPs"] += finish_recomputed(d, stack, kind, flow, tokens, normed)
        elif gradient:
            parts["norms and MLPs"] += finish_saved(d, stack, stage, flow, tokens, kind)
            parts["casts of weights"] += _finish_casts(sizes, stage, passes, kind)
    parts["norms and MLPs"] += tokens * (_norm(d, stage, flow) + w * d)  # the final norm, its result
    return parts


def _recomputed(student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int) -> int:
    """What comes back, of one layer at a time, where a backward pass computes anew: the greatest there is."""
    if stage.recompute == "none":
        return 0
    d, found = student.hidden_size, []
    for layer, kind in enumerate(student.layer_map):
        stack = student.stack_of(layer)
        sizes = _matrices(d, stack)
        size = finish_saved(d, stack, stage, passes, tokens, kind) + _finish_casts(sizes, stage, passes, kind)
        if stage.recompute == "layer" and kind == MAMBA2:
            size += mixer_saved(d, stack, student.options(MAMBA2), stage, passes, tokens)
            size += passes.cast * _sum(sizes, MATRICES)
        elif stage.recompute == "layer":
            trained = "attention" in stage.train
            size += attention_saved(stack, passes, tokens) + tokens * passes.width * d * trained
            size += (passes.cast if trained else passes.cast_frozen) * _sum(sizes, MATRICES[:3])
        found.append(size)
    return max(found)


def _finish_casts(sizes: Mapping[str, int], stage: StageConfig, passes: Passes, kind: str) -> int:
    """Bytes of the matrices behind the heads in the passes' format."""
    trained = {"o_proj": _trains_out(kind, stage), "mlp": "mlp" in stage.train}
    return sum((passes.cast if trained[name] else passes.cast_frozen) * sizes[name] for name in REST)


def _sum(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(sizes[name] for name in names)


def _matrices(d: int, stack: StackConfig) -> dict[str, int]:
    """Parameters of a layer's matrices; ``mlp`` is all three of the MLP."""
    heads, groups = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    sizes = {"q_proj": heads, "k_proj": groups, "v_proj": groups, "gate_proj": heads, "o_proj": heads}
    return {name: d * rows for name, rows in sizes.items()} | {"mlp": 3 * d * stack.intermediate_size}


def stage_memory(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int,
                 *, layer_local: bool, labels: bool = False, owned: Collection[str] = ()) -> Memory:  # fmt: skip
    """Memory of a stage whose rows hold ``tokens`` tokens, without the driver's.

    Args:
        teacher, student: their configs; a layer-local stage has a mixer in every layer.
        tokens: of a row; one sequence is reckoned with, all of it scored.
        layer_local: stages 1 and 2, where one layer's mixer is alive at a time; else stage 3 or 4.
        labels: stage 4, which learns from the answers alone, without the teacher's pass.
        owned: kinds of parameters that an earlier stage has made the student's own.
    """
    moments = _moments(teacher, student, stage, passes, tokens, layer_local, labels)
    return Memory(held=_held(teacher, student, stage, passes, owned), moments=moments)


def _moments(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int,
             layer_local: bool, labels: bool) -> dict[str, dict[str, int]]:  # fmt: skip
    d, w = teacher.hidden_size, passes.width
    stacks = [stack for stack in (teacher.embedding, teacher.decoder) if stack.num_layers]
    # One layer of the teacher: residual before and after, MLP's gate, SiLU, up, and a matrix in the passes' format.
    passing = max(
        tokens * (2 * passes.frozen * d + w * (d + 3 * s.intermediate_size))
        + passes.cast_frozen * d * s.intermediate_size
        for s in stacks
    )
    moments: dict[str, dict[str, int]] = {}
    if not labels:
        moments["teacher's pass"] = {"activations of the teacher": passing}
    if layer_local:
        heads = max(s.num_heads * s.head_dim for s in stacks)
        counts = count_parameters(student, stage)
        trained = sum(count for kind, count in counts.trained.items() if kind in MATRICES)
        moments["a mixer's backward pass"] = {
            "activations of the teacher": tokens * (passes.frozen * d + w * heads),
            "mixer, saved for backward": max(
                mixer_saved(d, s, student.options(MAMBA2), stage, passes, tokens) for s in stacks
            ),
            "error of the heads": tokens * WIDE * heads,
            "casts of weights": passes.cast * trained,
            "workspace": tokens * (2 * WIDE * heads + w * heads)
            + max(_recurrence(s, student.options(MAMBA2), passes, tokens) for s in stacks),
        }
        return moments
    saved = {
        f"{part}, saved for backward": size for part, size in student_saved(student, stage, passes, tokens).items()
    }
    given = passes.frozen * d + (0 if labels else w * d)
    shared = {"embeddings" if labels else "embeddings, teacher's hidden states": tokens * given, **saved}
    mlp = tokens * (2 * passes.frozen * d + 4 * w * max(s.intermediate_size for s in stacks))
    moments["logits"] = {**shared, "logits of a chunk, head": _logits(teacher, stage, passes, tokens, labels)}
    moments["backward pass"] = {
        **shared,
        "computed anew, of a layer": _recomputed(student, stage, passes, tokens),
        "workspace": max(mlp, *(_recurrence(s, student.options(MAMBA2), passes, tokens) for s in stacks)),
    }
    return moments


def _recurrence(stack: StackConfig, mixer: Mamba2Options, passes: Passes, tokens: int) -> int:
    """Workspace of the recurrence's backward pass: gradients of its inputs, and of states at chunk borders."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    inputs = tokens * passes.width * (2 * h + 2 * g) * p
    if passes.kernels and mixer.rule == "gated_delta":  # what is written, its gradient; dv and dk head by head
        inputs += tokens * passes.width * 4 * h * p
        return inputs + 2 * passes.width * -(-tokens // DELTA_CHUNK) * h * p * p
    if passes.kernels:
        return inputs + 2 * passes.width * -(-tokens // SSD_CHUNK) * h * p * p
    return inputs + tokens * WIDE * 2 * h * chunk_size(tokens, p)


def _logits(teacher: ModelConfig, stage: StageConfig, passes: Passes, tokens: int, labels: bool) -> int:
    """Logits of a chunk of tokens, the head in the passes' format for each model, the gradients to the hidden states
    and to a trained head.
    """
    v, d, w = teacher.vocab_size, teacher.hidden_size, passes.width
    heads = 2 * w * v * d if "head" in stage.train else 0  # a gradient, and the same scaled
    around = tokens * w * d + heads
    if labels:  # log-softmax, its gradient and that of its input
        return min(tokens, KL_CHUNK) * v * (3 * WIDE + passes.cast) + passes.cast_frozen * v * d + around
    if not passes.kernels:  # logits, both log-softmaxes and their inputs, probabilities, gradient
        return min(tokens, KL_CHUNK) * v * WIDE * 6 + around
    row = 2 * w * -(-v // BLOCK) * BLOCK
    return min(tokens * row, max(LOGITS, 128 * row)) + 2 * passes.cast_frozen * v * d + around


def greatest_row(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, memory: float,
                 *, layer_local: bool, labels: bool = False, owned: Collection[str] = ()) -> int:  # fmt: skip
    """The greatest row, in tokens by the :data:`UNIT`, with a peak that leaves :data:`OVERHEAD` of ``memory``, or 0."""
    room = memory - OVERHEAD - sum(_held(teacher, student, stage, passes, owned).values())

    def fits(rows: int) -> bool:
        moments = _moments(teacher, student, stage, passes, UNIT * rows, layer_local, labels)
        return max(sum(moment.values()) for moment in moments.values()) <= room

    low, high = 0, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return UNIT * low


# ---------------------------------------------------------------------------------------------- time


def step_work(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, length: float,
              *, layer_local: bool, labels: bool = False) -> tuple[float, float]:  # fmt: skip
    """(FLOP of matrix products, bytes of memory traffic) that a token of a step costs, weights not counted.

    Args:
        length: tokens of a token's own sequence, on average: softmax's work grows with it.

    A frozen matrix costs 2 FLOP a parameter forward and 2 for the gradient of its input, a trained one 2 more. What is
    computed anew (``stage.recompute``) costs its forward pass again, up to the last product that is needed.
    """
    d, w = teacher.hidden_size, 2
    flop = traffic = 0.0
    for layer in range(teacher.num_layers):
        stack = teacher.stack_of(layer)
        sizes, (h, g, p) = _matrices(d, stack), (stack.num_heads, stack.num_kv_heads, stack.head_dim)
        qkv = sizes["q_proj"] + sizes["k_proj"] + sizes["v_proj"]
        rest = sizes["o_proj"] + sizes["mlp"]
        softmax = 2 * h * p * length  # scores and their sum over values, half of them masked
        scan = 2 * h * (2 * SSD_CHUNK * p + 2 * p * p)  # inside a chunk; into and out of the state
        # Each value is written and read; norms and products read and write the residual and the MLP once each.
        around = w * 2 * (6 * d + 4 * stack.intermediate_size) + w * 2 * (3 * h + 4 * g) * p
        mixing = w * 2 * 2 * (4 * h + 4 * g) * p + WIDE * 2 * d
        if not labels:  # the teacher's pass
            flop += 2 * (qkv + rest) + softmax
            traffic += around
        new = student.layer_map[layer] == MAMBA2
        trained = sum(sizes[name] for name in (*MATRICES, *REST) if name in stage.train)
        if layer_local:
            flop += 2 * (qkv + sizes["gate_proj"] + trained) + 3.5 * scan
            traffic += 3 * mixing
        elif new:
            flop += 4 * (qkv + sizes["gate_proj"] + rest) + 2 * trained + 3.5 * scan
            traffic += 3 * (around + mixing)
        else:
            trained = qkv + sizes["o_proj"] if "attention" in stage.train else 0
            trained += sizes["mlp"] if "mlp" in stage.train else 0
            flop += 4 * (qkv + rest) + 2 * trained + 3.5 * softmax
            traffic += 3 * around
        if not layer_local and stage.recompute != "none":
            flop += 2 * (sizes["o_proj"] + 2 / 3 * sizes["mlp"])
            traffic += around
            if stage.recompute == "layer":
                flop += 2 * (qkv + new * sizes["gate_proj"]) + (scan if new else softmax)
                traffic += new * mixing
    if not layer_local:
        flop += (2 + (not labels) + ("head" in stage.train)) * 2 * teacher.vocab_size * d
        traffic += 4 * w * teacher.vocab_size
    return flop, traffic


def step_seconds(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, gpu: Gpu, tokens: float, rows: float,
                 length: float, *, layer_local: bool, labels: bool = False,
                 passes: Passes | None = None) -> float:  # fmt: skip
    """Seconds of a step of ``tokens`` tokens in ``rows`` rows on one GPU at the assumed shares of its rates.

    No less than what the host takes to launch it.
    """
    flop, traffic = step_work(teacher, student, stage, length, layer_local=layer_local, labels=labels)
    counts = count_parameters(student, stage)
    cast = (passes or Passes()).cast_frozen
    casts = (WIDE + 2 + 2 if cast else 2) * counts.total * (1 if layer_local or labels else 2)  # a pass: cast, read
    update = 7 * WIDE * counts.moved  # AdamW reads four tensors and writes three
    moved = tokens * traffic + rows * casts + update
    launched = rows * teacher.num_layers * (REPLAY if stage.graph else LAUNCH)
    return max(tokens * flop / (RATE_USED * gpu.rate) + moved / (BANDWIDTH_USED * gpu.bandwidth), launched)
