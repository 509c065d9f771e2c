"""peft's adapters on all that they may be put on: they change what the model says, learn, and can be merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from wrapped import generated, wrap

import mmmamba
from mmmamba.data.packed_batch import pack
from mmmamba.data.processor import Encoded
from mmmamba.data.sample import Turn
from mmmamba.distill.objectives import PredictAnswers
from mmmamba.inference.decoder import decodable
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
MIXER = Mamba2Options(rope=True, qk_norm=True, rule="gated_delta")
TARGETS: dict[str, Any] = {
    "q, v": ["q_proj", "v_proj"],
    "the mixers": ["k_proj", "dt_proj", "beta_proj", "gate_proj", "o_proj"],
    "the MLPs": ["gate", "up", "down"],
    "the ends": ["text_embeddings", "head"],
    "pictures": ["patch_embedding", "proj.0", "proj.2"],
    "all-linear": "all-linear",
}
KINDS: dict[str, dict[str, bool]] = {"LoRA": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}


@pytest.fixture
def tiny(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(HYBRID, MIXER).double()


def lora(model: Any, **options: Any) -> PeftModel:
    """An adapter that does something from the beginning."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options)).eval()


def without_gradient(model: PeftModel) -> list[str]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    return [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_changes_learns_and_merges(tiny: Model, prompt: dict[str, Tensor], targets: str, kind: str) -> None:
    plain = wrap(tiny)
    adapted = lora(copy.deepcopy(plain), target_modules=TARGETS[targets], **KINDS[kind])
    logits = adapted(**prompt).logits
    assert (logits - plain(**prompt).logits).abs().max() > 1e-3
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert without_gradient(adapted) == []
    with torch.no_grad():
        tokens = generated(adapted, **prompt)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**prompt).logits, logits, rtol=1e-8, atol=1e-8)
        assert torch.equal(generated(merged, **prompt), tokens)


def test_ia3_and_layer_norms_can_be_tuned(tiny: Model, prompt: dict[str, Tensor]) -> None:
    plain = wrap(tiny)
    for config in (
        IA3Config(target_modules=["k_proj", "v_proj", "down"], feedforward_modules=["down"], init_ia3_weights=False),
        LNTuningConfig(target_modules=["input_norm", "mlp_norm", "mixer.norm"]),
    ):
        adapted = get_peft_model(copy.deepcopy(plain), config).eval()
        adapted(**prompt).logits.square().sum().backward()
        assert without_gradient(adapted) == []


def test_parameters_of_the_convolution_can_be_targeted(tiny: Model) -> None:
    ids = torch.tensor([[9, 40, 200, 31]])
    adapted = lora(copy.deepcopy(tiny), target_modules=[], target_parameters=["conv.weight", "q_proj.weight"])
    logits = adapted(ids).logits
    assert (logits - tiny(ids).logits).abs().max() > 1e-3
    logits.square().sum().backward()
    assert without_gradient(adapted) == []


def test_a_loaded_model_with_an_adapter_answers_as_the_merged_one() -> None:
    model, processor = mmmamba.load("pico-linear"), mmmamba.load_processor("pico-linear")
    plain = copy.deepcopy(model).double()
    adapted = lora(model.double(), target_modules=["q_proj", "dt_proj", "o_proj", "up"])
    prompts = [processor.prompt([Turn("human", text)]) for text in ("Hi", "What colour is the circle?")]

    def ask(model: Model) -> list[tuple[int, ...]]:
        return [one.token_ids for one in mmmamba.generate(model, processor, prompts, max_new_tokens=6)]

    inner = adapted.get_base_model()
    assert inner is model and not decodable(inner)
    answers, before = ask(inner), ask(plain)
    assert answers != before
    merged = adapted.merge_and_unload()
    assert decodable(merged) and ask(merged) == answers


def test_a_stage_trains_an_adapter(tiny_model: Callable[..., Model]) -> None:
    adapted = lora(tiny_model(HYBRID, MIXER), target_modules=["q_proj", "dt_proj", "gate", "o_proj", "head"])
    model = adapted.get_base_model()
    objective = PredictAnswers(model)
    objective.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ids = np.arange(20, 32, dtype=np.int32)
    objective.backward([pack([Encoded(ids, ids, np.empty((0, 56, 56, 3), np.uint8))])], torch.float32)
    assert without_gradient(adapted) == []
