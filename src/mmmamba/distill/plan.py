"""What a distillation will need, reckoned before it runs: parameters, memory by part, tokens, hours.

Pure functions of the network's config, the stage's config and the size of a row of tokens. They follow what autograd
keeps of the modules in ``mmmamba.model`` and the objectives; tests hold them against what PyTorch allocates.

Letters as everywhere: ``d`` hidden, ``h`` heads, ``g`` key/value groups, ``p`` head dim (also the state dim), ``v``
vocabulary, ``q`` tokens a chunk of the recurrence. All sizes are in bytes, all work in FLOP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mmmamba.distill.objectives import mixer_parameters
from mmmamba.distill.recipe import MIXER_PARAMETERS, StageConfig
from mmmamba.model.config import MAMBA2, MixerConfig, ModelConfig, StackConfig
from mmmamba.model.model import Model
from mmmamba.ops.kl import CHUNK as KL_CHUNK
from mmmamba.ops.ssd import CHUNK as SSD_CHUNK

WIDE = 4  # bytes of a weight, a gradient, a moment of AdamW, the residual stream
LOGITS = 800_000_000  # bytes of logits that the KL's kernel has alive at once (mmmamba.ops.triton.kl.MEMORY)
BLOCK = 2048  # and the multiple that it rounds the vocabulary up to
MATRICES = ("q_proj", "k_proj", "v_proj", "gate_proj")  # which autocast casts, once a row while they are trained


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
# Seconds that a host takes to launch a layer's kernels for a row, in all passes; and a GPU to run the smallest ones
# when they are replayed from a graph. The nano models' steps on an H100 (20 ms replayed, else 53 to 80) gave them.
LAUNCH, REPLAY = 7e-3, 2.5e-3
UNIT, MOST_ROWS = 256, 4096  # rows are reckoned in units of so many tokens, up to so many units
OVERHEAD = 1.5e9  # bytes of GPU memory that the driver, cuBLAS and the allocator's gaps take


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How passes run: bytes of a value in them, and whether the operators are the GPU's kernels or PyTorch's."""

    width: int = 2
    kernels: bool = True


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


def student_config(teacher: ModelConfig, layer_map: Sequence[str], mixer: MixerConfig) -> ModelConfig:
    """The config of the teacher's student."""
    return replace(teacher, layer_map=tuple(layer_map), mixer=mixer)


def count_parameters(student: ModelConfig, stage: StageConfig) -> Counts:
    """What ``stage`` trains and what it leaves frozen, by the modules themselves (without memory for them)."""
    with torch.device("meta"):
        model = Model(student)
    found = dict.fromkeys(MIXER_PARAMETERS, 0)
    for name, parameter in mixer_parameters(model, stage.train).items():
        found[name.split(".")[3]] += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return Counts(trained={kind: count for kind, count in found.items() if count}, total=total)


def _held(teacher: ModelConfig, mixer: MixerConfig, counts: Counts, optimizer: str) -> dict[str, int]:
    """Always there: the teacher whole, new mixers for all its layers (W_o shared), gradients, AdamW's two moments.

    Of the matrices that Muon moves there is one.
    """
    once = sum(counts.trained.get(kind, 0) for kind in MATRICES) if optimizer == "muon" else 0
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Model(teacher).parameters())
        aligned = Model(student_config(teacher, (MAMBA2,) * teacher.num_layers, mixer))
    mixers = sum(parameter.numel() for parameter in mixer_parameters(aligned, MIXER_PARAMETERS).values())
    return {
        "teacher's weights, float32": WIDE * weights,
        "students' mixers, float32": WIDE * mixers,
        "gradients, float32": WIDE * counts.moved,
        "optimizer's moments, float32": WIDE * (2 * counts.moved - once),
    }


# ---------------------------------------------------------------------------------------------- activations


def mixer_saved(d: int, stack: StackConfig, mixer: MixerConfig, stage: StageConfig, passes: Passes, tokens: int) -> int:
    """What a Mamba-2 mixer keeps of ``tokens`` tokens, one sequence, for its backward pass (up to W_o)."""
    w, (h, g, p) = passes.width, (stack.num_heads, stack.num_kv_heads, stack.head_dim)
    heads, channels = h * p, (h + 2 * g) * p
    values = {"u": w * d, "step size": 2 * WIDE * h}  # what the projections read; softplus's input, and its result
    if w != WIDE and "dt_proj" in stage.train:
        values["u, float32"] = WIDE * d
    if passes.kernels:
        values["convolution and recurrence"] = 2 * w * channels  # the inputs of each
        values["norm and gate"] = 2 * w * heads
    else:
        values["convolution"] = w * channels * (mixer.conv_kernel + (mixer.conv_activation == "silu"))
        values["norm and gate"] = 5 * w * heads
    return tokens * sum(values.values()) + (0 if passes.kernels else _chunked_saved(stack, tokens))


