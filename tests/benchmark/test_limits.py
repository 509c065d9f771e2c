"""What is counted is what is there: the bytes of states, of weights, the operations of a pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmmamba.benchmark.limits import Cost, Rates, _matrices, int8_bytes, prefill_cost, step_cost
from mmmamba.benchmark.measure import furnished
from mmmamba.model import ATTENTION, MAMBA2, Model
from mmmamba.model.state import state_bytes

MAPS = {
    "teacher": (ATTENTION,) * 5,
    "linear": (MAMBA2,) * 5,
    "hybrid": (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2),
}


@pytest.fixture(params=MAPS)
def model(request, tiny_model) -> Model:
    return tiny_model(MAPS[request.param]).requires_grad_(False)


def test_a_state_has_the_bytes_that_are_counted(model):
    state = model(torch.zeros(1, 24, dtype=torch.long), return_state=True).state
    kept = [
        getattr(layer, name) for layer in state.layers for name in ("k", "v", "conv", "ssm") if hasattr(layer, name)
    ]
    assert state_bytes(model.config, torch.float32).at(24) == sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_slot_has_the_bytes_that_are_counted(model, state_dtype):
    decoder = furnished(model, context=24, batch=3, state_dtype=state_dtype, graph=False)
    held = sum(
        getattr(layer, name)[0].nbytes
        for layer in decoder.pool
        for name in ("k", "v", "conv", "ssm")
        if hasattr(layer, name)
    )
    assert held == state_bytes(model.config, torch.float32, state_dtype).at(decoder.capacity)
    assert decoder.positions[:3].tolist() == [24] * 3 and decoder.longest == 24


def test_the_operations_of_a_prefill(tiny_model):
    """PyTorch's own count: it counts the whole square of causal attention, and so must differ by just that."""
    model = tiny_model().requires_grad_(False)
    length = 64
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(1, length, dtype=torch.long), logits="last")
    square = sum(4 * 64 * length * length for _ in model.layers)
    triangle = square * (length + 1) / (2 * length)
    ours = prefill_cost(model, state_bytes(model.config, torch.float32), length=length).flops
    assert ours - triangle + square == pytest.approx(counted.get_total_flops())


def test_a_step_moves_weights_once_and_states_twice(model):
    state = state_bytes(model.config, torch.float32)
    one, three = (step_cost(model, state, context=10, batch=batch) for batch in (1, 3))
    read = sum(p.nbytes for p in model.layers.parameters()) + model.norm.weight.nbytes + model.head.weight.nbytes
    assert one.bytes == read + 2 * state.recurrent + 10 * state.per_token
    assert three.bytes - read == 3 * (one.bytes - read)
    assert three.flops == 3 * one.flops


def test_int8_weights_are_a_byte_an_element_and_a_scale_a_row(model):
    state = state_bytes(model.config, torch.float32)
    assert int8_bytes(model) == 0
    own, read = step_cost(model, state, context=10), prefill_cost(model, state, length=10)
    model.int8_steps = True
    maps = _matrices(model)
    decoder = furnished(model, context=10, batch=1, graph=False)
    copies = [
        decoder.head,
        *(m for layer in decoder.layers for m in (layer.project, layer.out, layer.gate_up, layer.down)),
    ]
    assert int8_bytes(model) == sum(one.weight.nbytes + one.scale.nbytes for one in copies)
    int8 = step_cost(model, state, context=10)
    assert own.bytes - int8.bytes == sum(matrix.nbytes for matrix in maps) - int8_bytes(model)
    assert int8.flops == own.flops and prefill_cost(model, state, length=10) == read


def test_the_slower_of_moving_and_computing_is_the_limit():
    rates = Rates(bytes=1e9, flops=1e12)
    assert rates.ms(Cost(bytes=1e9, flops=1e9)) == pytest.approx(1e3)
    assert rates.ms(Cost(bytes=1.0, flops=5e12)) == pytest.approx(5e3)
