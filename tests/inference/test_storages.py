"""Generating leaves a model's storages as they were: every saver writes all of it, whoever still holds the pool."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_model

import mmmamba
from mmmamba.data.sample import Turn
from mmmamba.inference.decoder import Decoder
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model
from mmmamba.model.joined import join, joined, maps_of

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
DELTA = Mamba2Options(rope=True, qk_norm=True, rule="gated_delta", gate_bias=True)


def storages(model: Model) -> dict[str, tuple[int, int, int]]:
    """Of each parameter: its address, its storage's address and its storage's bytes."""
    found = {name: (p.data_ptr(), p.untyped_storage()) for name, p in model.named_parameters()}
    return {name: (at, storage.data_ptr(), storage.nbytes()) for name, (at, storage) in found.items()}


def check_own(model: Model) -> None:
    found, parameters = storages(model), dict(model.named_parameters())
    assert len({at for at, _, _ in found.values()}) == len(found)
    for name, (at, storage, size) in found.items():
        assert at == storage and size == parameters[name].nbytes, name


def begun(model: Model, slots: int = 2) -> tuple[Decoder, torch.Tensor]:
    ids = torch.tensor([[9, 40, 200], [88, 10, 12]])[:slots]
    with torch.no_grad():
        state = model(ids, logits="none", return_state=True, max_length=20).state
    decoder = Decoder(model, slots, 20, max_length=20)
    decoder.admit(torch.arange(slots), state)
    return decoder, torch.stack([decoder.step(ids[:, 0] + i, torch.arange(slots)) for i in range(3)])


@pytest.mark.parametrize("name", ["pico-linear", "pico-teacher"])
def test_generating_leaves_the_storages_and_what_is_saved(name: str, tmp_path: Path) -> None:
    model, processor = mmmamba.load(name), mmmamba.load_processor(name)
    before = storages(model)
    check_own(model)
    mmmamba.generate(model, processor, [processor.prompt([Turn("human", "Hi")])], max_new_tokens=2)
    kept, _ = begun(model)
    assert storages(model) == before
    Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"))
    save_model(model, str(tmp_path / "plain.safetensors"))
    saved = model.state_dict()
    for path in (tmp_path / "accelerate" / "model.safetensors", tmp_path / "plain.safetensors"):
        tensors = load_file(path)
        missing = set(saved) - set(tensors)
        assert missing <= ({"head.weight", "text_embeddings.weight"} if model.config.tie_word_embeddings else set())
        assert all(torch.equal(tensor, saved[key]) for key, tensor in tensors.items())
    assert kept.layers  # the pool has lived until here
    buffer = io.BytesIO()
    torch.save(model.layers[0].mlp.up.weight, buffer)
    assert len(buffer.getvalue()) < model.layers[0].mlp.up.weight.nbytes + 4096


def test_a_model_of_ones_own_is_left_alone(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(HYBRID, DELTA).requires_grad_(False)
    before = storages(model)
    begun(model)
    assert storages(model) == before
    shared = model.share_memory()
    before = storages(shared)
    begun(shared)
    join(shared.layers)
    assert storages(shared) == before and all(p.is_shared() for p in shared.parameters())


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("int8", [False, True])
def test_matrices_side_by_side_are_one_product_and_no_more_memory(
    tiny_model: Callable[..., Model], slots: int, int8: bool
) -> None:
    model = tiny_model(HYBRID, DELTA).double().requires_grad_(False)
    model.int8_steps = int8
    apart = copy.deepcopy(model)
    values = copy.deepcopy(model.state_dict())
    join(model.layers)
    check_own(model)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    (decoder, ours), (other, truth) = begun(model, slots), begun(apart, slots)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    for layer, step, separate in zip(model.layers, decoder.layers, other.layers, strict=True):
        for maps, product, products in zip(
            maps_of(layer), (step.project, step.gate_up), (separate.project, separate.gate_up), strict=True
        ):
            if int8:
                assert product.weight.dtype == products.weight.dtype == torch.int8
                continue
            assert product.weight.data_ptr() == maps[0].weight.data_ptr()  # the whole is the parts
            assert product.weight.nbytes == sum(one.weight.nbytes for one in maps)
            assert products.weight is None
    with torch.no_grad():  # what changes a parameter changes the product
        model.layers[0].mlp.up.weight.zero_()
    if not int8:
        assert decoder.layers[0].gate_up.weight[-1].abs().max() == 0


def test_what_is_moved_is_laid_out_again_and_what_is_replaced_is_not_read(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(HYBRID, DELTA)
    join(model.layers)
    every = [maps for layer in model.layers for maps in maps_of(layer)]
    assert all(joined(maps) is not None for maps in every)
    before = storages(model)
    model.float()  # they were: nothing moves
    assert storages(model) == before
    model.double()
    assert all(joined(maps).dtype == torch.float64 for maps in every)
    check_own(model)
    model.layers[1].mlp.up.weight.data = model.layers[1].mlp.up.weight.data.clone()
    assert joined([model.layers[1].mlp.gate, model.layers[1].mlp.up]) is None
    begun(model)
    model.layers[2].mlp.up = torch.nn.Linear(64, 128, bias=False).double()
    truth = copy.deepcopy(model)
    torch.testing.assert_close(begun(model)[1], begun(truth)[1], rtol=1e-9, atol=1e-9)


def test_training_goes_on_in_place(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(HYBRID, DELTA)
    join(model.layers)
    twin = copy.deepcopy(model)
    check_own(twin)
    ids = torch.tensor([[9, 40, 200, 31]])
    for one in (model, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            one(ids).logits.square().mean().backward()
            optimizer.step()
    assert all(joined(maps) is not None for layer in model.layers for maps in maps_of(layer))
    torch.testing.assert_close(begun(model)[1], begun(twin)[1])
