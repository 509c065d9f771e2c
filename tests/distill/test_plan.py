"""What a run is reckoned to need, against the modules: parameters, what autograd keeps, what PyTorch allocates."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmmamba.checkpoints import read_config
from mmmamba.data.packed_batch import Batch
from mmmamba.distill.dry_run import Allocated, DataSize, _first_steps, passes_of, plan_stages, random_models
from mmmamba.distill.objectives import AlignHeads, MatchLogits
from mmmamba.distill.parameters import unshare
from mmmamba.distill.plan import (
    BLOCK,
    DELTA_CHUNK,
    GPUS,
    LAUNCH,
    LOGITS,
    OVERHEAD,
    REPLAY,
    UNIT,
    Passes,
    count_parameters,
    greatest_row,
    mixer_saved,
    stage_memory,
    step_seconds,
    step_work,
    student_config,
    student_saved,
)
from mmmamba.distill.recipe import DistillRecipe, StageConfig, load_recipe
from mmmamba.distill.seeding import seed
from mmmamba.errors import UserError
from mmmamba.model import Mamba2Options, Model, ModelConfig
from mmmamba.model.geometries import GEOMETRIES, geometry
from mmmamba.model.mixers import ATTENTION, MAMBA2
from mmmamba.ops import packing
from small_run import STAGE1, STAGE2
from tiny import make_config

HOVLE = geometry("hovle-2.6b")
SHORT = replace(  # HoVLE's layers, five of them: PyTorch's tracing is slow, not what is traced
    HOVLE,
    embedding=replace(HOVLE.embedding, num_layers=2),
    decoder=replace(HOVLE.decoder, num_layers=3),
    layer_map=(),
)
OURS = Mamba2Options(rope=True, conv_activation="none")
UNIT_KEYS = Mamba2Options(rope=True, conv_activation="none", qk_norm=True)
DELTA = replace(UNIT_KEYS, rule="gated_delta")
MORE = [["o_proj"], ["mlp"], ["norms"], ["attention"], ["o_proj", "mlp", "norms", "attention", "embeddings", "head"]]


def stage(train: list[str] = STAGE2, **changes: Any) -> StageConfig:
    return StageConfig(**{"steps": 10, "batch_size": 2, "lr": 1e-3, "train": tuple(train), **changes})


def linear(teacher: ModelConfig, mixer: Mamba2Options = OURS) -> ModelConfig:
    return student_config(teacher, (MAMBA2,) * teacher.num_layers, mixer)


# ---------------------------------------------------------------------------------------------- parameters


def test_hovle_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in Model(HOVLE).parameters())
    unused = HOVLE.vocab_size * HOVLE.hidden_size  # a table that the published checkpoint holds and nothing reads
    assert (ours + unused) / 1e9 == pytest.approx(2.603, rel=0.002)


@pytest.mark.parametrize(("recipe", "share"), [("hovle-2.6b-linear-paper", 14.7), ("hovle-2.6b-hybrid-paper", 11.2)])
def test_the_trained_share_is_the_papers(recipe: str, share: float) -> None:
    plan = load_recipe(DistillRecipe, recipe)
    student = student_config(HOVLE, plan.layer_map(32), plan.mixer)
    counts = count_parameters(student, plan.stage2)  # all that any stage trains
    unused = HOVLE.vocab_size * HOVLE.hidden_size
    assert 100 * counts.moved / (counts.total + unused) == pytest.approx(share, abs=0.1)


def test_the_nano_geometry_is_the_built_in_teachers() -> None:
    built_in = read_config("nano-teacher")
    same = ("hidden_size", "vocab_size", "embedding", "decoder", "vision", "max_dynamic_patch", "layer_map")
    assert all(getattr(GEOMETRIES["nano"], name) == getattr(built_in, name) for name in same)


def test_an_unknown_geometry_is_named() -> None:
    with pytest.raises(UserError, match=r"no geometry is called 'hovle-2\.5b' \(did you mean 'hovle-2\.6b'\?\)"):
        geometry("hovle-2.5b")


# ---------------------------------------------------------------------------------------------- what autograd keeps


def packed(tokens: int) -> Batch:
    """A row of one sequence."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        tiles=torch.zeros(0, 1, 1, 3, dtype=torch.uint8),
        ids=[""],
        scored=torch.zeros(tokens - 1, dtype=torch.long),
    )


