"""Check and time the Triton kernels on one GPU, beside mamba_ssm, fla-core, causal_conv1d and plain PyTorch.

    python scripts/gpu/kernels.py --out kernels.json            # everything; peers that can't be imported are left out
    python scripts/gpu/kernels.py --only ssd,kl --no-peers
    TRITON_INTERPRET=1 python scripts/gpu/kernels.py --tiny     # tries this script itself, on a CPU

Errors are ‖ours − float64‖ / ‖float64‖ on fresh random inputs, with uninitialised memory full of NaN. Times are medians
of CUDA events around the replay of a graph, with the L2 cache flushed before each, so that no host's speed is part of
them (a peer that no graph can hold is called as it is, and marked *); those of decoding steps are of many calls in one
replay. Peers get their keys and values expanded to heads beforehand: what the expansion costs them is not counted. The
tables stand last.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba import ops
from mmmamba.inference.decoder import PARTS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16 = torch.bfloat16
HEADS, GROUPS, DIM = 16, 8, 128

Function = Callable[..., Any]


def found(module: str, name: str) -> Function | None:
    """The function ``name`` of a module, or None with a line that says what is missing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        print(f"left out: {module}.{name} ({type(error).__name__}: {str(error).splitlines()[0]})", flush=True)
        return None


def ours(module: str, name: str) -> Function | None:
    return found(f"mmmamba.ops.{module}", name)


# ---------------------------------------------------------------------------------------------- measuring


