"""The memory that a stage is estimated to need, against what the modules hold, keep and allocate."""

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
from workloads import DELTA, HOVLE, OURS, UNIT_KEYS, linear, stage, work

from mmmamba.checkpoints import read_config
from mmmamba.data.packed_batch import Batch
from mmmamba.distill.allocated import Allocated
from mmmamba.distill.first_steps import first_steps, random_models
from mmmamba.distill.gpus import OVERHEAD
from mmmamba.distill.memory_estimate import UNIT, greatest_row, stage_memory, student_saved
from mmmamba.distill.objectives import AlignHeads, MatchLogits
from mmmamba.distill.parameters import unshare
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.distill.sample_lengths import SampleLengths
from mmmamba.distill.seeding import seed
from mmmamba.distill.stage_estimate import estimate_stages, passes_of
from mmmamba.distill.time_estimate import step_work
from mmmamba.errors import UserError
from mmmamba.model import Mamba2Options, Model, ModelConfig
from mmmamba.model.geometries import GEOMETRIES, geometry
from mmmamba.model.mixers import ATTENTION, MAMBA2, Passes
from mmmamba.ops import packing
from small_run import STAGE1, STAGE2
from tiny import make_config

SHORT = replace(  # HoVLE's layers, five of them: PyTorch's tracing is slow, not what is traced
    HOVLE,
    embedding=replace(HOVLE.embedding, num_layers=2),
    decoder=replace(HOVLE.decoder, num_layers=3),
    layer_map=(),
)
ON_A_CPU = Passes(width=4, kernels=False)
MORE = [["o_proj"], ["mlp"], ["norms"], ["attention"], ["o_proj", "mlp", "norms", "attention", "embeddings", "head"]]


# ---------------------------------------------------------------------------------------------- parameters


def test_hovle_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in Model(HOVLE).parameters())
    unused = HOVLE.vocab_size * HOVLE.hidden_size  # a table that the published checkpoint holds and nothing reads
    assert (ours + unused) / 1e9 == pytest.approx(2.603, rel=0.002)


@pytest.mark.parametrize(("recipe", "share"), [("hovle-2.6b-linear-paper", 14.7), ("hovle-2.6b-hybrid-paper", 11.2)])
def test_the_trained_share_is_the_papers(recipe: str, share: float) -> None:
    plan = load_recipe(DistillRecipe, recipe)
    counts = work(plan.student_config(HOVLE), plan.stage2).counts  # all that any stage trains
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
def test_stage_3_keeps_what_is_estimated_on_a_gpu(
    mixer: Mamba2Options, train: list[str], frozen: torch.dtype, on_kernels: None
) -> None:
    config, tokens = stage([*train, "beta_proj"] if mixer is DELTA else train), 2048
    measured = traced(SHORT, mixer, tokens, lambda teacher, student: MatchLogits(teacher, student, config), frozen)
    passes = Passes(frozen=frozen.itemsize)
    estimated = sum(student_saved(work(linear(SHORT, mixer), config, passes=passes), tokens).values())
    assert estimated == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("train", [STAGE1, STAGE2])
def test_a_layer_local_stage_keeps_one_mixer_at_a_time(train: list[str], on_kernels: None) -> None:
    config, tokens = stage(train), 2048
    measured = traced(SHORT, OURS, tokens, lambda teacher, student: AlignHeads(teacher, student, config))
    aligning = work(linear(SHORT), config, "stage2")
    one = aligning.saved(aligning.layers[0], tokens)
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
def test_stage_3_keeps_what_is_estimated_on_a_cpu(
    layer_map: tuple[str, ...], mixer: Mamba2Options, tokens: int
) -> None:
    teacher, config = Model(make_config()), stage()
    student = seed(teacher, layer_map, mixer)
    measured = kept_bytes(MatchLogits(teacher, student, config), packed(tokens), torch.float32, teacher, student)
    estimated = sum(student_saved(work(student.config, config, passes=ON_A_CPU), tokens).values())
    assert estimated == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("more", MORE, ids="+".join)
