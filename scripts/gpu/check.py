"""Check a GPU against the CPU: every layer kind, packed rows, states, the three stages' backward passes.

python scripts/gpu/check.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba.data.packed_batch import Batch
from mmmamba.distill.objectives import AlignHeads, MatchLogits, PredictAnswers
from mmmamba.distill.seeding import seed
from mmmamba.distill.train_config import StageConfig
from mmmamba.model import Mamba2Options, Model, ModelConfig, StackConfig, VisionConfig, initialise

DEVICE = "cuda"
ALL = ("dt_bias", "dt_proj", "A_log", "conv", "gate_proj", "norm", "q_proj", "k_proj", "v_proj")


def teacher() -> Model:
    stack = StackConfig(num_layers=2, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=32)
    config = ModelConfig(hidden_size=128, vocab_size=320, embedding=stack, decoder=stack, img_context_token_id=7,
                         vision=VisionConfig(image_size=64, patch_size=8))  # fmt: skip
    return initialise(Model(config))


def row() -> Batch:
    lengths = [30, 200, 75]
    torch.manual_seed(0)
    ids = torch.randint(8, 300, (1, sum(lengths)))
    ids[0, 3:19] = 7
    labels = torch.where(torch.rand(ids.shape) < 0.2, ids, -100)
    labels[0, [0, 30, 230]] = -100
    return Batch(input_ids=ids, labels=labels, cu_seqlens=torch.tensor([0, 30, 230, 305], dtype=torch.int32),
                 tiles=torch.randint(0, 255, (1, 64, 64, 3), dtype=torch.uint8), ids=["a", "b", "c"])  # fmt: skip


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.float().cpu() - truth.float()).norm() / truth.float().norm())


def run(device: str, precision: torch.dtype) -> dict[str, Tensor]:
    """Losses and gradients of every objective on a device."""
    results = {}
    stage = StageConfig(steps=1, batch_size=3, lr=1.0, train=ALL)
    for name, mixer in {"published": Mamba2Options(), "rotated": Mamba2Options(rope=True, qk_norm=True)}.items():
        for objective_name in ("align", "match", "hybrid", "teach"):
            model = teacher().to(device)
            layers = ("attention", "mamba2", "mamba2", "attention") if objective_name == "hybrid" else None
            student = seed(model, layers, mixer)
            objective = (
                PredictAnswers(model) if objective_name == "teach"
                else (AlignHeads if objective_name == "align" else MatchLogits)(model, student, stage)
            )  # fmt: skip
            loss = objective.backward([row().to(device)], precision)["loss"]
            key = f"{name}/{objective_name}"
            results[f"{key} loss"] = loss.detach()[None]
            gradients = [p.grad.flatten() for p in objective.trained.values() if p.grad is not None]
            results[f"{key} gradient"] = torch.cat(gradients)
            with torch.no_grad():
                ids, cu = row().input_ids.to(device), row().cu_seqlens.to(device)
                results[f"{key} logits"] = student(ids, cu_seqlens=cu).logits
                state = student(ids[:, :150], return_state=True).state
                results[f"{key} chunked"] = student(ids[:, 150:], state=state).logits
    return results


def main() -> None:
    truth = run("cpu", torch.float32)
    failed = 0
    for precision, limit in ((torch.float32, 2e-3), (torch.bfloat16, 6e-2)):
        for key, value in run(DEVICE, precision).items():
            difference = error(value, truth[key])
            bad = not difference < limit
            failed += bad
            print(f"{'BAD ' if bad else 'ok  '} {precision!s:16} {key:28} {difference:.1e}")
    print(f"{failed} failed" if failed else "all agree")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
