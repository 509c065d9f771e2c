"""``mmmamba distill RECIPE --dry-run``: what a run will need, and whether its first step fits, before it runs."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmmamba.checkpoints import fingerprint, read_config, resolve
from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import UNSCORED, Processor
from mmmamba.data.sample import BadSample
from mmmamba.distill.objectives import AlignHeads, MatchLogits, PredictAnswers
from mmmamba.distill.parameters import check_stages, unshare
from mmmamba.distill.plan import (
    BANDWIDTH_USED,
    GPUS,
    LAUNCH,
    MOST_ROWS,
    OVERHEAD,
    RATE_USED,
    REPLAY,
    UNIT,
    Counts,
    Memory,
    Passes,
    count_parameters,
    greatest_row,
    stage_memory,
    step_seconds,
    step_work,
    student_config,
)
from mmmamba.distill.recipe import ALIGNMENT, KINDS, MIXER_PARAMETERS, DistillRecipe, StageConfig, label
from mmmamba.distill.run_folder import MANIFEST, check_run
from mmmamba.distill.seeding import seed
from mmmamba.distill.training_data import check_sources, identity_of, source_paths
from mmmamba.distill.training_step import make_step
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.geometries import geometry as named_geometry
from mmmamba.model.mixers import MAMBA2
from mmmamba.model.model import Model
from mmmamba.ops.dispatch import SIZES
from mmmamba.outputs import check_folder
from mmmamba.progress import Progress
from mmmamba.report.table import Table, show, table_of

SAMPLED = 256  # samples of each source that are looked at
CPU_WORK, CPU_MEMORY = 1e12, 4e9  # FLOP and bytes up to which a CPU takes real steps: about half a minute


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """How long samples are: the mean, the mean over tokens of their own sample's length, the longest that may come.

    ``source`` says where that is from, ``bad`` what is wrong with the first bad sample.
    """

    mean: float
    length: float
    longest: int
    source: str
    bad: str = ""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, reckoned through on the GPU that was named."""

    name: str
    config: StageConfig
    student: ModelConfig
    layer_local: bool
    labels: bool = False  # no teacher: the answers alone
    owned: tuple[str, ...] = ()  # kinds that an earlier stage has made the student's own
    row: int  # tokens of the greatest row
    tokens: float  # of a step
    rows: float  # of a step
    counts: Counts
    memory: Memory
    fitting: int  # tokens of the greatest row that fits the GPU
    seconds: float  # of a step

    def reckon(self, teacher: ModelConfig, passes: Passes) -> Memory:
        """Its memory where passes run otherwise than on that GPU."""
        return stage_memory(
            teacher, self.student, self.config, passes, self.row,
            layer_local=self.layer_local, labels=self.labels, owned=self.owned,
        )  # fmt: skip


def dry_run(
    plan: DistillRecipe,
    *,
    geometry: str | None,
    gpu: str,
    device: torch.device,
    precision: torch.dtype,
    out: Path,
    resume: bool = False,
) -> None:
    """Print what ``plan`` needs, then take real first steps on random data where that can be done.

    What a run would refuse is refused here, as far as it is there to be looked at: with a ``geometry`` neither teacher
    nor data have to be.

    Raises:
        UserError: as a run in ``out`` would; when there is neither a teacher folder nor a geometry; when a real step
            does not fit.
    """
    teacher = teacher_config(plan.teacher, geometry)
    check_stages(plan, replace(teacher, layer_map=plan.layer_map(teacher.num_layers), mixer=plan.mixer))
    identity = None
    if geometry is None:
        check_sources(plan.data)
        if resume and (out / MANIFEST).is_file():
            identity = {
                "kind": "distill",
                "teacher": fingerprint(resolve(plan.teacher)),
                "data": identity_of(plan.data),
            }
    check_folder(out, read=[] if geometry is not None else [resolve(plan.teacher)])
    check_run(out, plan, identity, resume=resume)
    data = data_size(plan)
    stages = plan_stages(plan, teacher, data, gpu)
    for table in tables(stages, gpu):
        show(table)
    named = GPUS[gpu]
    print(f"Samples: {data.source}; {data.mean:,.0f} tokens on average.")
    frozen = "float32" if plan.frozen_dtype(torch.bfloat16) == torch.float32 else "bfloat16"
    print(
        f"Reckoned with bfloat16 passes over {frozen} weights on one {gpu}, at {RATE_USED:.0%} of its matrix rate of "
        f"{named.rate / 1e12:.0f} TFLOP/s and {BANDWIDTH_USED:.0%} of its {named.bandwidth / 1e12:.2f} TB/s. The "
        f"host takes {1000 * LAUNCH:g} ms to launch a layer's kernels for a row ({1000 * REPLAY:g} ms in a graph), the "
        f"driver {OVERHEAD / 1e9:.1f} GB. Reading and decoding the data is not part of it."
    )
    rehearse(plan, teacher, stages, device, precision)
    if data.bad and plan.data.on_bad_sample == "stop":
        raise UserError(f"{data.bad}: a run stops there; --on-bad-sample skip leaves such samples out")


