"""Seeding: what is inherited, what is shared, what is new, and from which random numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmmamba.distill.seeding import seed
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model
from mmmamba.model.mixers.mamba2 import OPEN_GATE, Mamba2

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)


def new_parameters(model: Model, layer: int) -> dict[str, torch.Tensor]:
    shared = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {n: p for n, p in model.layers[layer].mixer.named_parameters() if not n.startswith(shared)}


def test_what_the_student_does_not_change_is_the_teachers_own(tiny_model):
    teacher = tiny_model()
    student = seed(teacher, HYBRID)
    for name in ("vision", "text_embeddings", "norm", "head"):
        assert getattr(student, name) is getattr(teacher, name)
    for i, kind in enumerate(HYBRID):
        mine, theirs = student.layers[i], teacher.layers[i]
        assert mine.input_norm is theirs.input_norm and mine.mlp_norm is theirs.mlp_norm and mine.mlp is theirs.mlp
        assert mine.mixer.o_proj is theirs.mixer.o_proj
        assert (mine.mixer is theirs.mixer) == (kind == ATTENTION)
    assert student.config.layer_map == HYBRID and teacher.config.layer_map == (ATTENTION,) * 5


def test_nothing_is_left_on_the_meta_device(tiny_model):
    assert {p.device.type for p in seed(tiny_model()).parameters()} == {"cpu"}


def test_q_k_v_are_copies(tiny_model):
    teacher = tiny_model()
    student = seed(teacher)
    for i in range(5):
        for name in ("q_proj", "k_proj", "v_proj"):
            mine, theirs = (getattr(m.layers[i].mixer, name).weight for m in (student, teacher))
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in student.layers[0].mixer.q_proj.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_new_parameters_start_as_published(tiny_model, golden):
    mixer = seed(tiny_model()).layers[3].mixer
    assert isinstance(mixer, Mamba2)
    assert torch.equal(mixer.A_log, torch.ones(4)) and torch.equal(mixer.norm.weight, torch.ones(16))
    assert torch.equal(mixer.conv.weight, torch.tensor([0.0, 1.0]).expand(128, 2))
    assert not mixer.conv.bias.any() and not mixer.dt_proj.weight.any() and mixer.gate_proj.bias is None
    dt = F.softplus(mixer.dt_bias.detach())
    assert float(dt.min()) >= 1e-3 - 1e-9 and float(dt.max()) <= 0.1 + 1e-7
    bound = 2**-2.5 * math.sqrt(6 / (64 + 64))
    assert float(mixer.gate_proj.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)

    # The published seeding itself: the same constants, the same ranges.
    published, _ = golden("student_A_seeded")
    prefix = "language_model.model.layers.0.attention."
    theirs = {n.rpartition(prefix)[2]: t for n, t in published.items() if prefix in n}
    assert torch.equal(theirs["A_log_bias"].reshape(-1), torch.ones(4))
    assert torch.equal(theirs["conv1d.weight"].reshape(-1, 2)[0], torch.tensor([0.0, 1.0]))
    assert float(theirs["g_proj.weight"].abs().max()) == pytest.approx(bound, rel=0.02)
    their_dt = F.softplus(theirs["dt_bias"])
    assert 1e-3 - 1e-6 <= float(their_dt.min()) and float(their_dt.max()) <= 0.1 + 1e-6


def test_options_of_the_start(tiny_model):
    teacher = tiny_model()
    spread = seed(teacher, mixer=Mamba2Options(decay="spread", gate_bias=True)).layers[0].mixer
    assert torch.equal(spread.A_log, torch.zeros(4))
    dt = F.softplus(spread.dt_bias)
    torch.testing.assert_close(dt, torch.logspace(-3, -1, 4), rtol=1e-4, atol=0)
    assert torch.equal(spread.gate_proj.bias, torch.full((64,), OPEN_GATE))
    torch.testing.assert_close(F.silu(spread.gate_proj.bias), torch.ones(64))
    wide = seed(teacher, mixer=Mamba2Options(dt_min=0.2, dt_max=0.2, conv_kernel=4)).layers[0].mixer
    torch.testing.assert_close(F.softplus(wide.dt_bias), torch.full((4,), 0.2))
    assert torch.equal(wide.conv.weight, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(128, 4))


def test_the_delta_rule_starts_with_half_of_what_was_held(tiny_model):
    mixer = seed(tiny_model(), mixer=Mamba2Options(rule="gated_delta", qk_norm=True)).layers[0].mixer
    assert mixer.beta_proj.bias is None and mixer.beta_proj.weight.shape == (4, 64)
    assert torch.equal(mixer.strength(torch.randn(1, 3, 64)), torch.full((1, 3, 4), 0.5))
    assert "beta_proj.weight" not in dict(seed(tiny_model()).layers[0].mixer.named_parameters())


@pytest.mark.parametrize("init", ["inherit", "scratch"])
def test_a_random_start_is_mamba_2s(tiny_model, init):
    """The ranges of mamba_ssm's Mamba2: PyTorch's own for projections and convolution, A in [1, 16]."""
    teacher = tiny_model()
    mixer = Mamba2Options(conv_kernel=4, gate_bias=True)
    mixers = [seed(teacher, mixer=mixer, seed=i, init=init).layers[i].mixer for i in range(5)]
    for i, mine in enumerate(mixers):
        theirs = teacher.layers[i].mixer
        inherited = init == "inherit"
        assert (mine.o_proj is theirs.o_proj) == inherited
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight, before = getattr(mine, name).weight, getattr(theirs, name).weight
            assert torch.equal(weight, before) == inherited
            assert inherited or 0.9 / 8 < float(weight.detach().abs().max()) <= 1 / 8
        for parameter in (mine.dt_proj.weight, mine.gate_proj.weight, mine.gate_proj.bias):
            assert 0.8 / 8 < float(parameter.detach().abs().max()) <= 1 / 8
        for parameter in mine.conv.parameters():
            assert 0.4 < float(parameter.detach().abs().max()) <= 0.5 and abs(float(parameter.detach().mean())) < 0.1
        assert torch.equal(mine.norm.weight, torch.ones(16))
        assert 1e-3 <= float(F.softplus(mine.dt_bias.detach()).min()) <= float(F.softplus(mine.dt_bias).max()) <= 0.1001
    decays = torch.cat([mine.A_log.detach().exp() for mine in mixers])
    assert 1 <= float(decays.min()) < 5 and 12 < float(decays.max()) <= 16


@pytest.mark.parametrize("init", ["mimic", "inherit", "scratch"])
def test_a_start_depends_on_the_seed_alone(tiny_model, init):
    teacher = tiny_model()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    torch.manual_seed(1)
    one = seed(teacher, seed=3, init=init, dtype=torch.float64).state_dict()
    torch.manual_seed(2)
    again, other = (seed(teacher, seed=n, init=init, dtype=torch.float64).state_dict() for n in (3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    new = [name for name in one if name not in before or not torch.equal(one[name], before[name])]
    assert all(".mixer." in name for name in new)
    drawn = {name.split(".")[3] for name in one if not torch.equal(one[name], other[name])}
    expected = {"dt_bias", "gate_proj"} | ({"A_log", "conv", "dt_proj"} if init != "mimic" else set())
    assert drawn == expected | ({"q_proj", "k_proj", "v_proj", "o_proj"} if init == "scratch" else set())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_each_layer_draws_from_a_stream_of_its_own(tiny_model):
    """The same new parameters whatever the other layers are, and whatever the global random state is."""
    teacher = tiny_model()
    torch.manual_seed(1)
    linear = seed(teacher, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    hybrid = seed(teacher, HYBRID, seed=3)
    for i in (1, 2, 4):
        pairs = zip(new_parameters(linear, i).values(), new_parameters(hybrid, i).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    gates = [linear.layers[i].mixer.gate_proj.weight for i in range(5)]
    assert not any(torch.equal(a, b) for i, a in enumerate(gates) for b in gates[:i])
    assert not torch.equal(seed(teacher, seed=4).layers[0].mixer.gate_proj.weight, gates[0])
    assert torch.equal(seed(teacher, seed=3).layers[0].mixer.gate_proj.weight, gates[0])
    assert state.shape == torch.get_rng_state().shape


def test_a_student_takes_over_aligned_mixers(tiny_model):
    teacher = tiny_model()
    aligned = seed(teacher)
    hybrid = seed(teacher, HYBRID, aligned=aligned)
    for i, kind in enumerate(HYBRID):
        assert hybrid.layers[i].mixer is (teacher if kind == ATTENTION else aligned).layers[i].mixer


def test_a_softmax_layer_must_exist_in_the_teacher(tiny_model):
    with pytest.raises(ValueError, match="layer 0: the layer map keeps softmax, the teacher has none there"):
        seed(tiny_model((MAMBA2, *(ATTENTION,) * 4)), HYBRID)
    with pytest.raises(ValueError, match="layer_map has 3 entries for 5 layers"):
        seed(tiny_model(), (MAMBA2,) * 3)
