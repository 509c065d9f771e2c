"""Decoding and prefill of the 2.6 B geometry on one GPU, random weights in bfloat16: time, bandwidth, memory.

    python scripts/gpu/engine.py --out engine.json                 # linear, hybrid, teacher
    python scripts/gpu/engine.py --kinds linear --only decode
    python scripts/gpu/engine.py --geometry nano --device cpu      # tries this script itself

Before it is timed, every kind's graph is compared with the same steps as they come, and those with a whole pass. Times
are medians of events around single steps; the copy bandwidth and the matrix rate of the same run stand beside them. The
table stands last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba.inference.decoder import Decoder
from mmmamba.model import ATTENTION, MAMBA2, MixerConfig, Model, State
from mmmamba.model.geometries import geometry

KINDS = ("linear", "hybrid", "teacher")
BF16 = torch.bfloat16


def build(name: str, kind: str, device: torch.device, dtype: torch.dtype) -> Model:
    """Random weights whose every layer keeps the scale of what passes through it."""
    config = geometry(name)
    keeps = {"linear": [], "hybrid": range(0, config.num_layers, 4), "teacher": range(config.num_layers)}[kind]
    layer_map = tuple(ATTENTION if i in keeps else MAMBA2 for i in range(config.num_layers))
    config = replace(config, layer_map=layer_map, mixer=MixerConfig(rope=True, conv_activation="none"))
    with torch.device("meta"):
        model = Model(config)
    model = model.to_empty(device=device).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02)
    for index in config.mamba2_layers:
        mixer: Any = model.mixer(index)
        mixer.A_log.fill_(0.5)
        mixer.dt_bias.uniform_(-6.0, -2.0)
        mixer.norm.weight.fill_(1.0)
    for module in (*(n for layer in model.layers for n in (layer.input_norm, layer.mlp_norm)), model.norm):
        module.weight.fill_(1.0)
    return model.eval()


class Clock:
    """Times on a GPU by events, on a CPU by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def median(self, call: Callable[[], object], seconds: float = 1.0, warm: int = 4) -> float:
        """Milliseconds of a call: the median of 5 to 200."""
        for _ in range(warm):
            call()
        one = self.once(call)
        return statistics.median(self.once(call) for _ in range(int(min(max(seconds * 1e3 / max(one, 1e-3), 5), 200))))

    def once(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def ceilings(clock: Clock, device: torch.device, small: bool) -> tuple[float, float]:
    """Bytes and operations a second that the machine copies and multiplies at best."""
    source, target = torch.randn(2, 2**16 if small else 2**30, device=device)
    copy = 2 * source.nbytes / clock.median(lambda: target.copy_(source)) * 1e3
    n = 128 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=BF16) for _ in range(2))
    return copy, 2 * n**3 / clock.median(lambda: a @ b) * 1e3


def random_state(model: Model, rows: int, length: int) -> State:
    """States of ``rows`` sequences as if they had read ``length`` tokens."""
    ids = torch.randint(0, 500, (rows, 2), device=model.device)
    state = model(ids, logits="none", return_state=True, max_length=2).state
    assert state is not None
    return replace(state, positions=torch.full_like(state.positions, length))


def check(model: Model) -> dict[str, float]:
    """Relative errors of decoded logits against a whole pass, as they come and replayed."""
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (4, 40), device=model.device)
    whole = model(ids).logits[:, 32:].float()
    found = {}
    for graph in (False, True) if model.device.type == "cuda" else (False,):
        state = model(ids[:, :32], logits="none", return_state=True, max_length=40).state
        decoder = Decoder(model, 4, 64, max_length=40, graph=graph)
        slots = torch.arange(4, device=model.device)
        decoder.admit(slots, state)
        steps = torch.stack([decoder.step(ids[:, 32 + i], slots).clone() for i in range(8)], 1).float()
        found["graph" if graph else "steps"] = float((steps - whole).norm() / whole.norm())
    return found