def teacher_config(teacher: str, geometry: str | None) -> ModelConfig:
    """The geometry of that name or, without one, what the teacher's folder says; no weight is read."""
    if geometry is not None:
        return named_geometry(geometry)
    try:
        config = read_config(resolve(teacher))
    except UserError as error:
        raise UserError(f"{error} (--geometry hovle-2.6b reckons without the folder)") from error
    if config.new_layers:
        layer = config.new_layers[0]
        raise UserError(f"{teacher}: layer {layer} is Mamba-2; a teacher has softmax attention in every layer")
    return config


def data_size(plan: DistillRecipe) -> DataSize:
    """Lengths of some samples of each source, spread evenly over it, weighted as the recipe mixes them.

    Without the data, or without a teacher folder to encode them, every sample is taken to fill what it may.
    """
    config = plan.data
    paths = source_paths(config)
    try:
        processor = Processor.from_folder(plan.teacher)
        datasets = [JsonlDataset(path) for path in paths]
    except UserError as error:
        full = min(config.max_length, plan.stage1.micro_tokens)
        source = f"not measured ({error}); each is taken to fill what it may"
        return DataSize(mean=full, length=full, longest=config.max_length, source=source)
    mean = squares = weights = 0.0
    longest, looked, bad, first_bad = 0, 0, 0, ""
    for dataset, source_config in zip(datasets, config.sources, strict=True):
        encoded = EncodedSource(dataset, processor, max_length=config.max_length, max_tiles=config.max_tiles)
        found = []
        for row in np.unique(np.linspace(0, len(encoded) - 1, SAMPLED).astype(int)) if len(encoded) else ():
            try:
                found.append(len(encoded.encode(int(row)).input_ids))
            except BadSample as error:
                bad += 1
                first_bad = first_bad or str(error)
        if found:
            mean += source_config.weight * float(np.mean(found))
            squares += source_config.weight * float(np.mean(np.square(found)))
            weights += source_config.weight
        looked += len(found)
        longest = max([longest, *found]) if len(encoded) <= SAMPLED else config.max_length
    if not mean:
        raise UserError(f"{paths[0]}: none of the samples that were looked at is good; see mmmamba data check")
    said = f"{looked:,} samples of {len(paths)} sources" + (f"; {bad} more are bad: mmmamba data check" if bad else "")
    return DataSize(mean=mean / weights, length=squares / mean, longest=longest, source=said, bad=first_bad)


def plan_stages(plan: DistillRecipe, teacher: ModelConfig, data: DataSize, gpu: str) -> list[StagePlan]:
    """The stages of a recipe on a GPU of :data:`GPUS`."""
    layer_map = plan.layer_map(teacher.num_layers)
    owned = tuple(kind for kind in plan.stage3.train if kind not in MIXER_PARAMETERS)
    found = []
    for name, config in plan.stages.items():
        local, labels = name in ALIGNMENT, name == "stage4"
        student = student_config(teacher, (MAMBA2,) * teacher.num_layers if local else layer_map, plan.mixer)
        row = min(max(config.micro_tokens, data.longest), config.batch_size * data.longest)
        passes = passes_of(teacher, torch.bfloat16, frozen=plan.frozen_dtype(torch.bfloat16))
        tokens = config.batch_size * data.mean
        rows = max(1.0, tokens / row)
        work = (teacher, student, config)
        own = owned if labels else ()
        found.append(
            StagePlan(
                name=name,
                config=config,
                student=student,
                layer_local=local,
                labels=labels,
                owned=own,
                row=row,
                tokens=tokens,
                rows=rows,
                counts=count_parameters(student, config),
                memory=stage_memory(*work, passes, row, layer_local=local, labels=labels, owned=own),
                fitting=greatest_row(*work, passes, GPUS[gpu].memory, layer_local=local, labels=labels, owned=own),
                seconds=step_seconds(
                    *work, GPUS[gpu], tokens, rows, data.length, layer_local=local, labels=labels, passes=passes
                ),
            )
        )
    return found


