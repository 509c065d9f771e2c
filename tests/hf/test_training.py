"""Training with transformers: its losses, gradient checkpointing and its Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from wrapped import wrap

from mmmamba.hf.state_cache import CACHE
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)


@pytest.fixture
def tiny(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(HYBRID, Mamba2Options(rope=True)).double()


def gradients(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_changes_no_gradient(
    tiny: Model, prompt: dict[str, torch.Tensor], options: dict[str, bool] | None
) -> None:
    model = wrap(tiny).train()
    labels = prompt["input_ids"].masked_fill(prompt["attention_mask"] == 0, -100)
    expected, runs = gradients(model, prompt, labels), []
    mixer = model.layers[2].mixer
    inner = mixer.heads
    mixer.heads = lambda *args, **kwargs: (runs.append(1), inner(*args, **kwargs))[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    found = gradients(model, prompt, labels)
    assert len(runs) == 2  # once more in the backward pass
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name]) for name in found)
    assert CACHE not in model(**prompt, use_cache=True)
    with torch.no_grad():
        assert CACHE in model(**prompt, use_cache=True)
    model.gradient_checkpointing_disable()
    runs.clear()
    gradients(model, prompt, labels)
    assert len(runs) == 1


def test_labels_that_are_shifted_already(tiny: Model, prompt: dict[str, torch.Tensor]) -> None:
    model, ids = wrap(tiny), prompt["input_ids"]
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**prompt, shift_labels=shifted).loss, model(**prompt, labels=ids).loss)
    assert torch.equal(model(**prompt, labels=ids * 0, shift_labels=shifted).loss, model(**prompt, labels=ids).loss)
    with pytest.raises(ValueError, match=r"shift_labels are \(3, 13\), the logits \(3, 14\)"):
        model(**prompt, shift_labels=shifted[:, 1:])


class Sentences(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.arange(20 + i, 28 + i)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_the_trainer_trains_saves_and_evaluates(folder_of, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of("pico-linear"))
    before = copy.deepcopy(model.state_dict())
    options = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=3,
    )
    trainer = Trainer(model=model, args=options, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0] < 20
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert "layers.1.mixer.A_log" in changed and "head.weight" in changed
    assert 0 < trainer.evaluate()["eval_loss"] < losses[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