class Bench:
    """Collects checks and times; everything is kept for the tables and the JSON."""

    def __init__(self, peers: bool, tiny: bool) -> None:
        self.peers, self.tiny = peers, tiny
        self.checks: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.copy = self.matmul = float("nan")  # bytes and operations a second
        self.cache = torch.empty(2**29 if CUDA else 1, dtype=torch.uint8, device=DEVICE)

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def peer(self, module: str, name: str) -> Function | None:
        return found(module, name) if self.peers else None

    def median(self, call: Callable[[], object], seconds: float = 0.4) -> float:
        """Milliseconds of a call: the median of 10 to 200, each with a cold L2 cache."""
        call()
        if not CUDA:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        for _ in range(3):
            call()
        one = self._timed(call)
        return statistics.median(self._timed(call) for _ in range(int(min(max(seconds * 1e3 / one, 10), 200))))

    def _timed(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.cache.zero_()  # also keeps the GPU busy while the host gets ahead
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def replayed(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call in a graph; negative where it had to be called as it is."""
        if not CUDA:
            return self.median(call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what compiles or tunes itself does it here
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"no graph can hold it: {str(error).splitlines()[0][:120]}", flush=True)
            return -self.median(call)
        return self.median(graph.replay)

    def graph(self, call: Callable[[int], object], calls: int) -> float:
        """Milliseconds of one of ``calls`` calls captured in a graph; each is given its number."""
        if not CUDA:
            return self.median(lambda: call(0))
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i)
        return self.median(graph.replay) / calls

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result, or None where it fails: the rest of the run goes on, and the script fails at its end."""
        try:
            return call()
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}")
            return None

    def time(
        self,
        operator: str,
        case: str,
        ours: Callable[[], float | None],
        peers: dict[str, Callable[[], float | None]],
        *,
        floor: float | None = None,
        goal: float | None = None,
        note: str = "",
    ) -> None:
        """One line of the table of times; ``floor`` and ``goal`` in milliseconds."""
        row: dict[str, Any] = {"operator": operator, "case": case, "floor": floor, "goal": goal, "note": note}
        row["ours"] = self.attempt(f"{operator}, {case}", ours)
        # A peer that refuses the machine (as one's gradients do on Hopper) is no failure of ours.
        row["peers"] = {}
        for name, call in peers.items():
            try:
                row["peers"][name] = call()
            except Exception as error:
                print(f"{name} fails at {operator}, {case}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        self.times.append(row)
        print(f"{operator} {case}: {row['ours']} ms, {row['peers']}", flush=True)

    def check(self, operator: str, case: str, values: dict[str, Tensor], truth: dict[str, Tensor], **more: Any) -> None:
        """Relative errors of named values; ``more``: those of peers, name → values."""
        row = {"operator": operator, "case": case, "ours": errors(values, truth), "peers": {}}
        row["peers"] = {name: errors(other, truth) for name, other in more.items() if other is not None}
        row["finite"] = all(bool(torch.isfinite(value).all()) for value in values.values())
        self.checks.append(row)
        if not row["finite"]:
            self.failures.append(f"{operator}, {case}: not finite")


def errors(values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    def relative(value: Tensor, expected: Tensor) -> float:
        return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))

    return {name: relative(values[name], truth[name]) for name in values if name in truth}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing has written reads as NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def with_gradients(
    function: Callable[..., Any], inputs: dict[str, Tensor], seeds: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs (``0``, ``1``, …) and the gradients to all inputs, for fixed gradients of the outputs."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    result = function(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    outputs = tuple(output for output in outputs if output is not None)
    weights = [seed.to(output.dtype) for seed, output in zip(seeds, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {str(i): output.detach() for i, output in enumerate(outputs)}
    return {**named, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def both_passes(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A call that runs forward and backward."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        seed = torch.randn_like(function(**leaves))
    return lambda: torch.autograd.grad(function(**leaves), list(leaves.values()), seed)


def ceilings(bench: Bench) -> None:
    """What the machine copies and multiplies at best."""
    source, target = torch.randn(2, bench.size(2**30, 2**16), device=DEVICE)
    bench.copy = 2 * source.nbytes / bench.median(lambda: target.copy_(source)) * 1e3
    n = bench.size(8192, 64)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=BF16) for _ in range(2))
    bench.matmul = 2 * n**3 / bench.median(lambda: a @ b) * 1e3
    print(f"copy {bench.copy / 1e12:.2f} TB/s, matmul {bench.matmul / 1e12:.0f} TFLOP/s", flush=True)


# ---------------------------------------------------------------------------------------------- ssd


def ssd_inputs(length: int, h: int = HEADS, g: int = GROUPS, p: int = DIM, n: int = DIM, dtype: torch.dtype = BF16,
               decay: tuple[float, float] = (1e-3, 0.3)) -> dict[str, Tensor]:  # fmt: skip
    """x, dt, A, B, C of one row; the steps' decays dt·|A| lie log-uniformly in ``decay``."""
    low, high = (torch.tensor(value).log() for value in decay)
    A = -torch.rand(h, device=DEVICE) - 0.5
    dt = torch.exp(low + torch.rand(1, length, h, device=DEVICE) * (high - low)) / -A
    x = torch.randn(1, length, g, p, device=DEVICE).to(dtype)
    B = (torch.randn(1, length, g, n, device=DEVICE) * n**-0.5).to(dtype)
    C = (torch.randn(1, length, h, n, device=DEVICE) * n**-0.5).to(dtype)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C}


def expanded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Groups repeated to heads, as the peers want them."""
    r = inputs["C"].shape[2] // inputs["x"].shape[2]
    return {**inputs, **{name: inputs[name].repeat_interleave(r, 2) for name in ("x", "B")}}


def ssd_peers(bench: Bench) -> dict[str, Function]:
    """name → function of x, dt, A, B, C with groups expanded."""
    peers: dict[str, Function] = {}
    combined = bench.peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    if combined is not None:
        for chunk in (128, 256):

            def mamba(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = chunk) -> Tensor:
                return combined(x, dt, A, B, C, chunk)

            peers[f"mamba_ssm c{chunk}"] = mamba
    gla = bench.peer("fla.ops.simple_gla", "chunk_simple_gla")
    if gla is not None:

        def fla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return gla(C, B, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)[0]

        peers["fla"] = fla
    return peers


def run_ssd(bench: Bench) -> None:
    ssd = ours("ssd.launch", "ssd")
    if ssd is None:
        return
    peers = ssd_peers(bench)

    def check(case: str, inputs: dict[str, Tensor], lengths: list[int] | None = None) -> None:
        rows = len(lengths or [0])
        h, p, n = inputs["C"].shape[2], inputs["x"].shape[3], inputs["C"].shape[3]
        borders = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        options = {"cu_seqlens": borders, "return_final_state": True}
        whole = {**inputs, "initial_state": torch.randn(rows, h, p, n, device=DEVICE)}
        seeds = [torch.randn(*inputs["C"].shape[:3], p, device=DEVICE), torch.randn(rows, h, p, n, device=DEVICE)]
        wide = {name: tensor.double() for name, tensor in whole.items()}
        truth = with_gradients(lambda **t: ops.ssd_chunked(**t, **options), wide, seeds)
        with poisoned():
            values = with_gradients(lambda **t: ssd(**t, **options), whole, seeds)
            again = with_gradients(lambda **t: ssd(**t, **options), whole, seeds)
        bench.check("ssd", case, values, truth)
        if not all(torch.equal(values[name], again[name]) for name in values):
            bench.failures.append(f"ssd, {case}: two runs differ")

    def check_peers(case: str, inputs: dict[str, Tensor]) -> None:
        seeds = [torch.randn(*inputs["C"].shape[:3], inputs["x"].shape[3], device=DEVICE)]
        truth = with_gradients(lambda **t: ops.ssd_chunked(**t)[0], {k: v.double() for k, v in inputs.items()}, seeds)
        values = with_gradients(lambda **t: ssd(**t)[0], inputs, seeds)
        others = {}
        for name, peer in peers.items():
            try:
                others[name] = with_gradients(lambda peer=peer, **t: peer(**expanded(t)), inputs, seeds)
            except Exception as error:
                print(f"{name} gives no gradients: {str(error)[:120]}", flush=True)
                with torch.no_grad():
                    others[name] = {"0": peer(**expanded(inputs))}
        bench.check("ssd", case, values, truth, **others)

    packed = [1, 0, 63, 64, 130] if not bench.tiny else [1, 0, 17]
    kinds = [(128, 128, BF16), (128, 128, torch.float32), (64, 64, BF16)] if not bench.tiny else [(32, 32, BF16)]
    for p, n, dtype in kinds:
        case = f"packed, p {p}, n {n}, {str(dtype)[6:]}"
        inputs = ssd_inputs(sum(packed), 4, 2, p, n, dtype)
        bench.attempt(f"ssd, {case}", lambda case=case, inputs=inputs: check(case, inputs, packed))
    for low, high in ((1e-6, 1e-5), (1e-6, 30.0), (10.0, 30.0)):
        case = f"decays {low:g} … {high:g} a step"
        inputs = ssd_inputs(bench.size(777, 20), 4, 2, decay=(low, high))
        bench.attempt(f"ssd, {case}", lambda case=case, inputs=inputs: check(case, inputs))
    inputs = ssd_inputs(bench.size(2048, 32), 4, 2)
    bench.attempt("ssd beside peers", lambda: check_peers("one row of 2,048, bf16", inputs))

    def time_length(length: int, goal: float | None) -> None:
        inputs = ssd_inputs(length)
        wide = expanded(inputs)
        moved = sum(t.nbytes for t in inputs.values()) + inputs["C"].nbytes
        with torch.no_grad():
            bench.time(
                "ssd", f"forward, L {length:,}", lambda: bench.replayed(lambda: ssd(**inputs)),
                {name: lambda peer=peer: bench.replayed(lambda: peer(**wide)) for name, peer in peers.items()},
                floor=moved / bench.copy * 1e3, goal=goal,
            )  # fmt: skip

    for length, goal in ((103_424, 0.95), (16_384, 0.21), (4_096, None)) if not bench.tiny else ((40, None),):
        time_length(length, goal)
    length = bench.size(8_192, 40)
    inputs = ssd_inputs(length)
    moved = sum(t.nbytes for t in inputs.values())
    wide = expanded(inputs)
    bench.time(
        "ssd", f"forward + backward, L {length:,}",
        lambda: bench.replayed(both_passes(lambda **t: ssd(**t)[0], inputs)),
        {
            **{name: lambda peer=peer: bench.replayed(both_passes(peer, wide)) for name, peer in peers.items()},
            "torch twin": lambda: bench.replayed(both_passes(lambda **t: ops.ssd_chunked(**t)[0], inputs)),
        },
        floor=(3 * moved + 2 * inputs["C"].nbytes) / bench.copy * 1e3, goal=0.9,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the gated delta rule


def delta_inputs(lengths: Sequence[int], h: int = HEADS, g: int = GROUPS, p: int = DIM) -> dict[str, Tensor]:
    """v, dt, A, k, q, beta of a packed row in bfloat16; keys and queries of unit length."""
    made = ssd_inputs(sum(lengths), h, g, p, p)
    k, q = (F.normalize(made[name].float(), dim=-1).to(BF16) for name in "BC")
    beta = torch.rand(1, sum(lengths), h, device=DEVICE)
    return {"v": made["x"], "dt": made["dt"], "A": made["A"], "k": k, "q": q, "beta": beta}


def run_delta(bench: Bench) -> None:
    delta, ssd = ours("gated_delta.launch", "gated_delta"), ours("ssd.launch", "ssd")
    if delta is None or ssd is None:
        return
    fla = bench.peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")

    def borders(lengths: Sequence[int]) -> Tensor | None:
        return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int() if len(lengths) > 1 else None

    def check(case: str, lengths: Sequence[int], h: int, g: int, p: int) -> None:
        inputs, options = delta_inputs(lengths, h, g, p), {"cu_seqlens": borders(lengths)}
        seeds = [torch.randn(*inputs["q"].shape[:3], p, device=DEVICE)]
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        truth = with_gradients(lambda **t: ops.gated_delta_chunked(**t, **options)[0], wide, seeds)
        with poisoned():
            values = with_gradients(lambda **t: delta(**t, **options)[0], inputs, seeds)
            again = with_gradients(lambda **t: delta(**t, **options)[0], inputs, seeds)
        bench.check("gated_delta", case, values, truth)
        if not all(torch.equal(values[name], again[name]) for name in values):
            bench.failures.append(f"gated_delta, {case}: two runs differ")

    def time_lengths(case: str, lengths: Sequence[int], h: int, g: int, p: int, *, both: bool) -> None:
        inputs, cu = delta_inputs(lengths, h, g, p), borders(lengths)
        state_space = {name: inputs[key] for name, key in zip("x dt A B C".split(), "v dt A k q".split(), strict=True)}
        repeated = {**inputs, **{name: inputs[name].repeat_interleave(h // g, 2) for name in "vk"}}

        def theirs(v: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, beta: Tensor) -> Tensor:
            assert fla is not None
            longs = None if cu is None else cu.long()
            return fla(q, k, v, g=dt * A, beta=beta.to(q.dtype), scale=1.0, cu_seqlens=longs)[0]

        calls: dict[str, tuple[Function, dict[str, Tensor]]] = {
            "ours": (lambda **t: delta(**t, cu_seqlens=cu)[0], inputs),
            "our ssd": (lambda **t: ssd(**t, cu_seqlens=cu)[0], state_space),
        }
        if fla is not None:
            calls["fla"] = theirs, repeated

        def clock(name: str) -> float:
            function, given = calls[name]
            if both:
                return bench.replayed(both_passes(function, given))
            with torch.no_grad():
                return bench.replayed(lambda: function(**given))

        moved = sum(t.nbytes for t in inputs.values())
        times = 3 if both else 1
        bench.time(
            "gated_delta", case, lambda: clock("ours"),
            {name: functools.partial(clock, name) for name in calls if name != "ours"},
            floor=(times * moved + (times + 1) // 2 * inputs["q"].nbytes) / bench.copy * 1e3,
        )  # fmt: skip

    smol = [650] * bench.size(34, 2)
    cases = [("one row of 2,048, 16 heads of 128", [bench.size(2_048, 70)], 16, 8, 128),
             ("packed, 9 heads of 64", [650, 0, 31, bench.size(1_300, 40)], 9, 3, 64)]  # fmt: skip
    for case, lengths, h, g, p in cases if not bench.tiny else [("tiny", [70, 0, 9], 2, 1, 32)]:
        bench.attempt(f"gated_delta, {case}", lambda case=case, of=(lengths, h, g, p): check(case, *of))
    if bench.tiny:
        time_lengths("tiny", [40], 2, 1, 32, both=True)
        return
    time_lengths("forward, L 103,424", [103_424], HEADS, GROUPS, DIM, both=False)
    time_lengths("forward, L 8,192", [8_192], HEADS, GROUPS, DIM, both=False)
    time_lengths("forward + backward, L 8,192", [8_192], HEADS, GROUPS, DIM, both=True)
    time_lengths("forward, 34 texts of 650, 9 heads of 64", smol, 9, 3, 64, both=False)
    time_lengths("forward + backward, 34 texts of 650, 9 heads of 64", smol, 9, 3, 64, both=True)


# ---------------------------------------------------------------------------------------------- one decoding step


def step_inputs(batch: int, pool: int, state: torch.dtype, h: int, g: int, p: int) -> tuple[list[Tensor], dict]:
    channels = (h + 2 * g) * p
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    row = [draw(batch, channels).to(BF16), draw(batch, h * p).to(BF16), draw(batch, h)]
    weights = {
        "conv_weight": draw(channels, 2), "conv_bias": draw(channels) * 0.1, "dt_bias": draw(h) - 3,
        "A_log": draw(h) * 0.3, "norm_weight": draw(p), "conv_state": draw(pool, 1, channels).to(BF16),
        "ssm_state": draw(pool, h, p, p).to(state),
    }  # fmt: skip
    return row, weights


def step_peers(update: Function | None, recurrent: Function | None, pools: Tensor) -> dict[str, Function]:
    """name → function of a call's number: the state update alone, on pools (calls, b, h, p, n) in turn."""
    _, b, h, p, n = pools.shape
    x, B, C = (torch.randn(b, h, size, device=DEVICE, dtype=BF16) for size in (p, n, n))
    dt, A = torch.rand(b, h, device=DEVICE), -torch.rand(h, device=DEVICE)
    wide_dt, wide_A = dt[..., None].expand(-1, -1, p), A[:, None, None].expand(-1, p, n)
    zeros = torch.zeros(h, device=DEVICE)[:, None].expand(-1, p)  # one version fails without D and a bias
    q, k, v, g = C[:, None], B[:, None], x[:, None], (dt * A)[:, None]
    peers: dict[str, Function] = {}
    if update is not None:
        peers["mamba_ssm (update alone)"] = lambda i: update(
            pools[i % len(pools)], x, wide_dt, wide_A, B, C, D=zeros, dt_bias=zeros
        )
    if recurrent is not None:
        peers["fla (update alone)"] = lambda i: recurrent(
            q, k, v, g, scale=1.0, initial_state=pools[i % len(pools)], output_final_state=True
        )
    return peers


def run_step(bench: Bench) -> None:
    step = ours("mixer_step.kernels", "mixer_step")
    if step is None:
        return
    h, g, p = (HEADS, GROUPS, DIM) if not bench.tiny else (2, 1, 32)

    def check(state: torch.dtype) -> None:
        row, options = step_inputs(5, 9, state, h, g, p)
        angles = torch.rand(5, p // 2, device=DEVICE) * 6
        slots = torch.tensor([7, 0, 3, 8, 4], device=DEVICE, dtype=torch.int32)
        more = {"slots": slots, "rotation": (angles.cos(), angles.sin())}

        def run(function: Function, widen: bool) -> dict[str, Tensor]:
            copies = {k: (v.double() if widen else v.clone()) for k, v in options.items()}
            values = {"y": function(*(t.double() if widen else t for t in row), **copies, **more)}
            return {**values, "ssm_state": copies["ssm_state"], "conv_state": copies["conv_state"]}

        truth = run(ops.mixer_step_torch, True)
        with poisoned():
            values = run(step, False)
        bench.check("mixer_step", f"{str(state)[6:]} state", values, truth, torch=run(ops.mixer_step_torch, False))

    for state in (torch.float32, BF16):
        bench.attempt(f"mixer_step, {state}", lambda state=state: check(state))

    update = bench.peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    recurrent = bench.peer("fla.ops.simple_gla", "fused_recurrent_simple_gla")
    for batch in (256, 64, 8, 1) if not bench.tiny else (2,):
        for state in (torch.float32, BF16):
            pool = max(batch, bench.size(64, 2))  # small batches go round a pool larger than the cache
            row, options = step_inputs(batch, pool, state, h, g, p)
            seed = torch.zeros(1, dtype=torch.int64, device=DEVICE) if state == BF16 else None
            slots = torch.arange(pool, device=DEVICE, dtype=torch.int32).view(-1, batch)
            calls = max(len(slots), 8)
            # A single row's heads as the decoder wants them: in parts, the norm left to the next map.
            shared = {"": None, ", norm left": torch.empty(1, h, PARTS, device=DEVICE)} if batch == 1 else {"": None}
            pools = options["ssm_state"].view(-1, batch, h, p, p)
            peers = step_peers(update, recurrent, pools) if state == torch.float32 else {}
            goal = {(256, torch.float32): 0.20, (1, torch.float32): 0.004}.get((batch, state))
            for label, squares in shared.items():
                bench.time(
                    "mixer_step", f"batch {batch}, {str(state)[6:]} state, graph{label}",
                    lambda row=row, options=options, slots=slots, seed=seed, calls=calls, squares=squares: bench.graph(
                        # As a decoding step launches it, after another kernel of its chain; but only where no state
                        # that a launch reads was written by the one in front.
                        lambda i: step(
                            *row, **options, slots=slots[i % len(slots)], seed=seed, squares=squares,
                            chained=0 < i and calls <= len(slots),
                        ),
                        calls,
                    ),
                    {name: lambda peer=peer, calls=calls: bench.graph(peer, calls) for name, peer in peers.items()},
                    floor=2 * batch * h * p * p * state.itemsize / bench.copy * 1e3, goal=goal,
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------- one token's linear maps


def run_linear(bench: Bench) -> None:
    linear = ours("linear.kernels", "linear_step")
    if linear is None:
        return
    width, inner, words = bench.size(2048, 40), bench.size(8192, 64), bench.size(92_553, 70)

    def measure(name: str, n: int, k: int, normed: bool, int8: bool) -> None:
        x, weight = torch.randn(1, k, device=DEVICE).to(BF16), torch.randn(n, k, device=DEVICE).to(BF16)
        norm = torch.rand(k, device=DEVICE).to(BF16) if normed else None
        weight, scale = ops.quantize_rows(weight) if int8 else (weight, None)
        swiglu = name == "gate|up"
        wide = {"norm": None if norm is None else norm.double(), "scale": None if scale is None else scale.double()}
        exact = weight if int8 else weight.double()
        truth = {"y": ops.linear_step_torch(x.double(), exact, **wide, swiglu=swiglu)}

        def run(function: Function, weight: Tensor, **options: bool) -> Tensor:
            return function(x, weight, scale=scale, norm=norm, swiglu=swiglu, **options)

        label = f"{name}, int8" if int8 else name
        twin = {"y": run(ops.linear_step_torch, weight)}
        bench.check("linear_step", label, {"y": run(linear, weight)}, truth, torch=twin)
        pool = [weight, *(weight.clone() for _ in range(bench.size(max(1, 200_000_000 // weight.nbytes), 1)))]
        calls = 4 * len(pool)

        def chain(chained: bool) -> float:
            """Milliseconds a map of a chain over matrices that no cache holds together."""
            return bench.graph(lambda i: run(linear, pool[i % len(pool)], chained=chained and i > 0), calls)

        bench.time(
            "linear_step", f"{label}, {n:,} × {k:,}", lambda: chain(True),
            {"not chained": lambda: chain(False),
             "torch": lambda: bench.graph(lambda i: run(ops.linear_step_torch, pool[i % len(pool)]), calls)},
            floor=weight.nbytes / bench.copy * 1e3,
        )  # fmt: skip

    for int8 in (False, True):
        for name, n, k, normed in (("projections", 3 * width + 16, width, True), ("out", width, width, False),
                                   ("gate|up", 2 * inner, width, True), ("down", width, inner, False),
                                   ("head", words, width, True)):  # fmt: skip
            bench.attempt(f"linear_step, {name}", functools.partial(measure, name, n, k, normed, int8))


# ---------------------------------------------------------------------------------------------- decoding attention


def run_attend(bench: Bench) -> None:
    attend = ours("attention.kernels", "attention_step")
    if attend is None:
        return
    h, g, p = HEADS, GROUPS, DIM

    def inputs(batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
        qkv = torch.randn(batch, (h + 2 * g) * p, device=DEVICE).to(dtype)
        k, v = (torch.randn(batch, length, g, p, device=DEVICE).to(dtype) for _ in range(2))
        slots = torch.arange(batch, device=DEVICE)
        frequencies = 1e6 ** -(torch.arange(0, p, 2, device=DEVICE) / p)
        return [qkv, k, v, slots, torch.full_like(slots, length - 1), frequencies]

    def check(dtype: torch.dtype) -> None:
        args = inputs(3, bench.size(3000, 70), dtype)
        args[4] -= torch.tensor([0, 17, len(args[1][0]) - 1], device=DEVICE)

        def run(function: Function, widen: bool) -> dict[str, Tensor]:
            own = [t.double() if widen else t.clone() for t in args[:3]]
            values = {"y": function(*own, *args[3:])}
            return {**values, "k": own[1], "v": own[2]}

        truth = run(ops.attention_step_torch, True)
        with poisoned():
            values = run(attend, False)
        bench.check("attention_step", str(dtype)[6:], values, truth, torch=run(ops.attention_step_torch, False))

    for dtype in (torch.float32, BF16):
        bench.attempt("attention_step", lambda dtype=dtype: check(dtype))
    for batch, length in ((1, 103_424), (4, 16_384), (64, 1_024)) if not bench.tiny else ((2, 70),):
        args = inputs(batch, length, BF16)
        q, k, v = args[0].unflatten(1, (-1, p))[:, :h, None], args[1].transpose(1, 2), args[2].transpose(1, 2)
        bench.time(
            "attention_step", f"batch {batch}, {length:,} cached",
            lambda args=args: bench.replayed(lambda: attend(*args)),
            {"SDPA (attention alone)": lambda q=q, k=k, v=v: bench.replayed(
                lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))},
            floor=2 * args[1].nbytes / bench.copy * 1e3,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- conv and norm


def run_conv(bench: Bench) -> None:
    conv = ours("causal_conv.launch", "causal_conv")
    if conv is None:
        return
    channels = bench.size((HEADS + 2 * GROUPS) * DIM, 64)

    def inputs(length: int, dtype: torch.dtype, kernel: int) -> dict[str, Tensor]:
        draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
        return {"x": draw(1, length, channels).to(dtype), "weight": draw(channels, kernel), "bias": draw(channels)}

    def check(dtype: torch.dtype, kernel: int) -> None:
        lengths = [1, 0, 40, 2, 300] if not bench.tiny else [1, 0, 9]
        borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        options = {"cu_seqlens": borders, "return_final_state": True}
        whole = inputs(sum(lengths), dtype, kernel)
        whole["initial_state"] = torch.randn(len(lengths), kernel - 1, channels, device=DEVICE).to(dtype)
        seeds = [torch.randn_like(whole["x"], dtype=torch.float32), torch.randn_like(whole["initial_state"])]
        wide = {name: tensor.double() for name, tensor in whole.items()}
        truth = with_gradients(lambda **t: ops.causal_conv_torch(**t, **options), wide, seeds)
        with poisoned():
            values = with_gradients(lambda **t: conv(**t, **options), whole, seeds)
        bench.check("causal_conv", f"packed, kernel {kernel}, {str(dtype)[6:]}", values, truth)

    for dtype in (torch.float32, BF16):
        for kernel in (2, 4):
            bench.attempt("causal_conv", lambda dtype=dtype, kernel=kernel: check(dtype, kernel))

    length = bench.size(16_384, 20)
    given = inputs(length, BF16, 2)
    narrow = {"x": given["x"], "weight": given["weight"].to(BF16), "bias": given["bias"].to(BF16)}
    peer = bench.peer("causal_conv1d", "causal_conv1d_fn")

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert peer is not None
        return peer(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    def plain(**tensors: Tensor) -> Tensor:
        return ops.causal_conv_torch(**tensors)[0]

    others = {"torch twin": plain, **({} if peer is None else {"causal_conv1d": theirs})}
    with torch.no_grad():
        bench.time(
            "causal_conv", f"forward, L {length:,}, kernel 2", lambda: bench.replayed(lambda: conv(**given)),
            {name: lambda other=other: bench.replayed(lambda: other(**narrow)) for name, other in others.items()},
            floor=2 * given["x"].nbytes / bench.copy * 1e3,
        )  # fmt: skip
    bench.time(
        "causal_conv", f"forward + backward, L {length:,}, kernel 2",
        lambda: bench.replayed(both_passes(lambda **t: conv(**t)[0], given)),
        {name: lambda other=other: bench.replayed(both_passes(other, narrow)) for name, other in others.items()},
        floor=5 * given["x"].nbytes / bench.copy * 1e3,
    )  # fmt: skip


def run_norm(bench: Bench) -> None:
    norm = ours("gated_norm.kernels", "gated_norm")
    if norm is None:
        return

    def inputs(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        x, gate = (torch.randn(1, length, HEADS, DIM, device=DEVICE).to(dtype) for _ in range(2))
        return {"x": x, "gate": gate, "weight": torch.rand(DIM, device=DEVICE) + 0.5}

    def check(dtype: torch.dtype) -> None:
        given = inputs(bench.size(301, 3), dtype)
        seeds = [torch.randn_like(given["x"], dtype=torch.float32)]
        wide = {name: tensor.double() for name, tensor in given.items()}
        truth = with_gradients(lambda **t: ops.gated_norm_torch(**t, eps=1e-5), wide, seeds)
        plain = with_gradients(lambda **t: ops.gated_norm_torch(**t, eps=1e-5), given, seeds)
        with poisoned():
            values = with_gradients(lambda **t: norm(**t, eps=1e-5), given, seeds)
        bench.check("gated_norm", str(dtype)[6:], values, truth, torch=plain)

    for dtype in (torch.float32, BF16):
        bench.attempt("gated_norm", lambda dtype=dtype: check(dtype))
    length = bench.size(16_384, 3)
    given = inputs(length, BF16)
    twins = {"torch twin": lambda **t: ops.gated_norm_torch(**t, eps=1e-5)}
    if CUDA:
        twins["torch.compile"] = torch.compile(twins["torch twin"])
    with torch.no_grad():
        bench.time(
            "gated_norm", f"forward, L {length:,}", lambda: bench.replayed(lambda: norm(**given, eps=1e-5)),
            {name: lambda twin=twin: bench.replayed(lambda: twin(**given)) for name, twin in twins.items()},
            floor=3 * given["x"].nbytes / bench.copy * 1e3,
        )  # fmt: skip
    bench.time(
        "gated_norm", f"forward + backward, L {length:,}",
        lambda: bench.replayed(both_passes(lambda **t: norm(**t, eps=1e-5), given)),
        {name: lambda twin=twin: bench.replayed(both_passes(twin, given)) for name, twin in twins.items()},
        floor=8 * given["x"].nbytes / bench.copy * 1e3,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- chunked KL


def kl_problem(tokens: int, size: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and head of a student, then of a teacher that resembles it, with logits of about 3."""
    hidden = torch.randn(tokens, width, device=DEVICE)
    head = torch.randn(size, width, device=DEVICE) * (3 * width**-0.5)
    near = [t + 0.2 * t.std() * torch.randn_like(t) for t in (hidden, head)]
    return [t.to(dtype) for t in (*near, hidden, head)]


def check_kl(bench: Bench, kl: Function, dtype: torch.dtype, temperature: float) -> None:
    tensors = kl_problem(bench.size(600, 6), bench.size(10_007, 301), bench.size(512, 16), dtype)
    weight = (torch.rand(len(tensors[0]), device=DEVICE) < 0.7).float()
    one = [torch.ones((), device=DEVICE)]

    def run(function: Function, widen: bool, **options: int) -> dict[str, Tensor]:
        given = [t.double() if widen else t for t in tensors]
        trained = {"student_hidden": given[0], "student_head": given[1]}
        more = {"teacher_hidden": given[2], "teacher_head": given[3], "weight": weight, **options}
        return with_gradients(lambda **t: function(**t, **more, temperature=temperature), trained, one)

    truth = run(ops.chunked_kl_torch, True)
    with poisoned():
        values = run(kl, False, chunk=128)
    plain = run(ops.chunked_kl_torch, False, chunk=128)
    bench.check("chunked_kl", f"T {temperature:g}, {str(dtype)[6:]}", values, truth, torch=plain)


def kl_products(tensors: list[Tensor], chunk: int, head_too: bool) -> Callable[[], object]:
    """The matrix products alone, of a vocabulary and at rows of logits that suit them best."""
    tokens, size = len(tensors[0]), len(tensors[1])
    stride = -(-size // 256) * 256
    buffer = torch.empty(chunk, stride, device=DEVICE, dtype=BF16)[:, : size - size % 8].normal_()
    to_hidden, to_head = (torch.empty_like(t) for t in (tensors[0], tensors[1][: buffer.shape[1]]))
    heads = [head[: buffer.shape[1]] for head in (tensors[3], tensors[1])]

    def multiply() -> None:
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            for hidden, head in zip((tensors[2], tensors[0]), heads, strict=True):
                torch.mm(hidden[part], head.T, out=buffer)
            torch.mm(buffer, heads[1], out=to_hidden[part])
            if head_too:
                torch.mm(buffer.T, tensors[0][part], out=to_head)

    return multiply


def extra_memory(call: Callable[[], object]) -> float:
    """GB that a call takes at most beyond what lived before it, gradients included."""
    if not CUDA:
        return float("nan")
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def run_kl(bench: Bench) -> None:
    kl = ours("kl.kernels", "chunked_kl")
    if kl is None:
        return
    for dtype in (torch.float32, BF16):
        for temperature in (1.0, 2.0):
            bench.attempt("chunked_kl", functools.partial(check_kl, bench, kl, dtype, temperature))

    tokens, size, width = bench.size(8_192, 8), bench.size(92_553, 301), bench.size(2_048, 16)
    tensors = kl_problem(tokens, size, width, BF16)
    for head_too, limit in ((False, 1.45), (True, 1.35)):
        leaves = [t.clone().requires_grad_() for t in (tensors[:2] if head_too else tensors[:1])]
        given = [*leaves, *tensors[len(leaves) :]]

        def passes(function: Function, leaves: list[Tensor] = leaves, given: list[Tensor] = given) -> object:
            return torch.autograd.grad(function(*given), leaves)

        chunks = sorted({min(tokens, chunk) for chunk in (1024, 2048, 8192)})
        best = min(bench.median(kl_products(tensors, chunk, head_too)) for chunk in chunks)
        count = 4 if head_too else 3
        ideal = count * 2 * tokens * size * width / bench.matmul * 1e3
        extra = bench.attempt("chunked_kl, memory", lambda passes=passes: extra_memory(lambda: passes(kl)))
        bench.time(
            "chunked_kl", f"both passes, {tokens:,} × {size:,}, {'trained' if head_too else 'frozen'} head",
            lambda passes=passes: bench.median(lambda: passes(kl)),
            {"torch twin": lambda passes=passes: bench.median(lambda: passes(ops.chunked_kl_torch))},
            floor=best, goal=limit * best,
            note=f"floor: its {count} products, measured ({ideal:.2f} ms at the peak rate); {extra or 0:.2f} GB extra",
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the tables

SECTIONS = {
    "ssd": run_ssd,
    "delta": run_delta,
    "kl": run_kl,
    "conv": run_conv,
    "norm": run_norm,
    "step": run_step,
    "attend": run_attend,
    "linear": run_linear,
}


def number(value: float | None) -> str:
    if value is not None and value < 0:
        return f"{number(-value)}*"
    return "–" if value is None else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def tables(bench: Bench) -> str:
    lines = ["", "Relative errors against float64 (0, 1: the outputs; d…: gradients)", "", "| check | of | errors |"]
    lines.append("|---|---|---|")
    for row in bench.checks:
        for name, values in {"ours": row["ours"], **row["peers"]}.items():
            listed = ", ".join(f"{value} {error:.1e}" for value, error in values.items())
            lines.append(f"| {row['operator']}, {row['case']} | {name} | {listed} |")
    lines += ["", f"copy {bench.copy / 1e12:.2f} TB/s, matmul {bench.matmul / 1e12:.0f} TFLOP/s; times in ms", ""]
    lines += ["| operator | case | ours | goal | floor | peers | |", "|---|---|---|---|---|---|---|"]
    for row in bench.times:
        peers = ", ".join(f"{name} {number(value)}" for name, value in row["peers"].items()) or "–"
        mark = "" if row["ours"] is None or row["goal"] is None else "met" if row["ours"] <= row["goal"] else "MISSED"
        cells = [row["operator"], row["case"], *(number(row[key]) for key in ("ours", "goal", "floor"))]
        lines.append("| " + " | ".join([*cells, peers, " ".join(filter(None, [mark, row["note"]]))]) + " |")
    return "\n".join([*lines, "", *(f"FAILED {failure}" for failure in bench.failures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="operators, comma-separated: %(default)s")
    parser.add_argument("--no-peers", action="store_true", help="leave mamba_ssm, fla and causal_conv1d out")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")

    torch.manual_seed(args.seed)
    faulthandler.dump_traceback_later(150, repeat=True)  # a peer has hung before: show where
    bench = Bench(not args.no_peers, args.tiny)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    triton = found("triton", "__version__")
    print(f"{name}, torch {torch.__version__}, triton {triton}", flush=True)
    ceilings(bench)
    for section in args.only.split(","):
        started = time.perf_counter()
        bench.attempt(section, lambda section=section: SECTIONS[section](bench))
        if CUDA:
            torch.cuda.empty_cache()
        print(f"--- {section}: {time.perf_counter() - started:.0f} s", flush=True)
    if args.out:
        record = {"device": name, "torch": torch.__version__, "triton": triton, "copy_TBps": bench.copy / 1e12,
                  "matmul_TFLOPs": bench.matmul / 1e12, "checks": bench.checks, "times": bench.times,
                  "failures": bench.failures}  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(bench))
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    main()