def passes_of(
    teacher: ModelConfig, precision: torch.dtype, kernels: bool = True, frozen: torch.dtype = torch.float32
) -> Passes:
    """How passes run in ``precision``; PyTorch's operators serve float32, and heads that no kernel is built for."""
    served = all(s.head_dim in SIZES["head_dim"] for s in (teacher.embedding, teacher.decoder) if s.num_layers)
    kernels = kernels and served and precision != torch.float32
    return Passes(width=precision.itemsize, frozen=frozen.itemsize, kernels=kernels)


# ---------------------------------------------------------------------------------------------- tables


def tables(stages: Sequence[StagePlan], gpu: str) -> list[Table]:
    """Parameters, memory, and tokens with hours, each with a column a stage."""
    names = [stage.name for stage in stages]
    kinds = [kind for kind in KINDS if any(kind in stage.counts.trained for stage in stages)]
    parameters: list[Sequence[Any]] = [(label(k), *(s.counts.trained.get(k) for s in stages)) for k in kinds]
    parameters += [
        ("trained", *(s.counts.moved for s in stages)),
        ("share", *(f"{100 * s.counts.moved / s.counts.total:.1f} %" for s in stages)),
        ("frozen", *(s.counts.total - s.counts.moved for s in stages)),
    ]
    on_top = [stage.memory.moments[stage.memory.peak_moment] for stage in stages]
    unit, name = _unit(stage.memory for stage in stages)

    def size(value: float | None) -> str | None:
        return None if value is None else f"{value / unit:,.2f}"

    memory: list[Sequence[Any]] = [("tokens of a row", *(s.row for s in stages))]
    held = dict.fromkeys(part for s in stages for part in s.memory.held)
    memory += [(part, *(size(s.memory.held.get(part)) for s in stages)) for part in held]
    parts = dict.fromkeys(part for parts in on_top for part in parts)
    memory += [(part, *(size(parts.get(part)) for parts in on_top)) for part in parts]
    memory += [("peak", *(size(s.memory.peak) for s in stages))]
    for moment in dict.fromkeys(moment for s in stages for moment in s.memory.moments):
        memory.append((f"in all in {moment}", *(size(_in_all(s.memory, moment)) for s in stages)))
    memory += [
        (f"fits {gpu} ({GPUS[gpu].memory / 1e9:.0f} GB)", *("yes" if s.row <= s.fitting else "no" for s in stages)),
        ("greatest row that would", *(s.fitting if s.fitting < UNIT * MOST_ROWS else "over a million" for s in stages)),
    ]
    tokens = [s.config.steps * s.tokens for s in stages]
    hours = [s.config.steps * s.seconds / 3600 for s in stages]
    work: list[Sequence[Any]] = [
        ("steps", *(s.config.steps for s in stages), sum(s.config.steps for s in stages)),
        ("samples a step", *(s.config.batch_size for s in stages), None),
        ("tokens a step", *(round(s.tokens) for s in stages), None),
        ("rows a step", *(round(s.rows, 1) for s in stages), None),
        ("tokens", *(round(n) for n in tokens), round(sum(tokens))),
        ("seconds a step", *(s.seconds for s in stages), None),
        ("hours", *hours, sum(hours)),
    ]
    return [
        table_of("Parameters", ("", *names), parameters),
        table_of(f"Memory, {name}", ("", *names), memory),
        table_of(f"Work on one {gpu}", ("", *names, "all"), work),
    ]


def _unit(memories: Iterable[Memory]) -> tuple[float, str]:
    """The unit that peaks of this size are read in."""
    return (1e9, "GB") if max(memory.peak for memory in memories) >= 1e9 else (1e6, "MB")


def _in_all(memory: Memory, moment: str) -> int | None:
    """All that is in use at a moment, where a stage has it."""
    if moment not in memory.moments:
        return None
    return sum(memory.held.values()) + sum(memory.moments[moment].values())


# ---------------------------------------------------------------------------------------------- real steps


