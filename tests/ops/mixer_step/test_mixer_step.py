"""One decoding step: against the model's own mixer on one token, in place, for a part of the pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.model import Mamba2Options
from mmmamba.model.mixers.mamba2 import Mamba2, MambaState
from mmmamba.model.rope import rotation
from mmmamba.ops.mixer_step import mixer_step
from mmmamba.ops.mixer_step.reference import round_stochastically
from tiny import make_config


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(2, 4),
    silu=st.booleans(),
    rope=st.booleans(),
    qk_norm=st.sampled_from([False, True, "and the delta rule"]),
    by_position=st.booleans(),
    bits=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_the_models_mixer_on_one_token(k, silu, rope, qk_norm, by_position, bits):
    torch.manual_seed(k)
    activation = "silu" if silu else "none"
    delta, qk_norm = isinstance(qk_norm, str), bool(qk_norm)
    rule = "gated_delta" if delta else "ssd"
    config = Mamba2Options(rule=rule, conv_kernel=k, conv_activation=activation, rope=rope, qk_norm=qk_norm)
    stack = replace(make_config().decoder, rope_theta=100.0)
    mixer = Mamba2(64, stack, config).double()
    h, p, b, pool = mixer.heads_count, mixer.head_dim, 3, 5
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        x = torch.randn(b, 1, 64, dtype=torch.float64)
        conv = torch.randn(pool, k - 1, (h + 2 * mixer.groups) * p, dtype=torch.float64)
        ssm = torch.randn(pool, h, p, p, dtype=torch.float64)
        slots = torch.tensor([4, 0, 2], dtype=bits)
        positions = torch.tensor([7, 0, 912])
        turn = rotation(stack, positions[:, None], 1000, torch.float64)
        before = MambaState(conv[slots.long()], ssm[slots.long()])
        truth, after = mixer.heads(x, before, rotation=turn, keep_state=True)
        kept = conv[[1, 3]].clone(), ssm[[1, 3]].clone()
        angles = {}
        if rope and by_position:
            steps = torch.arange(0, p, 2, dtype=torch.float64) / p
            angles = {"positions": positions, "frequencies": 1 / 100.0**steps}
        elif rope:
            angles = {"rotation": (turn.cos[:, 0, 0], turn.sin[:, 0, 0])}
        ours = mixer_step(
            torch.cat([mixer.v_proj(x), mixer.k_proj(x), mixer.q_proj(x)], -1)[:, 0],
            mixer.gate_proj(x)[:, 0],
            mixer.dt_proj(x)[:, 0],
            conv_weight=mixer.conv.weight, conv_bias=mixer.conv.bias, dt_bias=mixer.dt_bias, A_log=mixer.A_log,
            norm_weight=mixer.norm.weight, conv_state=conv, ssm_state=ssm, slots=slots, eps=config.norm_eps,
            activation=activation, qk_norm=qk_norm, beta_raw=mixer.beta_proj(x)[:, 0] if delta else None, **angles,
        )  # fmt: skip
    torch.testing.assert_close(ours.view(b, 1, h, p), truth)
    torch.testing.assert_close(conv[slots.long()], after.conv)
    torch.testing.assert_close(ssm[slots.long()], after.ssm)
    assert torch.equal(conv[[1, 3]], kept[0]) and torch.equal(ssm[[1, 3]], kept[1])


def test_stochastic_rounding_is_unbiased_and_rounds_to_a_neighbour():
    torch.manual_seed(0)
    x = torch.randn(64) * 10.0 ** torch.randint(-6, 6, (64,))
    drawn = round_stochastically(x.expand(4096, 64), torch.Generator().manual_seed(1)).double()
    spacing = 2.0 ** (torch.frexp(x).exponent.double() - 8)
    assert ((drawn - x).abs() < spacing).all()
    # 4,096 draws of a variable of standard deviation at most spacing / 2: five of its mean's deviations.
    assert ((drawn.mean(0) - x).abs() <= 5 * spacing / 2 / 64).all()
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf")])
    assert torch.equal(round_stochastically(exact).float(), exact)


def call(b=2, pool=3, **changes):
    h, g, p = 4, 2, 8
    options = {
        "conv_weight": torch.randn((h + 2 * g) * p, 2), "conv_bias": None, "dt_bias": torch.zeros(h),
        "A_log": torch.zeros(h), "norm_weight": torch.ones(p), "conv_state": torch.zeros(pool, 1, (h + 2 * g) * p),
        "ssm_state": torch.zeros(pool, h, p, p), **changes,
    }  # fmt: skip
    return mixer_step(torch.randn(b, (h + 2 * g) * p), torch.randn(b, h * p), torch.randn(b, h), **options)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"conv_weight": torch.zeros(64, 5)}, "conv_state"),
        ({"conv_bias": torch.zeros(3)}, "conv_bias"),
        ({"ssm_state": torch.zeros(3, 4, 8, 4)}, "ssm_state"),
        ({"slots": torch.tensor([0])}, "slots"),
        ({"A_log": torch.zeros(5)}, "vkq"),
        ({"pool": 1}, "2 rows and no slots"),
        ({"positions": torch.zeros(2)}, "positions and frequencies"),
        ({"activation": "relu"}, "activation"),
        ({"beta_raw": torch.zeros(2, 3)}, "beta_raw"),
        ({"rotation": (torch.ones(2, 4), torch.ones(2, 3))}, r"rotation\[1\]"),
    ],
)
def test_refuses_what_does_not_fit(changes, named):
    with pytest.raises(ValueError, match=named):
        call(**changes)


def test_a_negative_slot_gives_zeros_and_changes_nothing():
    conv, ssm = torch.randn(3, 1, 64), torch.randn(3, 4, 8, 8)
    before = conv.clone(), ssm.clone()
    out = call(conv_state=conv, ssm_state=ssm, slots=torch.tensor([-1, 1]))
    assert not out[0].any() and out[1].any()
    assert torch.equal(conv[[0, 2]], before[0][[0, 2]]) and torch.equal(ssm[[0, 2]], before[1][[0, 2]])
    assert not torch.equal(conv[1], before[0][1])