def _chunked_saved(stack: StackConfig, tokens: int) -> int:
    """What the recurrence keeps of one sequence in PyTorch's operators (``ssd_chunked``), whole chunks of it."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    q = min(SSD_CHUNK, max(16, 1 << max(tokens - 1, 0).bit_length()))
    inside = 4 * h * q + h * p + h * p + 2 * g * p + 2 * g * p + 6 * h  # scores, decays, weights; C; weighted x; B, x
    between = 2 * h * p + 2 * h * p * p // q  # C as read and as decayed; the states that enter the chunks
    return WIDE * -(-tokens // q) * q * (inside + (between if tokens > q else 0))


def attention_saved(stack: StackConfig, passes: Passes, tokens: int) -> int:
    """What softmax attention keeps of ``tokens`` tokens when its input has a gradient and its weights have none."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    rows = 4 * h * p if passes.kernels else 3 * h * p + 4 * g * p  # q, k, v expanded, y; or q, k, v padded too, y
    return tokens * (passes.width * rows + WIDE * h)


def finish_saved(d: int, stack: StackConfig, passes: Passes, tokens: int) -> int:
    """What follows the heads (W_o, norm, MLP, frozen all): the norm's input, and gate, SiLU(gate), up."""
    return tokens * (WIDE * d + WIDE + 3 * passes.width * stack.intermediate_size)


def student_saved(student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int) -> dict[str, int]:
    """What stage 3 keeps of a row for its backward pass, by part; ``casts``: weights in the passes' number format."""
    d, w = student.hidden_size, passes.width
    cast = w * (w != WIDE)  # bytes of a weight's cast
    parts = dict.fromkeys(("mixers", "softmax", "norms and MLPs", "casts of weights"), 0)
    gradient = False  # whether the layer's input has one: from the first layer on that trains
    for layer, kind in enumerate(student.layer_map):
        stack = student.stack_of(layer)
        if kind == MAMBA2:
            parts["mixers"] += mixer_saved(d, stack, student.mixer, stage, passes, tokens)
        elif gradient:
            parts["softmax"] += attention_saved(stack, passes, tokens)
        sizes = _matrices(d, stack)
        if gradient:  # which goes through the projections, and the norm before them
            parts["casts of weights"] += cast * sum(sizes[name] for name in MATRICES[: 3 + (kind == MAMBA2)])
            parts["norms and MLPs"] += tokens * (WIDE * d + WIDE)
        gradient = gradient or kind == MAMBA2
        if gradient:
            parts["norms and MLPs"] += finish_saved(d, stack, passes, tokens)
            parts["casts of weights"] += cast * (sizes["o_proj"] + sizes["mlp"])
    parts["norms and MLPs"] += tokens * (WIDE * d + WIDE + w * d)  # the final norm, its result
    return parts


def _matrices(d: int, stack: StackConfig) -> dict[str, int]:
    """Parameters of a layer's matrices; ``mlp`` is all three of the MLP."""
    heads, groups = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    sizes = {"q_proj": heads, "k_proj": groups, "v_proj": groups, "gate_proj": heads, "o_proj": heads}
    return {name: d * rows for name, rows in sizes.items()} | {"mlp": 3 * d * stack.intermediate_size}


def stage_memory(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int,
                 *, layer_local: bool) -> Memory:  # fmt: skip
    """Memory of a stage whose rows hold ``tokens`` tokens, without the driver's.

    Args:
        teacher, student: their configs; a layer-local stage has a mixer in every layer.
        tokens: of a row; one sequence is reckoned with.
        layer_local: stages 1 and 2, where one layer's mixer is alive at a time; else stage 3.
    """
    counts = count_parameters(student, stage)
    moments = _moments(teacher, student, stage, passes, tokens, counts, layer_local)
    return Memory(held=_held(teacher, student.mixer, counts, stage.optimizer), moments=moments)


def _moments(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, tokens: int,
             counts: Counts, layer_local: bool) -> dict[str, dict[str, int]]:  # fmt: skip
    d, w = teacher.hidden_size, passes.width
    stacks = [stack for stack in (teacher.embedding, teacher.decoder) if stack.num_layers]
    # One layer of the teacher: residual before and after, MLP's gate, SiLU, up, and a matrix in the passes' format.
    passing = max(
        tokens * (2 * WIDE * d + w * (d + 3 * s.intermediate_size)) + (w * d * s.intermediate_size if w != WIDE else 0)
        for s in stacks
    )
    moments: dict[str, dict[str, int]] = {"teacher's pass": {"activations of the teacher": passing}}
    if layer_local:
        heads = max(s.num_heads * s.head_dim for s in stacks)
        trained = sum(count for kind, count in counts.trained.items() if kind in MATRICES)
        moments["a mixer's backward pass"] = {
            "activations of the teacher": tokens * (WIDE * d + w * heads),
            "mixer, saved for backward": max(mixer_saved(d, s, student.mixer, stage, passes, tokens) for s in stacks),
            "error of the heads": tokens * WIDE * heads,
            "casts of weights": w * trained if w != WIDE else 0,
            "workspace": tokens * (2 * WIDE * heads + w * heads) + max(_recurrence(s, passes, tokens) for s in stacks),
        }
        return moments
    saved = {
        f"{part}, saved for backward": size for part, size in student_saved(student, stage, passes, tokens).items()
    }
    shared = {"embeddings, teacher's hidden states": tokens * (WIDE * d + w * d), **saved}
    mlp = tokens * (2 * WIDE * d + 4 * w * max(s.intermediate_size for s in stacks))
    moments["logits"] = {**shared, "logits of a chunk, head": _logits(teacher, passes, tokens)}
    moments["backward pass"] = {**shared, "workspace": max(mlp, *(_recurrence(s, passes, tokens) for s in stacks))}
    return moments


