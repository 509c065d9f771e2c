"""KL in chunks against KL of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmmamba.ops import chunked_kl, gated_norm, rms_norm


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_equal_the_whole_with_gradients(temperature, masked):
    torch.manual_seed(0)
    student, teacher = (torch.randn(50, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    head, other = (torch.randn(30, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = (torch.rand(50, dtype=torch.float64) * (torch.arange(50) % 3 > 0)) if masked else None
    kl = (
        F.kl_div(
            F.log_softmax(student @ head.T / temperature, -1),
            F.log_softmax(teacher @ other.T / temperature, -1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        * temperature**2
    )
    truth = (kl * weight).sum() if masked else kl.sum()
    ours = chunked_kl(student, head, teacher, other, weight=weight, temperature=temperature, chunk=7)
    torch.testing.assert_close(ours, truth)
    expected = torch.autograd.grad(truth, [student, head])
    for a, b in zip(torch.autograd.grad(ours, [student, head]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_scored_is_zero_and_still_differentiable():
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss = chunked_kl(hidden, head, hidden.detach(), head, weight=torch.zeros(4))
    loss.backward()
    assert float(loss.detach()) == 0 and float(hidden.grad.abs().sum()) == 0


def test_norm_before_gate():
    x, gate, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4)
    truth = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight * gate * gate.sigmoid()
    torch.testing.assert_close(gated_norm(x, gate, weight, 1e-5), truth)
    assert rms_norm(x.bfloat16(), weight, 1e-5).dtype == torch.bfloat16
