"""The decoding step's kernel against the twin: values, states in place, parts of the pool, stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.ops.mixer_step import mixer_step as twin

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 6e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(*args, **options):
    from mmmamba.ops.mixer_step.kernels import mixer_step

    return mixer_step(*args, **options)


def draw(b=3, h=4, g=2, p=16, k=2, pool=5, dtype=torch.float32, state=None, device=DEVICE, seed=0, **options):
    """The arguments of a step: (vkq, gate, dt_raw) and the named ones."""
    torch.manual_seed(seed)
    c = (h + 2 * g) * p

    def make(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slots = torch.randperm(pool)[:b].to(device, torch.int32)
    named = {
        "conv_weight": make(c, k), "conv_bias": make(c), "dt_bias": make(h, dtype=wide), "A_log": make(h, dtype=wide),
        "norm_weight": make(p), "conv_state": make(pool, k - 1, c),
        "ssm_state": make(pool, h, p, p, dtype=state or wide), "slots": slots, **options,
    }  # fmt: skip
    return (make(b, c), make(b, h * p), make(b, h, dtype=wide)), named


def wide(value):
    if isinstance(value, tuple):
        return tuple(map(wide, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run(function, inputs, named, widened=False):
    """The output and both states after a step that starts from copies of the states."""
    named = {**named, "conv_state": named["conv_state"].clone(), "ssm_state": named["ssm_state"].clone()}
    if widened:
        inputs, named = wide(inputs), {name: wide(value) for name, value in named.items()}
    return function(*inputs, **named), named["conv_state"], named["ssm_state"]


def compare(inputs, named, tolerance):
    for ours, truth in zip(run(kernel, inputs, named), run(twin, inputs, named, widened=True), strict=True):
        assert ours.shape == truth.shape
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("h", "g", "p"), [(2, 1, 32), (2, 2, 64), (3, 1, 16), (4, 2, 24)])
def test_equals_the_twin_in_float64(h, g, p, dtype, device):
    compare(*draw(h=h, g=g, p=p, dtype=dtype, device=device), TOLERANCE[dtype])


@settings(max_examples=12, deadline=None)
@given(
    k=st.integers(2, 4),
    activation=st.sampled_from(["silu", "none"]),
    qk_norm=st.booleans(),
    turned=st.sampled_from(["no", "given", "by position"]),
    biased=st.booleans(),
    slots=st.sampled_from([torch.int32, torch.int64, None]),
    shift=st.sampled_from([-25.0, 0.0, 30.0]),
)
def test_every_option(k, activation, qk_norm, turned, biased, slots, shift):
    (vkq, gate, dt_raw), named = draw(p=8, k=k, dtype=torch.float64, activation=activation, qk_norm=qk_norm)
    angles = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    if turned == "given":
        named["rotation"] = (angles.cos(), angles.sin())
    if turned == "by position":
        named |= {"positions": torch.tensor([0, 5, 900], device=DEVICE), "frequencies": angles[0]}
    if not biased:
        named["conv_bias"] = None
    named["slots"] = None if slots is None else named["slots"].to(slots)
    compare((vkq, gate, dt_raw + shift), named, 1e-11)


def test_rotates_by_the_angles_of_a_long_context(device):
    """As exactly a million tokens after the beginning as at it: against float64 of the same float32 angles."""
    inputs, named = draw(device=device)
    positions = torch.tensor([1_048_575, 9_999_991, 3], device=device)
    frequencies = (1 / 1e4 ** (torch.arange(8) / 8)).to(device)
    angles = (positions.float()[:, None] * frequencies).double()
    ours, *_ = run(kernel, inputs, {**named, "positions": positions, "frequencies": frequencies})
    truth, *_ = run(twin, inputs, {**named, "rotation": (angles.cos(), angles.sin())}, widened=True)
    assert (ours - truth).norm() <= TOLERANCE[torch.float32] * truth.norm()


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize(("h", "g", "p", "k"), [(4, 2, 32, 2), (3, 1, 24, 4), (2, 2, 16, 3)])
def test_heads_in_parts_and_the_norm_left_to_the_next_map(h, g, p, k, parts, device):
    inputs, named = draw(h=h, g=g, p=p, k=k, device=device)
    named["slots"] = torch.tensor([3, -1, 0], device=device)
    normed, *states = run(kernel, inputs, named)
    squares = torch.full((3, h, parts), torch.nan, device=device)
    heads, *others = run(kernel, inputs, {**named, "squares": squares})
    for one, other in zip(states, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    expected = torch.empty_like(squares[..., :1])
    truth, *_ = run(twin, inputs, {**named, "squares": expected})
    torch.testing.assert_close(heads, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(squares.sum(-1), expected[..., 0], rtol=1e-5, atol=0)
    assert run(kernel, [t.half() for t in inputs], {**named, "squares": squares.clone()})[0].dtype == torch.float32
    inverse = (squares.sum(-1, keepdim=True) / p + 1e-5).rsqrt()
    torch.testing.assert_close((heads.unflatten(1, (h, p)) * inverse).flatten(1), normed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [0, 4])
@pytest.mark.parametrize(("h", "g", "p"), [(2, 1, 32), (4, 2, 24)])
def test_the_gated_delta_rule(h, g, p, parts, device):
    inputs, named = draw(h=h, g=g, p=p, device=device)
    named |= {"beta_raw": torch.randn(3, h + 2, device=device)[:, 1 : h + 1], "qk_norm": True}
    named["slots"] = torch.tensor([3, -1, 0], device=device)
    if parts:
        squares = torch.empty(3, h, parts, device=device)
        run(kernel, inputs, {**named, "squares": squares})
        truth = torch.empty(3, h, 1, dtype=torch.float64, device=device)
        run(twin, inputs, {**named, "squares": truth}, widened=True)
        torch.testing.assert_close(squares.sum(-1), truth[..., 0].float(), rtol=1e-5, atol=1e-6)
    compare(inputs, named, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("programs", "half", "size"), [(1, False, (1, 64)), (1000, False, (2, 32)), (1000, True, (2, 16))]
)
def test_blocks_of_any_size_and_slices_of_a_wider_projection(programs, half, size, monkeypatch, device):
    from mmmamba.ops.mixer_step import kernels

    chosen = kernels._tile(programs, 2, 64, half, 1)
    assert (chosen["HEADS"], chosen["D"]) == size
    monkeypatch.setattr(kernels, "_tile", lambda *_: chosen)
    (vkq, gate, dt_raw), named = draw(b=2, h=2, g=1, p=64, device=device)
    whole = torch.cat([gate, vkq, dt_raw], -1)
    sliced = (whole[:, 128:-2], whole[:, :128], whole[:, -2:])
    compare(sliced, named, TOLERANCE[torch.float32])


@pytest.mark.parametrize("parts", [0, 4])
def test_step_after_step_head_by_head(parts, device):
    """The programs of a group count themselves; the count is back at zero after every step."""
    (vkq, gate, dt_raw), named = draw(b=2, h=2, g=1, p=64, device=device)
    truth = {name: wide(value) for name, value in named.items()}
    truth |= {name: truth[name].clone() for name in ("conv_state", "ssm_state")}
    for scale in (1.0, 0.5, -2.0):
        squares = torch.empty(2, 2, parts, device=device) if parts else None
        ours = kernel(vkq * scale, gate, dt_raw, **named, squares=squares)
        expected = twin((vkq * scale).double(), gate.double(), dt_raw.double(), **truth, squares=wide(squares))
        assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert (named["ssm_state"] - truth["ssm_state"]).norm() <= 1e-5 * truth["ssm_state"].norm()


def test_the_count_stays_where_graphs_remember_it(device):
    """A larger batch of the same pool must not move what a graph of a smaller one has captured."""
    from mmmamba.ops.mixer_step.kernels import _COUNTERS

    inputs, named = draw(b=3, device=device)
    places = []
    for rows in (1, 3, 2):
        kernel(*(t[:rows] for t in inputs), **{**named, "slots": named["slots"][:rows]})
        places.append(_COUNTERS[named["ssm_state"]].data_ptr())
    assert len(set(places)) == 1


def test_changes_its_slots_alone_and_gives_zeros_for_padding(device):
    inputs, named = draw(device=device)
    named["slots"] = torch.tensor([3, -1, 0], device=device)
    out, conv, ssm = run(kernel, inputs, named)
    compare(inputs, named, TOLERANCE[torch.float32])
    assert not out[1].any()
    for new, old in ((conv, named["conv_state"]), (ssm, named["ssm_state"])):
        assert torch.equal(new[[1, 2, 4]], old[[1, 2, 4]])
        assert not torch.equal(new[0], old[0]) and not torch.equal(new[3], old[3])


def test_a_batch_equals_its_rows_one_at_a_time_bit_for_bit(device):
    inputs, named = draw(state=torch.bfloat16, device=device)
    named["seed"] = torch.tensor([11], device=device)
    together = run(kernel, inputs, named)
    conv, ssm, rows = named["conv_state"].clone(), named["ssm_state"].clone(), []
    for row, slot in enumerate(named["slots"].split(1)):
        part = {**named, "conv_state": conv, "ssm_state": ssm, "slots": slot}
        rows.append(kernel(*(t[row : row + 1] for t in inputs), **part))
    for ours, truth in zip((torch.cat(rows), conv, ssm), together, strict=True):
        assert torch.equal(ours, truth)


def test_stochastic_rounding_is_unbiased_in_the_mean(device):
    inputs, named = draw(b=1, h=2, g=1, p=8, pool=1, state=torch.bfloat16, device=device)
    named["slots"] = None
    _, _, truth = run(twin, inputs, {**named, "ssm_state": named["ssm_state"].float()})
    nearest = run(kernel, inputs, named)[2]
    spacing = 2.0 ** (torch.frexp(truth).exponent.double() - 8)
    # The interpreter cuts the lower bits off.
    assert ((nearest.double() - truth).abs() <= spacing * (0.501 if device.type == "cuda" else 1.001)).all()
    draws = 100
    seeds = [torch.tensor([i << 20], device=device) for i in range(draws)]
    drawn = torch.stack([run(kernel, inputs, {**named, "seed": seed})[2] for seed in seeds]).double()
    assert torch.equal(drawn[7], run(kernel, inputs, {**named, "seed": seeds[7]})[2].double())
    error = (drawn - truth) / spacing
    assert (error.abs() < 1.001).all()
    # A draw deviates by 1/2 at most (root mean square): no element's mean lies six such away, nor that of all five.
    assert (error.mean(0).abs() < 6 * 0.5 / draws**0.5).all()
    assert error.mean().abs() < 5 * 0.5 / (draws * 128) ** 0.5
    noise = error - error.mean(0)  # neighbours draw their own noise
    assert (noise[..., 1:] * noise[..., :-1]).mean().abs() < 0.02


def test_is_a_sound_custom_op(device):
    from mmmamba.ops.mixer_step.kernels import _step

    (vkq, gate, dt_raw), named = draw(b=1, p=8, pool=1, device=device)
    order = ["conv_weight", "conv_bias", "dt_bias", "A_log", "norm_weight", "conv_state", "ssm_state"]
    rest = [named[name] for name in order]
    nothing = [None] * 7
    out, squares = torch.empty(1, gate.shape[1], device=device), torch.empty(1, 4, 2, device=device)
    arrived = torch.zeros(2, dtype=torch.int32, device=device)
    checks = ("test_schema", "test_faketensor")
    arguments = (vkq, gate, dt_raw, *rest, *nothing, out, squares, arrived, 1e-5, True, False, False)
    torch.library.opcheck(_step.traced, arguments, test_utils=checks)


def test_refuses_what_does_not_fit(device):
    inputs, named = draw(device=device)
    with pytest.raises(ValueError, match="slots"):
        kernel(*inputs, **{**named, "slots": named["slots"][:2]})
    with pytest.raises(ValueError, match="contiguous"):
        kernel(*inputs, **{**named, "ssm_state": named["ssm_state"].transpose(2, 3)})
    for squares, message in (
        (torch.empty(3, 2, 4), "squares has shape"),
        (torch.empty(3, 4, 3), "power of two"),
        (torch.empty(3, 4, 4, dtype=torch.bfloat16), "float32 at least"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(*inputs, **named, squares=squares.to(device))