def _recurrence(stack: StackConfig, passes: Passes, tokens: int) -> int:
    """Workspace of the recurrence's backward pass: gradients of its inputs, and of states at chunk borders."""
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    inputs = tokens * passes.width * (2 * h + 2 * g) * p
    if passes.kernels:
        return inputs + 2 * passes.width * -(-tokens // SSD_CHUNK) * h * p * p
    return inputs + tokens * WIDE * 2 * h * SSD_CHUNK


def _logits(teacher: ModelConfig, passes: Passes, tokens: int) -> int:
    """Both logits of a chunk of tokens, the head in the passes' format for each, the gradient to the hidden states."""
    v, d, w = teacher.vocab_size, teacher.hidden_size, passes.width
    if not passes.kernels:  # logits, both log-softmaxes and their inputs, probabilities, gradient
        return min(tokens, KL_CHUNK) * v * WIDE * 6 + tokens * w * d
    row = 2 * w * -(-v // BLOCK) * BLOCK
    return min(tokens * row, max(LOGITS, 128 * row)) + 2 * w * v * d * (w != WIDE) + tokens * w * d


def greatest_row(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, passes: Passes, memory: float,
                 *, layer_local: bool) -> int:  # fmt: skip
    """The greatest row, in tokens by the :data:`UNIT`, with a peak that leaves :data:`OVERHEAD` of ``memory``, or 0."""
    counts = count_parameters(student, stage)
    room = memory - OVERHEAD - sum(_held(teacher, student.mixer, counts, stage.optimizer).values())

    def fits(rows: int) -> bool:
        moments = _moments(teacher, student, stage, passes, UNIT * rows, counts, layer_local)
        return max(sum(moment.values()) for moment in moments.values()) <= room

    low, high = 0, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return UNIT * low


# ---------------------------------------------------------------------------------------------- time


def step_work(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, length: float,
              *, layer_local: bool) -> tuple[float, float]:  # fmt: skip
    """(FLOP of matrix products, bytes of memory traffic) that a token of a step costs, weights not counted.

    Args:
        length: tokens of a token's own sequence, on average: softmax's work grows with it.

    A frozen matrix costs 2 FLOP a parameter forward and 2 for the gradient of its input, a trained one 2 more.
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
        flop += 2 * (qkv + rest) + softmax
        traffic += around
        new = student.layer_map[layer] == MAMBA2
        trained = sum(sizes[name] for name in MATRICES if name in stage.train)
        if layer_local:
            flop += 2 * (qkv + sizes["gate_proj"] + trained) + 3.5 * scan
            traffic += 3 * mixing
        elif new:
            flop += 4 * (qkv + sizes["gate_proj"] + rest) + 2 * trained + 3.5 * scan
            traffic += 3 * (around + mixing)
        else:
            flop += 4 * (qkv + rest) + 3.5 * softmax
            traffic += 3 * around
    if not layer_local:
        flop += 3 * 2 * teacher.vocab_size * d
        traffic += 4 * w * teacher.vocab_size
    return flop, traffic


def step_seconds(teacher: ModelConfig, student: ModelConfig, stage: StageConfig, gpu: Gpu, tokens: float, rows: float,
                 length: float, *, layer_local: bool) -> float:  # fmt: skip
    """Seconds of a step of ``tokens`` tokens in ``rows`` rows on one GPU at the assumed shares of its rates.

    No less than what the host takes to launch it.
    """
    flop, traffic = step_work(teacher, student, stage, length, layer_local=layer_local)
    counts = count_parameters(student, stage)
    casts = (WIDE + 2 + 2) * counts.total * (1 if layer_local else 2)  # read, write, read again: for each pass of a row
    update = 7 * WIDE * counts.moved  # AdamW reads four tensors and writes three
    moved = tokens * traffic + rows * casts + update
    launched = rows * teacher.num_layers * (REPLAY if stage.graph else LAUNCH)
    return max(tokens * flop / (RATE_USED * gpu.rate) + moved / (BANDWIDTH_USED * gpu.bandwidth), launched)
