"""Is the engine right at the 2.6 B geometry, and how far is it from the machine? Random weights in bfloat16, one GPU.

    python scripts/gpu/engine.py --out engine.json                 # linear, hybrid, teacher
    python scripts/gpu/engine.py --kinds linear --only decode
    python scripts/gpu/engine.py --geometry nano --device cpu      # tries this script itself

A look at a few points while the engine is worked on: the whole report is ``mmmamba bench``, whose measuring this is.
Before it is timed, every kind's graph is compared with the same steps as they come, and those with a whole pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba.benchmark.limits import Cost, measure_rates
from mmmamba.benchmark.measure import decode, read_prompt
from mmmamba.benchmark.memory import attempt, release
from mmmamba.benchmark.subjects import KINDS, random_subjects
from mmmamba.config import to_dict
from mmmamba.inference.decoder import Decoder
from mmmamba.model import Model


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="hovle-2.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", default="linear,hybrid,teacher", help="comma-separated: %(default)s")
    parser.add_argument("--only", default="check,decode,batch,prefill", help="comma-separated: %(default)s")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a piece of a prompt")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args()
    kinds, what = args.kinds.split(","), args.only.split(",")
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kinds {args.kinds}: known are {', '.join(KINDS)}")
    device, small = torch.device(args.device), args.geometry == "nano"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measure_rates(device, dtype)
    print(f"copy {rates.bytes / 1e12:.2f} TB/s, matmul {rates.flops / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []

    def note(kind: str, label: str, call: Callable[[], Any]) -> None:
        found = attempt(call, device)
        values = {"oom": True} if found is None else found if isinstance(found, dict) else to_dict(found)
        rows.append({"kind": kind, "what": label, **values})
        print(kind, label, values.get("timing", values), flush=True)

    contexts = (64, 256) if small else (1024, 103_424)
    length = 512 if small else 103_424
    subjects = {subject.kind: subject for subject in random_subjects(args.geometry)}
    with torch.no_grad():
        for kind in kinds:
            model = subjects[kind].open(device, dtype, seed=0)
            if "check" in what:
                note(kind, "relative error against a whole pass", partial(check, model))
            if "decode" in what:
                for context in contexts:
                    note(kind, f"decode, batch 1, context {context:,}", partial(decode, model, context=context))
            if "batch" in what and kind == "linear":
                for batch in (8,) if small else (256, 1024):
                    for state in (torch.float32, torch.bfloat16):
                        call = partial(decode, model, context=1024, batch=batch, state_dtype=state)
                        note(kind, f"decode, batch {batch}, {str(state)[6:]} state", call)
            if "prefill" in what:
                call = partial(read_prompt, model, length=length, chunk=args.chunk, seconds=3.0)
                note(kind, f"prefill of {length:,}", call)
            del model
            release(device)
    if args.out:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        record = {"device": name, "torch": torch.__version__, "rates": to_dict(rates), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n| model | what | ms | tokens/s | of the limit |\n|---|---|---|---|---|")
    for row in rows:
        if "timing" in row:
            milliseconds, limit = row["timing"]["ms"], rates.ms(Cost(bytes=row["bytes"], flops=row["flops"]))
            of = f"{limit / milliseconds:.0%}"
            print(f"| {row['kind']} | {row['what']} | {milliseconds:.3f} | {row['tokens_per_s']:,.0f} | {of} |")


if __name__ == "__main__":
    main()
