"""Drawing tokens: what greedy, temperature, top-k, top-p and the penalty mean, and on what a draw depends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.errors import UserError
from mmmamba.inference.philox import uniforms
from mmmamba.inference.sampling import Sampler, Sampling, draw


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def frequencies(logits: torch.Tensor, sampling: Sampling, draws: int = 2000) -> torch.Tensor:
    """Share of each token when u runs evenly through [0, 1)."""
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    return torch.bincount(draw(logits.expand(draws, -1), uniforms, sampling), minlength=logits.shape[-1]) / draws


def test_temperature_one_draws_from_the_models_distribution():
    wanted = torch.tensor([0.1, 0.5, 0.15, 0.25])
    got = frequencies(logits_of(*wanted.tolist()), Sampling(temperature=1.0))
    assert torch.allclose(got, wanted, atol=2e-3)


def test_temperature_sharpens_and_flattens():
    got = frequencies(logits_of(0.2, 0.8), Sampling(temperature=0.5))
    assert got[1] == pytest.approx(0.64 / 0.68, abs=2e-3)


def test_top_k_keeps_the_k_most_likely():
    got = frequencies(logits_of(0.1, 0.5, 0.15, 0.25), Sampling(temperature=1.0, top_k=2))
    assert torch.allclose(got, torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=2e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    got = frequencies(logits, Sampling(temperature=1.0, top_p=0.6))
    assert torch.allclose(got, torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=2e-3)
    assert frequencies(logits, Sampling(temperature=1.0, top_p=1e-6))[1] == 1


def test_the_ends_of_the_unit_interval_pick_tokens_that_may_be_drawn():
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf, 0.5]]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, Sampling(temperature=1.0)).tolist() == [2, 4]
    assert draw(logits, uniforms, Sampling(temperature=1.0, top_k=2)).tolist() == [2, 1]
    assert draw(logits, uniforms, Sampling(temperature=1.0, top_p=0.7)).tolist() == [2, 1]


def test_random_numbers_are_even_and_depend_on_all_of_seed_sequence_step():
    values = uniforms(0, range(30), np.arange(30)[:, None])
    assert values.shape == (30, 30) and len(set(values.flatten().tolist())) == 900
    assert abs(values.mean() - 0.5) < 0.03 and abs(values.var() - 1 / 12) < 0.01
    assert uniforms(1, 2, 3) == uniforms(1, 2, 3) != uniforms(2, 2, 3)


def numpys(seed: int, sequence: int, step: int) -> float:
    counter = np.array([0, step, sequence, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter)).random()


WORDS = st.integers(0, 2**64 - 1)


@given(seed=WORDS, sequences=st.lists(WORDS, min_size=1, max_size=4), step=st.integers(0, 2**64 - 3))
def test_random_numbers_are_numpys(seed, sequences, step):
    found = uniforms(seed, np.array(sequences, np.uint64), np.array([[step], [step + 2]], np.uint64))
    assert found.tolist() == [[numpys(seed, sequence, at) for sequence in sequences] for at in (step, step + 2)]


def test_the_numbers_of_a_run_stay_what_they_were():
    assert uniforms(7, [0, 5], [0, 3]).tolist() == [0.8720734548204873, 0.30343418712118975]


def test_a_draw_does_not_depend_on_the_batch():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.3, seed=7)
    together = Sampler(sampling, range(6)).pick(logits)[0].tolist()
    alone = [Sampler(sampling, [i]).pick(logits[i : i + 1])[0].item() for i in range(6)]
    assert together == alone


@pytest.mark.parametrize(
    ("sampling", "exact"),
    [
        (Sampling(temperature=1.0, seed=1), [0.1, 0.4, 0.05, 0.2, 0.25]),
        (Sampling(temperature=0.5, seed=2), [p**2 / 0.275 for p in (0.1, 0.4, 0.05, 0.2, 0.25)]),
        (Sampling(temperature=1.0, top_k=3, seed=3), [0, 0.4 / 0.85, 0, 0.2 / 0.85, 0.25 / 0.85]),
        (Sampling(temperature=1.0, top_p=0.9, seed=4), [0.1 / 0.95, 0.4 / 0.95, 0, 0.2 / 0.95, 0.25 / 0.95]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.6, seed=5), [0, 0.4 / 0.65, 0, 0, 0.25 / 0.65]),
    ],
)
def test_draws_follow_the_exact_distribution(sampling, exact):
    logits = logits_of(0.1, 0.4, 0.05, 0.2, 0.25).expand(500, -1)
    sampler, counts = Sampler(sampling, range(500)), torch.zeros(5)
    for _ in range(8):  # the draws of a sequence are as independent as those of different ones
        counts += torch.bincount(sampler.pick(logits)[0], minlength=5)
    expected = 4000 * torch.tensor(exact)
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    critical = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}  # a true distribution stays below 999 times in 1000
    assert statistic < critical[int(possible.sum()) - 1]


def test_rows_join_at_their_own_first_step_and_numbers_may_be_made_ahead():
    logits = torch.randn(5, 3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, repetition_penalty=2.0, seed=9)
    alone = []
    for row in range(3):
        sampler = Sampler(sampling, [row])
        begin = 2 if row == 2 else 0  # the third joins later
        alone.append([int(sampler.pick(logits[step, row : row + 1])[0]) for step in range(begin, 5)])
    for ahead in (0, 1, 2, 5):
        sampler = Sampler(sampling, [0, 1])
        if ahead:
            sampler.foresee(ahead, logits.device)
        picked = [sampler.pick(logits[step, :2])[0].tolist() for step in range(2)]
        sampler.join([2])
        if ahead:
            sampler.foresee(ahead, logits.device)
        picked += [sampler.pick(logits[step])[0].tolist() for step in range(2, 5)]
        assert [[step[row] for step in picked if row < len(step)] for row in range(3)] == alone


def test_rows_that_leave_take_their_draws_along():
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, repetition_penalty=2.0)
    whole, part = Sampler(sampling, range(4)), Sampler(sampling, range(4))
    whole.pick(logits[0]), part.pick(logits[0])
    part.select([1, 3])
    for step in (1, 2):
        assert whole.pick(logits[step])[0][[1, 3]].tolist() == part.pick(logits[step, [1, 3]])[0].tolist()


def test_greedy_logprobs_and_banned_tokens():
    logits = logits_of(0.2, 0.5, 0.3)
    tokens, logprobs = Sampler(Sampling(), [0]).pick(logits)
    assert tokens.tolist() == [1] and logprobs.item() == pytest.approx(math.log(0.5))
    tokens, logprobs = Sampler(Sampling(), [0], banned=[1]).pick(logits)
    assert tokens.tolist() == [2] and logprobs.item() == pytest.approx(math.log(0.3))


def test_repetition_penalty_counts_the_answer_of_its_own_row_only():
    logits = torch.tensor([[2.0, 1.9, -5.0], [2.0, 1.0, -5.0]])
    sampler = Sampler(Sampling(repetition_penalty=1.5), [0, 1])
    picked = [sampler.pick(logits)[0].tolist() for _ in range(3)]
    assert picked == [[0, 0], [1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        Sampling(**{field: value})
