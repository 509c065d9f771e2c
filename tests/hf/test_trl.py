"""TRL's trainers train our models: three steps each of SFT, DPO and GRPO, over text and over pictures."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from wrapped import picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
if any(importlib.util.find_spec(name) is None for name in ("trl", "peft")):
    pytest.skip("pip install 'mmmamba[test-all]'", allow_module_level=True)

COLOURS = ("red", "green", "white", "yellow")


def said(role: str, text: str, *, image: bool = False) -> dict[str, Any]:
    parts = [{"type": "image", "text": None}] if image else []
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def plain(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset  # here and below: nobody waits for what only slow tests need

    return Dataset.from_list(rows)


def texts(*columns: str) -> Any:
    """Rows about colours without pictures; ``columns`` are those of the trainer."""
    rows = []
    for i, colour in enumerate(COLOURS * 2):
        question = [plain("user", f"hello {i}")]
        row = {
            "messages": [*question, plain("assistant", colour)],
            "prompt": question,
            "chosen": [plain("assistant", colour)],
            "rejected": [plain("assistant", "blue")],
        }
        rows.append({name: row[name] for name in columns})
    return dataset(rows)


def pictures(*columns: str) -> Any:
    rows = []
    for colour in COLOURS:
        question = [said("user", "What colour is the circle?", image=True)]
        row = {
            "messages": [*question, said("assistant", colour)],
            "prompt": question,
            "chosen": [said("assistant", colour)],
            "rejected": [said("assistant", "blue")],
        }
        rows.append({"images": [picture(colour)], **{name: row[name] for name in columns}})
    return dataset(rows)


def trainer_of(kind: str, folder: str, out: Path, rows: Any, settings: dict[str, Any], **more: Any) -> Any:
    """``trl.<kind>Trainer`` of a folder."""
    import trl

    shared = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    arguments = getattr(trl, f"{kind}Config")(output_dir=str(out), **shared, **quiet, **settings)
    return getattr(trl, f"{kind}Trainer")(model=folder, args=arguments, train_dataset=rows, **more)


def train(trainer: Any) -> list[str]:
    """The names of the tensors that three steps changed; every loss is finite."""
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3 and all(math.isfinite(entry["loss"]) for entry in history)
    assert max(entry["grad_norm"] for entry in history) > 1e-4
    return [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]


@pytest.fixture(params=["pico-linear", "pico-teacher"])
def folder(request: pytest.FixtureRequest, folder_of) -> str:
    return str(folder_of(request.param))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"packing": True},
        {"gradient_checkpointing": True},
        {"padding_free": True, "max_length": None},
        {"assistant_only_loss": True},
    ],
    ids=lambda more: "-".join(more) or "plain",
)
def test_sft_of_texts(folder: str, tmp_path: Path, more: dict[str, Any]) -> None:
    trainer = trainer_of("SFT", folder, tmp_path, texts("messages"), {"max_length": 128} | more)
    changed = train(trainer)
    assert "layers.0.mixer.q_proj.weight" in changed and "head.weight" in changed
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_sft_of_pictures(folder: str, tmp_path: Path) -> None:
    changed = train(trainer_of("SFT", folder, tmp_path, pictures("messages"), {"max_length": None}))
    assert "vision.patch_embedding.weight" in changed and "head.weight" in changed


@pytest.mark.parametrize("data", [texts, pictures], ids=["texts", "pictures"])
def test_dpo(folder: str, tmp_path: Path, data: Any) -> None:
    settings = {"max_length": None if data is pictures else 128}
    trainer = trainer_of("DPO", folder, tmp_path, data("prompt", "chosen", "rejected"), settings)
    changed = train(trainer)
    assert "head.weight" in changed and ("vision.patch_embedding.weight" in changed) is (data is pictures)
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-3)  # the reference is the model itself


@pytest.mark.parametrize("data", [texts, pictures], ids=["texts", "pictures"])
def test_grpo(folder: str, tmp_path: Path, data: Any) -> None:
    def length(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(i) + len(str(one)) % 3 for i, one in enumerate(completions)]

    settings = {"num_generations": 2, "max_completion_length": 8, "temperature": 3.0, "seed": 1}
    trainer = trainer_of("GRPO", folder, tmp_path, data("prompt"), settings, reward_funcs=length)
    changed = train(trainer)
    assert "head.weight" in changed and ("vision.patch_embedding.weight" in changed) is (data is pictures)


def test_sft_of_an_adapter(folder: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of("SFT", folder, tmp_path, texts("messages"), {"max_length": 128}, peft_config=lora)
    changed = train(trainer)
    adapters = [name for name in trainer.model.state_dict() if "lora_" in name and ".vision." not in name]
    assert adapters and set(changed) == set(adapters)