def kept_bytes(objective: Any, row: Batch, precision: torch.dtype, *models: Model) -> int:
    """Bytes that a pass keeps for its backward pass, parameters left out, each storage counted once."""
    own = {parameter.untyped_storage()._cdata for model in models for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later storage takes its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective.backward([row], precision)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are the GPU's kernels, of which only shapes are asked."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    for name in ("ssd", "gated_delta", "causal_conv", "norm", "gated_norm", "rotary", "kl", "swiglu"):
        monkeypatch.setattr(importlib.import_module(f"mmmamba.ops.{name}"), "serves", lambda *_, **__: True)
    monkeypatch.setattr("mmmamba.ops.linear.wide.splits", lambda x: True)
    for name in ("model.mixers.attention", "model.layer", "model.mixers.mamba2", "distill.losses"):
        # Parameters that only say their shapes stand for ordinary ones.
        monkeypatch.setattr(f"mmmamba.{name}.plain", lambda *_: True)


def traced(
    config: ModelConfig,
    mixer: Mamba2Options,
    tokens: int,
    make: Callable[[Model, Model], Any],
    frozen: torch.dtype = torch.float32,
    more: Sequence[str] = (),
) -> int:
    """Bytes kept by a pass in bfloat16 over fake tensors: every shape is real, and there is no memory behind it.

    Of ``more`` than the mixers (``o_proj``, ``mlp``) the student has its own.
    """
    known = packing.Layout([tokens], torch.device("cpu"))
    for name in ("sizes", "starts", "sequence", "offset", "last"):
        getattr(known, name)
    for size in (16, 32, 64, 128):
        known.begins(size, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(frozen)  # `to` is not for fake parameters
        teacher = Model(config)
        torch.set_default_dtype(torch.float32)
        own = Model(linear(config, mixer))
        for layer in range(config.num_layers) if "o_proj" not in more else ():
            own.mixer(layer).o_proj = teacher.mixer(layer).o_proj
        student = seed(teacher, mixer=mixer, aligned=own)
        for layer in range(config.num_layers) if "mlp" in more else ():
            student.layers[layer].mlp = own.layers[layer].mlp
        row = packed(tokens)
        packing._LAYOUTS[row.cu_seqlens] = known
        return kept_bytes(make(teacher, student), row, torch.bfloat16, teacher, own)


@pytest.mark.parametrize("mixer", [OURS, Mamba2Options(), UNIT_KEYS, DELTA])
@pytest.mark.parametrize("train", [STAGE2, ["dt_proj", "conv", "gate_proj", "norm", "q_proj", "k_proj", "v_proj"]])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_stage_3_keeps_what_is_reckoned_on_a_gpu(
    mixer: Mamba2Options, train: list[str], frozen: torch.dtype, on_kernels: None
) -> None:
    config, tokens = stage([*train, "beta_proj"] if mixer is DELTA else train), 2048
    measured = traced(SHORT, mixer, tokens, lambda teacher, student: MatchLogits(teacher, student, config), frozen)
    reckoned = sum(student_saved(linear(SHORT, mixer), config, Passes(frozen=frozen.itemsize), tokens).values())
    assert reckoned == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("train", [STAGE1, STAGE2])
def test_a_layer_local_stage_keeps_one_mixer_at_a_time(train: list[str], on_kernels: None) -> None:
    config, tokens = stage(train), 2048
    measured = traced(SHORT, OURS, tokens, lambda teacher, student: AlignHeads(teacher, student, config))
    one = mixer_saved(SHORT.hidden_size, SHORT.decoder, OURS, config, Passes(), tokens)
    error = tokens * 4 * SHORT.decoder.num_heads * SHORT.decoder.head_dim
    assert SHORT.num_layers * (one + error) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("tokens", [48, 512])
@pytest.mark.parametrize(
    ("layer_map", "mixer"),
    [
        *(((MAMBA2,) * 5, mixer) for mixer in (OURS, Mamba2Options(), UNIT_KEYS, DELTA)),
        ((ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2), OURS),
    ],
)
def test_stage_3_keeps_what_is_reckoned_on_a_cpu(layer_map: tuple[str, ...], mixer: Mamba2Options, tokens: int) -> None:
    teacher, config = Model(make_config()), stage()
    student = seed(teacher, layer_map, mixer)
    measured = kept_bytes(MatchLogits(teacher, student, config), packed(tokens), torch.float32, teacher, student)
    reckoned = sum(student_saved(student.config, config, Passes(width=4, kernels=False), tokens).values())
    assert reckoned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("more", MORE, ids="+".join)
def test_what_more_is_trained_keeps_what_is_reckoned(more: list[str]) -> None:
    teacher, config, tokens = Model(make_config()), stage([*STAGE2, *more]), 512
    student = seed(teacher, (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2), OURS)
    unshare(student, teacher, config.train)
    measured = kept_bytes(MatchLogits(teacher, student, config), packed(tokens), torch.float32, teacher, student)
    reckoned = sum(student_saved(student.config, config, Passes(width=4, kernels=False), tokens).values())
    assert reckoned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("more", [["o_proj"], ["mlp"], ["o_proj", "mlp"]], ids="+".join)
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_what_more_is_trained_keeps_what_is_reckoned_on_a_gpu(
    more: list[str], frozen: torch.dtype, on_kernels: None
) -> None:
    config, tokens = stage([*STAGE2, *more]), 2048
    measured = traced(SHORT, OURS, tokens, lambda teacher, own: MatchLogits(teacher, own, config), frozen, more)
    reckoned = sum(student_saved(linear(SHORT), config, Passes(frozen=frozen.itemsize), tokens).values())
    assert reckoned == pytest.approx(measured, rel=0.005)


def test_the_constants_are_the_kernels_own() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    kernel = importlib.import_module("mmmamba.ops.kl.tuning")
    assert (LOGITS, BLOCK) == (kernel.MEMORY, kernel.BLOCK)
    tuned = importlib.import_module("mmmamba.ops.gated_delta.tuning").TUNED
    assert tuned[64, 2].chunk == tuned[128, 2].chunk == DELTA_CHUNK


# ---------------------------------------------------------------------------------------------- what is allocated


def test_allocations_are_counted_until_they_are_freed() -> None:
    with Allocated(torch.device("cpu")) as allocated:
        kept = torch.zeros(1000)
        assert allocated.live == 4000
        view, inside = kept[10:], torch.ones(500)
        assert allocated.live == 6000
        del kept, inside
        assert (allocated.live, allocated.peak) == (4000, 6000)  # the view holds its storage
        allocated.reset()
        assert allocated.peak == 4000
        del view
        assert allocated.live == 0


EVERYTHING = [*STAGE2, "o_proj", "mlp", "norms", "embeddings", "head"]


STEPS: list[tuple[str, list[str]]] = [
    ("stage1", []),
    ("stage2", []),
    *(("stage3", [f"stage3.recompute={part}"]) for part in ("none", "mlp", "layer")),
    *(("stage3", [f"stage3.train={EVERYTHING}", f"stage3.recompute={part}"]) for part in ("none", "layer")),
    ("stage4", []),
    ("stage4", [f"stage3.train={EVERYTHING}"]),
    ("stage4", [f"stage3.train={EVERYTHING}", f"stage4.train={EVERYTHING}"]),
]
LAYERS = ("linear", "hybrid:4")


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    # Each step with one kind of layers in make test, with both in make test-all.
    [
        pytest.param(*step, layers, marks=[pytest.mark.slow] * (LAYERS[i % 2] != layers))
        for i, step in enumerate(STEPS)
        for layers in LAYERS
    ],
)
def test_a_real_step_takes_what_is_reckoned(name: str, changes: list[str], layers: str) -> None:
    teacher, cpu = make_config(), torch.device("cpu")
    last = f"stage4={{train: {STAGE2}, steps: 1, batch_size: 1, lr: 0.001}}"
    plan = load_recipe(DistillRecipe, "pico-linear", [f"layers={layers}", last, *changes])
    tokens = 1024
    data = DataSize(mean=tokens, length=tokens, longest=tokens, source="")
    one = next(one for one in plan_stages(plan, teacher, data, "h100") if one.name == name)
    one = replace(one, row=tokens)
    memory = one.reckon(teacher, passes_of(teacher, torch.float32, False))
    with Allocated(cpu) as allocated:
        models = random_models(plan, teacher, cpu, torch.float32)
        took = _first_steps(plan, one, *models, cpu, torch.float32, allocated)
    assert took is not None and took.seconds > 0
    assert memory.peak == pytest.approx(took.peak, rel=0.2)


def test_the_parts_add_up_to_the_peak() -> None:
    memory = stage_memory(HOVLE, linear(HOVLE), stage(), Passes(), 8192, layer_local=False)
    totals = {moment: sum(parts.values()) for moment, parts in memory.moments.items()}
    assert memory.peak == sum(memory.held.values()) + max(totals.values())
    assert totals[memory.peak_moment] == max(totals.values())
    assert memory.held["gradients, float32"] * 2 == memory.held["optimizer's moments, float32"]


def test_what_is_computed_anew_is_not_kept() -> None:
    """At HoVLE's size and 8,192 tokens: whole layers leave 15 GB, the MLPs 26 GB; nothing at all fits into 40 GB."""
    passes = Passes(frozen=2)
    peaks, flops = [], []
    for recompute in ("layer", "mlp", "none"):
        config = stage(recompute=recompute)
        peaks.append(stage_memory(HOVLE, linear(HOVLE), config, passes, 8192, layer_local=False).peak)
        flops.append(step_work(HOVLE, linear(HOVLE), config, 8192, layer_local=False)[0])
    assert peaks[0] < 15e9 < peaks[1] < 26e9 < peaks[2] < 40e9
    assert flops[0] > flops[1] > flops[2]


def test_memory_grows_linearly_with_the_row() -> None:
    sizes = [
        stage_memory(HOVLE, linear(HOVLE), stage(), Passes(), n, layer_local=False).peak for n in (8192, 12288, 16384)
    ]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.02)