def test_what_more_is_trained_keeps_what_is_estimated(more: list[str]) -> None:
    teacher, config, tokens = Model(make_config()), stage([*STAGE2, *more]), 512
    student = seed(teacher, (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2), OURS)
    unshare(student, teacher, config.train)
    measured = kept_bytes(MatchLogits(teacher, student, config), packed(tokens), torch.float32, teacher, student)
    estimated = sum(student_saved(work(student.config, config, passes=ON_A_CPU), tokens).values())
    assert estimated == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("more", [["o_proj"], ["mlp"], ["o_proj", "mlp"]], ids="+".join)
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_what_more_is_trained_keeps_what_is_estimated_on_a_gpu(
    more: list[str], frozen: torch.dtype, on_kernels: None
) -> None:
    config, tokens = stage([*STAGE2, *more]), 2048
    measured = traced(SHORT, OURS, tokens, lambda teacher, own: MatchLogits(teacher, own, config), frozen, more)
    passes = Passes(frozen=frozen.itemsize)
    estimated = sum(student_saved(work(linear(SHORT), config, passes=passes), tokens).values())
    assert estimated == pytest.approx(measured, rel=0.005)


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
def test_a_real_step_takes_what_is_estimated(name: str, changes: list[str], layers: str) -> None:
    teacher, cpu = make_config(), torch.device("cpu")
    last = f"stage4={{train: {STAGE2}, steps: 1, batch_size: 1, lr: 0.001}}"
    plan = load_recipe(DistillRecipe, "pico-linear", [f"layers={layers}", last, *changes])
    tokens = 512
    data = SampleLengths(mean=tokens, length=tokens, longest=tokens, source="")
    one = next(one for one in estimate_stages(plan, teacher, data, "h100") if one.name == name)
    one = replace(one, row=tokens)
    memory = one.memory_with(passes_of(teacher, torch.float32, False))
    with Allocated(cpu) as allocated:
        models = random_models(plan, teacher, cpu, torch.float32)
        took = first_steps(one, *models, cpu, torch.float32, allocated)
    assert took is not None and took.seconds > 0
    assert memory.peak == pytest.approx(took.peak, rel=0.2)


def test_the_parts_add_up_to_the_peak() -> None:
    memory = stage_memory(work(linear(HOVLE)), 8192)
    totals = {moment: sum(parts.values()) for moment, parts in memory.moments.items()}
    assert memory.peak == sum(memory.held.values()) + max(totals.values())
    assert totals[memory.peak_moment] == max(totals.values())
    assert memory.held["gradients, float32"] * 2 == memory.held["optimizer's moments, float32"]


def test_what_is_computed_again_is_not_kept() -> None:
    """At HoVLE's size and 8,192 tokens: whole layers leave 15 GB, the MLPs 26 GB; nothing at all fits into 40 GB."""
    peaks, flops = [], []
    for recompute in ("layer", "mlp", "none"):
        one = work(linear(HOVLE), stage(recompute=recompute), passes=Passes(frozen=2))
        peaks.append(stage_memory(one, 8192).peak)
        flops.append(step_work(one, 8192)[0])
    assert peaks[0] < 15e9 < peaks[1] < 26e9 < peaks[2] < 40e9
    assert flops[0] > flops[1] > flops[2]


def test_memory_grows_linearly_with_the_row() -> None:
    sizes = [stage_memory(work(linear(HOVLE)), n).peak for n in (8192, 12288, 16384)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.02)


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_the_greatest_row_is_the_last_that_fits(name: str) -> None:
    one = work(linear(HOVLE), name=name)
    row = greatest_row(one, 40e9)
    peaks = [stage_memory(one, row + more).peak for more in (0, UNIT)]
    assert peaks[0] + OVERHEAD <= 40e9 < peaks[1] + OVERHEAD
    assert greatest_row(one, 5e9) == 0  # not even the weights