def decode(model: Model, clock: Clock, batch: int, context: int, state_dtype: torch.dtype | None) -> dict[str, Any]:
    """A step of ``batch`` sequences behind ``context`` tokens, greedy tokens fed back."""
    attention = bool(model.config.attention_layers)
    capacity = context + 256 if attention else 1 << 40
    decoder = Decoder(
        model, batch, capacity, max_length=2, graph=model.device.type == "cuda", state_dtype=state_dtype
    )  # fmt: skip
    slots = torch.arange(batch, device=model.device)
    if attention:  # caches of random keys stand for what was read
        for layer in decoder.layers:
            for cache in (getattr(layer, "k", None), getattr(layer, "v", None)):
                if cache is not None:
                    cache.normal_()
        decoder.positions[:batch] = context
        decoder.longest = context
    else:
        decoder.admit(slots, random_state(model, batch, context))
    tokens = torch.zeros(batch, dtype=torch.long, device=model.device)

    def step() -> None:
        tokens.copy_(decoder.step(tokens, slots).argmax(-1))

    milliseconds = clock.median(step)
    weights = sum(p.nbytes for p in model.layers.parameters()) + model.head.weight.nbytes
    states = (
        sum(
            getattr(layer, name)[0].nbytes
            for layer in decoder.layers
            for name in ("ssm", "conv")
            if hasattr(layer, name)
        )
        * batch
    )
    caches = sum(layer.k[0, 0].nbytes * 2 for layer in decoder.layers if hasattr(layer, "k")) * batch * context
    return {"ms": milliseconds, "tokens_per_s": batch / milliseconds * 1e3, "bytes": weights + 2 * states + caches}


def prefill(model: Model, clock: Clock, length: int, chunk: int) -> dict[str, Any]:
    """A prompt of ``length`` tokens in chunks; the last position's logits."""
    ids = torch.randint(0, 500, (1, length), device=model.device)

    def read() -> Tensor:
        state, out = None, None
        for piece in ids.split(chunk, dim=1):
            out = model(piece, state=state, logits="last", return_state=True, max_length=length)
            state = out.state
        assert out is not None and out.logits is not None
        return out.logits

    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    milliseconds = clock.median(read, seconds=3.0, warm=1)
    peak = torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else float("nan")
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim > 1)
    return {"ms": milliseconds, "flops": 2 * matrices * length, "peak_GB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="hovle-2.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated: %(default)s")
    parser.add_argument("--only", default="check,decode,batch,prefill", help="comma-separated: %(default)s")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a piece of a prompt")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args()
    device, small = torch.device(args.device), args.geometry == "nano"
    clock, dtype = Clock(device), torch.float32 if args.device == "cpu" else BF16
    copy, matmul = ceilings(clock, device, small)
    print(f"copy {copy / 1e12:.2f} TB/s, matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []

    def note(kind: str, what: str, **values: Any) -> None:
        rows.append({"kind": kind, "what": what, **values})
        print(kind, what, {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values.items()}, flush=True)

    what = args.only.split(",")
    contexts = (64, 256) if small else (1024, 103_424)
    batches = (8,) if small else (256, 1024)
    length = 512 if small else 103_424
    with torch.no_grad():
        for kind in args.kinds.split(","):
            model = build(args.geometry, kind, device, dtype)
            if "check" in what:
                note(kind, "relative error against a whole pass", **check(model))
            if "decode" in what:
                for context in contexts:
                    found = decode(model, clock, 1, context, None)
                    share = found["bytes"] / found["ms"] * 1e3 / copy
                    note(kind, f"decode, batch 1, context {context:,}", **found, of_copy=share)
            if "batch" in what and kind == "linear":
                for batch in batches:
                    for state in (torch.float32, BF16):
                        found = decode(model, clock, batch, 1024, state)
                        share = found["bytes"] / found["ms"] * 1e3 / copy
                        note(kind, f"decode, batch {batch}, {str(state)[6:]} state", **found, of_copy=share)
            if "prefill" in what:
                found = prefill(model, clock, length, args.chunk)
                share = found["flops"] / found["ms"] * 1e3 / matmul
                note(kind, f"prefill of {length:,} in {args.chunk:,}", **found, of_matmul=share)
            del model
            if clock.cuda:
                torch.cuda.empty_cache()
    if args.out:
        name = torch.cuda.get_device_name() if clock.cuda else "CPU"
        record = {"device": name, "torch": torch.__version__, "copy": copy, "matmul": matmul, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n| model | what | ms | tokens/s | of the ceiling |\n|---|---|---|---|---|")
    for row in rows:
        if "ms" in row:
            rate = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "–"
            share = row.get("of_copy", row.get("of_matmul", 0.0))
            print(f"| {row['kind']} | {row['what']} | {row['ms']:.3f} | {rate} | {share:.0%} |")


if __name__ == "__main__":
    main()