@pytest.mark.parametrize("local", [True, False])
def test_the_greatest_row_is_the_last_that_fits(local: bool) -> None:
    work = (HOVLE, linear(HOVLE), stage(), Passes())
    row = greatest_row(*work, 40e9, layer_local=local)
    peaks = [stage_memory(*work, row + more, layer_local=local).peak for more in (0, UNIT)]
    assert peaks[0] + OVERHEAD <= 40e9 < peaks[1] + OVERHEAD
    assert greatest_row(*work, 5e9, layer_local=local) == 0  # not even the weights


# ---------------------------------------------------------------------------------------------- time


def test_work_is_two_flop_a_parameter_and_pass() -> None:
    """Stage 3: a forward pass of the teacher, of the student, and its backward pass, within what else they do."""
    flop, _ = step_work(HOVLE, linear(HOVLE), stage(), 1.0, layer_local=False)
    matrices = 32 * (2048 * (2048 + 2 * 1024 + 2048) + 3 * 2048 * 8192)
    passes = 2 * matrices + 4 * (matrices + 32 * 2048 * 2048) + 6 * 92_553 * 2048
    trained = 2 * 32 * 2048 * (2048 + 2 * 1024 + 2048)
    assert flop == pytest.approx(passes + trained, rel=0.06) and flop > passes + trained


def test_softmax_costs_more_the_longer_the_sequence() -> None:
    flops = [step_work(HOVLE, linear(HOVLE), stage(), n, layer_local=True)[0] for n in (1000, 2000)]
    assert flops[1] - flops[0] == pytest.approx(32 * 2 * 2048 * 1000)


def test_seconds() -> None:
    work = (HOVLE, linear(HOVLE), stage())
    seconds = {name: step_seconds(*work, gpu, 8192 * 64, 64, 8192, layer_local=False) for name, gpu in GPUS.items()}
    assert seconds["h200"] < seconds["h100"] < seconds["a100"] < seconds["rtx4090"]
    twice = step_seconds(*work, GPUS["h100"], 8192 * 128, 128, 8192, layer_local=False)
    assert twice == pytest.approx(2 * seconds["h100"], rel=0.01)
    small = (GEOMETRIES["nano"], linear(GEOMETRIES["nano"]))
    assert step_seconds(*small, stage(), GPUS["h100"], 100, 1, 100, layer_local=True) == 8 * LAUNCH
    assert step_seconds(*small, stage(graph=True), GPUS["h100"], 100, 1, 100, layer_local=True) == 8 * REPLAY
