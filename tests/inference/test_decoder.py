"""The pool of states: a step in place is a pass of the model, whoever joins, leaves or idles beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmmamba.inference.decoder import Decoder
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, RopeScaling, State, initialise
from mmmamba.ops import quantize_rows
from tiny import make_config

TEACHER = (ATTENTION,) * 5
LINEAR = (MAMBA2,) * 5
HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
ROTATED = Mamba2Options(rope=True, qk_norm=True, conv_kernel=3, conv_activation="none", gate_bias=True)
CASES = {
    "teacher": (TEACHER, Mamba2Options(), {}),
    "linear": (LINEAR, Mamba2Options(), {}),
    "linear, rotated": (LINEAR, ROTATED, {}),
    "linear, delta rule": (LINEAR, replace(ROTATED, rule="gated_delta"), {}),
    "hybrid": (HYBRID, Mamba2Options(rope=True), {}),
    "hybrid, linear scaling": (HYBRID, ROTATED, {"rope_scaling": RopeScaling(type="linear", factor=2.5)}),
    "hybrid, dynamic scaling": (
        HYBRID,
        ROTATED,
        {"rope_scaling": RopeScaling(type="dynamic", factor=2.0), "max_position_embeddings": 8},
    ),
}
LENGTHS = [3, 9, 1, 6]


def build(name: str, **scaled) -> Model:
    layer_map, mixer, changes = CASES[name]
    config = make_config(layer_map, mixer)
    changes = {**changes, **scaled}
    config = replace(config, embedding=replace(config.embedding, **changes), decoder=replace(config.decoder, **changes))
    model = initialise(Model(config)).double().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def begun(model: Model) -> State:
    ids = torch.randint(8, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0)).to(model.device)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=model.device)
    return model(ids, cu_seqlens=borders, logits="none", return_state=True, max_length=40).state


@pytest.fixture(params=CASES)
def model(request) -> Model:
    return build(request.param)


def close(ours: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


def test_steps_are_passes_of_the_model(model):
    state = begun(model)
    decoder = Decoder(model, 4, 20, max_length=state.max_length)
    slots = torch.tensor([2, 0, 3, 1])
    decoder.admit(slots, state)
    for step in range(5):
        tokens = torch.tensor([8, 40, 77, 200]) + step
        out = model(tokens[:, None], state=state, logits="last", return_state=True)
        close(decoder.step(tokens, slots), out.logits)
        state = out.state
    for ours, truth in zip(decoder.export(slots).layers, state.layers, strict=True):
        if hasattr(truth, "ssm"):
            close(ours.ssm, truth.ssm)
            close(ours.conv, truth.conv)
        else:
            for kept, expected in ((ours.k, truth.k), (ours.v, truth.v)):
                for row in range(4):  # wherever a pass left gaps
                    close(kept[row][ours.filled[row]], expected[row][truth.filled[row]])
    assert torch.equal(decoder.export(slots).positions, state.positions)


def test_who_joins_leaves_or_idles_changes_nobody_else(model):
    state = begun(model)
    alone = []
    for row in range(4):
        decoder = Decoder(model, 1, 20, max_length=state.max_length)
        decoder.admit(torch.tensor([0]), state.select(torch.tensor([row])))
        alone.append(torch.cat([decoder.step(torch.tensor([9 + row + i]), torch.tensor([0])) for i in range(4)]))
    pool = Decoder(model, 3, 20, max_length=state.max_length)
    pool.admit(torch.tensor([0, 2]), state.select(torch.tensor([0, 1])))
    first = pool.step(torch.tensor([9, 5, 10]), torch.tensor([0, -1, 2]))
    pool.admit(torch.tensor([1]), state.select(torch.tensor([2])))  # joins a running batch
    second = pool.step(torch.tensor([11, 10, 11]), torch.tensor([1, 0, 2]))
    third = pool.step(torch.tensor([12, 12]), torch.tensor([2, 1]))  # slot 0 has left
    pool.admit(torch.tensor([0]), state.select(torch.tensor([3])))  # its slot is given away
    fourth = pool.step(torch.tensor([7, 12, 7, 13]), torch.tensor([-1, 0, -1, 2]))
    for ours, (row, step) in {
        (0, first): (0, 0), (2, first): (1, 0), (0, second): (2, 0), (1, second): (0, 1), (2, second): (1, 1),
        (0, third): (1, 2), (1, third): (2, 1), (1, fourth): (3, 0), (3, fourth): (1, 3),
    }.items():  # fmt: skip
        close(ours[1][ours[0]], alone[row][step])


def test_an_exported_state_goes_on_alone_and_is_changed_by_no_step(model):
    state = begun(model)
    decoder = Decoder(model, 4, 20, max_length=state.max_length)
    decoder.admit(torch.arange(4), state)
    decoder.step(torch.arange(8, 12), torch.arange(4))
    kept = decoder.export(torch.tensor([1]))
    before = [t.clone() for layer in kept.layers for t in vars(layer).values()]
    logits = decoder.step(torch.tensor([50]), torch.tensor([1]))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (t for k in kept.layers for t in vars(k).values()), strict=True)
    )
    close(model(torch.tensor([[50]]), state=kept, logits="last").logits, logits)


@pytest.mark.parametrize("name", ["linear, rotated", "linear, delta rule"])
def test_states_in_bfloat16_stay_near_the_others(name):
    model = build(name).float()
    state = begun(model)
    wide = Decoder(model, 4, 60, max_length=40)
    model.half_states = True
    narrow = Decoder(model, 4, 60, max_length=40)
    assert narrow.pool[0].ssm.dtype == torch.bfloat16
    for decoder in (wide, narrow):
        decoder.admit(torch.arange(4), state)
    for step in range(40):
        truth, ours = (decoder.step(torch.arange(8, 12) + step, torch.arange(4)) for decoder in (wide, narrow))
    assert narrow.export(torch.arange(4)).layers[0].ssm.dtype == torch.float32
    assert 0 < (ours - truth).norm() < 0.05 * truth.norm()


def test_a_sequence_never_outgrows_its_slot():
    model = build("hybrid")
    state = begun(model)
    decoder = Decoder(model, 4, 10, max_length=state.max_length)
    decoder.admit(torch.arange(4), state)
    decoder.step(torch.arange(8, 12), torch.arange(4))
    with pytest.raises(ValueError, match="10 tokens"):
        decoder.step(torch.arange(8, 12), torch.arange(4))
    with pytest.raises(ValueError, match="9 tokens does not fit"):
        Decoder(model, 4, 8, max_length=state.max_length).admit(torch.arange(4), state)


def held(decoder: Decoder) -> int:
    return sum(tensor.nbytes for kept in decoder.pool for tensor in kept.tensors())


@pytest.mark.parametrize("name", ["teacher", "hybrid", "linear"])
def test_caches_grow_with_what_they_hold_and_change_nothing(name, monkeypatch):
    model = build(name)
    state = begun(model)
    fixed, long = (Decoder(model, 4, capacity, max_length=40) for capacity in (40, 1_000_000))
    for decoder in (fixed, long):
        decoder.admit(torch.arange(4), state)
    assert held(long) < 2**24  # with room for a million tokens it would be 2**33
    monkeypatch.setattr("mmmamba.inference.decoder.AHEAD", 2)
    growing = Decoder(model, 4, 40, max_length=40)
    growing.admit(torch.arange(4), state)
    rooms = []
    for step in range(31):
        tokens, slots = torch.arange(8, 12) + step, torch.tensor([0, 1, -1, 3] if step % 3 else [0, 1, 2, 3])
        truth = fixed.step(tokens, slots)
        assert torch.equal(long.step(tokens, slots), truth)
        close(growing.step(tokens, slots), truth)
        rooms.append(growing.room)
    if name != "linear":
        assert sorted(set(rooms)) == [11, 22, 40]  # each time twice, and never more than the capacity
    for ours, truth in zip(growing.export(torch.arange(4)).layers, fixed.export(torch.arange(4)).layers, strict=True):
        for one, other in zip(vars(ours).values(), vars(truth).values(), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="40 tokens"):
        growing.step(torch.arange(8, 12), torch.arange(4))


def test_steps_with_int8_weights_are_those_of_the_rounded_matrices():
    model, rounded = build("hybrid"), build("hybrid")
    state = begun(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded_maps = [module for module in rounded.modules() if isinstance(module, torch.nn.Linear)]
    for map_ in rounded_maps[rounded_maps.index(rounded.layers[0].mixer.q_proj) :]:
        weight, scale = quantize_rows(map_.weight)
        map_.weight.data = weight * scale.double()[:, None]
    model.int8_steps = True
    ours, truth, own = (Decoder(one, 4, 20, max_length=40) for one in (model, rounded, build("hybrid")))
    for decoder in (ours, truth, own):
        decoder.admit(torch.arange(4), state)
    steps = [
        [decoder.step(torch.arange(8, 12) + i, torch.arange(4)) for i in range(3)] for decoder in (ours, truth, own)
    ]
    for a, b, c in zip(*steps, strict=True):
        close(a, b)
        assert 1e-4 < (a - c).norm() / c.norm() < 0.05
    for name, value in model.state_dict().items():  # a pass, and a checkpoint, keep the weights as they are
        assert torch.equal(value, before[name]), name
    again = Decoder(model, 1, 4, max_length=4)
    assert again.head.weight is ours.head.weight  # rounded once
    model.head.weight += 0.1
    assert Decoder(model, 1, 4, max_length=4).head.weight is not ours.head.weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["teacher", "linear, rotated", "linear, delta rule", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_gives_what_the_steps_give(name, dtype, monkeypatch):
    monkeypatch.setattr("mmmamba.inference.decoder.AHEAD", 4)  # caches grow, and graphs are made again
    model = build(name, head_dim=32).to("cuda", dtype)
    state = begun(model)
    logits = {}
    for graph in (False, True):
        decoder = Decoder(model, 4, 40, max_length=state.max_length, graph=graph)
        decoder.admit(torch.arange(4, device="cuda"), state)
        seen = []
        for step in range(12):
            rows = torch.tensor([0, 1, 2, 3] if step % 2 else [3, 1, 0], device="cuda")
            seen.append(decoder.step(rows + 20 + step, rows).clone())
        logits[graph] = torch.cat(seen)
    error = (logits[True] - logits[False]).float().norm() / logits[False].float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
