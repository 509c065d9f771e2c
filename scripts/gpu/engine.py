"""Is the engine right at the 2.6 B geometry, and how far is it from the machine? Random weights in bfloat16, one GPU.

    python scripts/gpu/engine.py --out engine.json                 # linear, hybrid, teacher
    python scripts/gpu/engine.py --kinds linear --only decode int8 batch
    python scripts/gpu/engine.py --rule gated_delta --kinds linear hybrid
    python scripts/gpu/engine.py --geometry nano --device cpu      # tries this script itself

A look at a few points while the engine is worked on: the whole report is ``mmmamba bench``, whose measuring this is.
Before it is timed, every kind's graph is compared with the same steps as they come, and those with a whole pass.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba.benchmark.limits import Cost, Rates, measure_rates
from mmmamba.benchmark.measure import decode, greatest_batch, read_prompt, weight_bytes
from mmmamba.benchmark.memory import attempt, release
from mmmamba.benchmark.sessions import time_session
from mmmamba.benchmark.subjects import KINDS, Subject, random_subjects
from mmmamba.config_files import to_dict
from mmmamba.inference.decoder import Decoder
from mmmamba.model import Model

Rule = Literal["ssd", "gated_delta"]
PARTS = ("check", "decode", "int8", "batch", "prefill", "session")


def check(model: Model) -> dict[str, Any]:
    """Relative errors of logits against a float32 pass over the same weights: of a whole pass, of steps, of replays.

    A step may be off by 1.5 times what the whole pass is off, and must pick its token wherever the float32 logits of
    the best two differ by more than that. Random weights of this depth magnify every rounding.
    """
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (4, 40), device=model.device)
    truth = copy.deepcopy(model).float()(ids).logits[:, 32:]
    best = truth.topk(2, dim=-1).values
    found: dict[str, Any] = {}
    runs = {"whole": model(ids).logits[:, 32:].float()}
    for graph in (False, True) if model.device.type == "cuda" else (False,):
        state = model(ids[:, :32], logits="none", return_state=True, max_length=40).state
        decoder = Decoder(model, 4, 64, max_length=40, graph=graph)
        slots = torch.arange(4, device=model.device)
        decoder.admit(slots, state)
        steps = [decoder.step(ids[:, 32 + i], slots).clone() for i in range(8)]
        runs["graph" if graph else "steps"] = torch.stack(steps, 1).float()
    for name, logits in runs.items():
        error = (logits - truth).abs().amax(-1)
        clear = best[..., 0] - best[..., 1] > 2 * error
        found[name] = float((logits - truth).norm() / truth.norm())
        found[f"{name}, clear tokens"] = int(clear.sum())
        found[f"{name}, of them equal"] = int((clear & (logits.argmax(-1) == truth.argmax(-1))).sum())
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="hovle-2.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["linear", "hybrid", "teacher"])
    parser.add_argument("--rule", choices=get_args(Rule), default="ssd", help="the recurrence of the students")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a piece of a prompt")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    return parser.parse_args()


def with_rule(subject: Subject, rule: Rule) -> Subject:
    """Return the subject with another recurrence in its Mamba-2 layers."""
    if rule == "ssd":
        return subject
    mixer = replace(subject.config.mixer, rule=rule, qk_norm=True)
    return replace(subject, config=replace(subject.config, mixer=mixer))


def measurements(model: Model, kind: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is measured of a model: a label, and the call that measures it."""
    what, small, on_gpu = args.only, args.geometry == "nano", torch.device(args.device).type == "cuda"
    length = 512 if small else 103_424
    if "check" in what:
        yield "relative error against a whole pass", partial(check, model)
    if "decode" in what:
        for context in (64, 2 * length) if small else (1024, 2**20) if kind == "linear" else (1024, length):
            yield f"decode, batch 1, context {context:,}", partial(decode, model, context=context)
    if "batch" in what and kind == "linear":
        for batch, state in itertools.product((8,) if small else (256, 1024), (torch.float32, torch.bfloat16)):
            label = f"decode, batch {batch}, {str(state)[6:]} state"
            yield label, partial(decode, model, context=1024, batch=batch, state_dtype=state)
    if "batch" in what and kind == "teacher":
        label, budget = f"decode, greatest batch, context {length:,}", None if on_gpu else 10**9
        yield label, partial(greatest_batch, model, context=length, budget=budget)
    if "prefill" in what:
        for tokens in (64,) if small else (1024, length):
            yield f"prefill of {tokens:,}", partial(read_prompt, model, length=tokens, chunk=args.chunk, seconds=3.0)
    if "session" in what and kind == "linear":
        yield f"session of {length:,}", partial(time_session, model, length=length, chunk=args.chunk)
    if "int8" in what:  # the last: its copies of the weights stay as long as the model
        model.int8_steps = True
        yield f"decode, batch 1, context {length:,}, int8", partial(decode, model, context=length)


def line(row: dict[str, Any], rates: Rates) -> str | None:
    """Return a measurement as a line of the table; None for what the table does not show."""
    if "timing" in row:
        milliseconds, limit = row["timing"]["ms"], rates.ms(Cost(bytes=row["bytes"], flops=row["flops"]))
        over = "" if row["peak_bytes"] is None else f"{(row['peak_bytes'] - row['weights']) / 1e9:.2f}"
        what = row["what"] + (f" ({row['batch']})" if row["batch"] > 1 and str(row["batch"]) not in row["what"] else "")
        return (f"| {row['kind']} | {what} | {milliseconds:.3f} | {row['tokens_per_s']:,.0f} "
                f"| {limit / milliseconds:.0%} | {over} |")  # fmt: skip
    if "save_ms" in row:
        return (f"| {row['kind']} | {row['what']}, {row['file_bytes'] / 1e6:.1f} MB: save, resume, first fingerprint "
                f"| {row['save_ms']:.1f}, {row['resume_ms']:.1f}, {row['fingerprint_ms']:.0f} | | "
                f"{'equal tokens' if row['same'] else 'OTHER TOKENS'} | |")  # fmt: skip
    return None


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measure_rates(device, dtype)
    print(f"copy {rates.bytes / 1e12:.2f} TB/s, matmul {rates.flops / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    subjects = {subject.kind: subject for subject in random_subjects(args.geometry)}
    with torch.no_grad():
        for kind in args.kinds:
            model = with_rule(subjects[kind], args.rule).open(device, dtype, seed=0)
            weights = weight_bytes(model)
            for label, call in measurements(model, kind, args):
                found = attempt(call, device)
                values = {"oom": True} if found is None else found if isinstance(found, dict) else to_dict(found)
                rows.append({"kind": kind, "what": label, "weights": weights, **values})
                print(kind, label, values.get("timing", values), flush=True)
                del call
            del model
            release(device)
    if args.out:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        record = {"device": name, "torch": torch.__version__, "rates": to_dict(rates), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n| model | what | ms | tokens/s | of the limit | peak over weights, GB |\n|---|---|---|---|---|---|")
    for row in rows:
        if (shown := line(row, rates)) is not None:
            print(shown)


if __name__ == "__main__":
    main()
