"""The KL from a teacher's most likely tokens: what it is of, what it misses, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.ops import chunked_kl
from mmmamba.ops.kl.top_k import LEAST, top_k, top_k_kl


def tensors(tokens: int = 20, width: int = 8, words: int = 30) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    heads = [torch.randn(words, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    return hidden[0].requires_grad_(), heads[0].requires_grad_(), hidden[1], heads[1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 29])
def test_equals_the_kl_of_its_outcomes_with_gradients(k, temperature):
    student, head, teacher, other = tensors()
    weight = torch.rand(20, dtype=torch.float64) * (torch.arange(20) % 3 > 0)
    ids, log_probs = top_k(teacher, other, k, temperature)

    def outcomes(hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        p = F.softmax(hidden @ matrix.T / temperature, -1)
        best = p.gather(-1, ids)
        return torch.cat([best, 1 - best.sum(-1, keepdim=True)], -1).log()

    torch.testing.assert_close(log_probs, outcomes(teacher, other), rtol=1e-6, atol=1e-6)
    parts = F.kl_div(outcomes(student, head), log_probs, log_target=True, reduction="none").sum(-1)
    truth = (parts * weight).sum() * temperature**2
    ours = top_k_kl(student, head, ids, log_probs, weight=weight, temperature=temperature, chunk=7)
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-8)
    expected = torch.autograd.grad(truth, [student, head])
    for a, b in zip(torch.autograd.grad(ours, [student, head]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_all_tokens_but_one_are_the_whole_distribution():
    student, head, teacher, other = tensors()
    ids, log_probs = top_k(teacher, other, 29)
    torch.testing.assert_close(top_k_kl(student, head, ids, log_probs), chunked_kl(student, head, teacher, other))


@given(k=st.integers(1, 28))
def test_fewer_tokens_never_give_more(k):
    student, head, teacher, other = tensors()
    values = [top_k_kl(student, head, *top_k(teacher, other, n)).detach() for n in (k, k + 1)]
    whole = chunked_kl(student, head, teacher, other).detach()
    assert 0 <= values[0] <= values[1] * (1 + 1e-9) <= whole * (1 + 1e-8)


def test_a_certain_teacher_is_finite_also_in_float16():
    student, head, teacher, other = tensors()
    ids, log_probs = top_k(teacher * 1e6, other, 3)
    assert float(log_probs.min()) >= LEAST
    rounded = log_probs.to(torch.float16)
    loss = top_k_kl(student, head, ids, rounded)
    gradient = torch.autograd.grad(loss, student)[0]
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())


def test_no_tokens_are_no_loss():
    student, head, teacher, other = (t[:0] if i % 2 == 0 else t for i, t in enumerate(tensors()))
    ids, log_probs = top_k(teacher, other, 3)
    assert ids.shape == (0, 3) and log_probs.shape == (0, 4)
    assert float(top_k_kl(student, head, ids, log_probs).detach()) == 0