def rehearse(
    plan: DistillRecipe, teacher: ModelConfig, stages: Sequence[StagePlan], device: torch.device, precision: torch.dtype
) -> None:
    """Take the first steps of every stage on random weights and tokens; print what they took beside what was reckoned.

    On a CPU only where the model is small enough. Graphs and compilation are left out.

    Raises:
        UserError: when a stage's rows do not fit.
    """
    on_gpu = device.type == "cuda"
    passes = passes_of(teacher, precision, kernels=on_gpu, frozen=plan.frozen_dtype(precision))
    reckoned = {s.name: s.reckon(teacher, passes) for s in stages}
    work = sum(
        3 * s.row * step_work(teacher, s.student, s.config, s.row, layer_local=s.layer_local, labels=s.labels)[0]
        for s in stages
    )
    if not on_gpu and (work > CPU_WORK or max(memory.peak for memory in reckoned.values()) > CPU_MEMORY):
        print("No real step was taken: there is no GPU here, and for a CPU the model or its rows are too large.")
        return
    unit, unit_name = _unit(reckoned.values())
    rows: list[Sequence[Any]] = []
    failed = None
    with Allocated(device) as allocated, Progress("first steps", total=len(stages)) as progress:
        try:
            model, aligned = random_models(plan, teacher, device, plan.frozen_dtype(precision))
        except torch.OutOfMemoryError as error:
            raise UserError("the teacher's weights and the students' mixers alone do not fit into this GPU") from error
        for stage in stages:
            expected = reckoned[stage.name].peak
            took = _first_steps(plan, stage, model, aligned, device, precision, allocated)
            if took is None:
                failed = failed or stage
                rows.append((stage.name, stage.row, expected / unit, None, "did not fit", None, None))
            else:
                difference = f"{100 * (took.peak / expected - 1):+.0f} %"
                hours = took.seconds * stage.tokens / stage.row * stage.config.steps / 3600
                rows.append((stage.name, stage.row, expected / unit, took.peak / unit, difference, took.seconds, hours))
            progress.advance()
    name = torch.cuda.get_device_name(device) if on_gpu else "this CPU"
    columns = ("stage", "tokens of a row", f"reckoned peak, {unit_name}", f"measured, {unit_name}", "difference",
               "seconds a row", "hours of the stage")  # fmt: skip
    show(table_of(f"First steps on {name}, random weights and tokens", columns, rows))
    if failed is not None:
        total = total_memory(device)
        most = greatest_row(
            teacher, failed.student, failed.config, passes, total,
            layer_local=failed.layer_local, labels=failed.labels, owned=failed.owned,
        )  # fmt: skip
        raise UserError(
            f"{failed.name}: rows of {failed.row:,} tokens do not fit into this GPU's {total / 1e9:.0f} GB; "
            + (f"{most:,} should (micro_tokens, and max_length of the data)" if most else "nor would any other")
        )


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


@dataclass(frozen=True)
class Took:
    """What a step took: its peak in bytes, and seconds of a row."""

    peak: int
    seconds: float


def random_models(
    plan: DistillRecipe, teacher: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Model, Model]:
    """A random teacher in ``dtype``, and the student that stages 1 and 2 align with it."""
    with torch.device(device):
        model = Model(teacher).to(dtype)
    return model, seed(model, mixer=plan.mixer, seed=plan.seed, init=plan.init, dtype=torch.float32)


def _first_steps(
    plan: DistillRecipe,
    stage: StagePlan,
    model: Model,
    aligned: Model,
    device: torch.device,
    precision: torch.dtype,
    allocated: Allocated,
) -> Took | None:
    """Two steps of a stage; None when they do not fit.

    The first makes AdamW's state, and whatever is compiled; of the second's two rows the last finds all gradients.
    """
    config = replace(stage.config, graph=False, compile=False)
    objective: AlignHeads | MatchLogits | PredictAnswers
    if stage.layer_local:
        objective = AlignHeads(model, aligned, config)
    else:
        student = seed(model, stage.student.layer_map, plan.mixer, aligned=aligned)
        unshare(student, model, (*stage.owned, *config.train))
        objective = PredictAnswers(student, config) if stage.labels else MatchLogits(model, student, config)
    rows = [_random_row(stage.row, model.config) for _ in range(2)]
    allocated.reset()
    try:
        step = make_step(objective, config, device, precision)
        float(step(rows[:1], config.lr)[1])  # waits for the device
        began = time.perf_counter()
        float(step(rows, config.lr)[1])
        return Took(allocated.peak, (time.perf_counter() - began) / len(rows))
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in objective.trained.values():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _random_row(tokens: int, config: ModelConfig) -> Batch:
    """One sequence of random text, the second half of it scored."""
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids[ids == config.img_context_token_id] = 0
    labels = ids.clone()
    labels[:, : tokens // 2] = UNSCORED
    side = config.vision.image_size if config.vision else 0
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    return Batch(ids, labels, borders, torch.zeros(0, side, side, 3, dtype=torch.uint8), ["random"])


class Allocated(TorchDispatchMode):
    """Bytes of tensors that are alive on a device, and their peak: the allocator's count on a GPU, our own elsewhere.

    Elsewhere it counts what operators return while it is entered, until it is freed; what they use inside and give
    back before they return is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self._peak = device, 0, 0
        self._known: set[int] = set()

    def __enter__(self) -> Allocated:
        return self if self.device.type == "cuda" else super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.device.type != "cuda":
            super().__exit__(*error)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._peak

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self._peak = max(self._peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
