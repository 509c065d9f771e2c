"""The fused KL against float64 autograd, and against PyTorch's own operators at the same precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.ops import chunked_kl as twin

kl = pytest.importorskip("mmmamba.ops.kl.kernels", reason="needs Triton", exc_type=ImportError)
# What lies after the vocabulary is never written: the interpreter's numpy minds such numbers, no result has them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
NAMES = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


def problem(tokens: int, size: int, width: int, *, scale: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    """Student and teacher that resemble each other, float64; logits of about ``scale``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = draw(tokens, width), draw(size, width) * (scale / width**0.5)
    return [hidden + 0.3 * draw(tokens, width), head + 0.1 * scale / width**0.5 * draw(size, width), hidden, head]


def run(function, tensors, *, weight=None, train=("student_hidden", "student_head"), loss_scale=1.0, **options):
    """Loss and the gradients to the trained tensors."""
    leaves = [t.detach().clone().requires_grad_(name in train) for t, name in zip(tensors, NAMES, strict=True)]
    loss = function(*leaves, weight=weight, **options)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss.detach(), *(torch.autograd.grad(loss * loss_scale, trained) if trained else ())]


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    difference = (ours.double().cpu() - truth.double().cpu()).norm()
    return float(difference / truth.double().norm().cpu().clamp_min(1e-300))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("size", [5, 2048, 4099])
def test_values_and_gradients_equal_float64(device, temperature, size):
    tensors = problem(9, size, 16)
    weight = torch.rand(9, dtype=torch.float64) * (torch.arange(9) % 3 > 0)
    truth = run(twin, tensors, weight=weight, temperature=temperature, loss_scale=3.0)
    narrow = [t.float().to(device) for t in tensors]
    ours = run(kl.chunked_kl, narrow, weight=weight.to(device), temperature=temperature, chunk=4, loss_scale=3.0)
    assert ours[0].dtype == torch.float32
    for value, expected in zip(ours, truth, strict=True):
        assert error(value, expected) < 1e-5
    assert float(ours[1][::3].abs().max()) == 0  # weight 0


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 6),
    size=st.integers(1, 3000),
    width=st.integers(1, 12),
    chunk=st.integers(1, 7),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens, size, width, chunk, scale, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = problem(tokens, size, width, scale=scale, seed=seed)
    narrow = [t.float().to(device) for t in tensors]
    truth = run(twin, [t.double() for t in narrow])
    plain = run(twin, narrow)
    ours = run(kl.chunked_kl, narrow, chunk=chunk)
    for value, peer, expected in zip(ours, plain, truth, strict=True):
        # Rounding of the logits is the floor: 6e-8 of their size, which a gradient multiplies with a head of that size.
        floor = 1e-6 + 1e-7 * scale**2
        assert (value.double() - expected).norm() <= 3 * (peer.double() - expected).norm() + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_exact_than_plain_operators_at_the_same_precision(device, dtype):
    tensors = [t.to(dtype).to(device) for t in problem(24, 700, 32, scale=4.0)]
    truth = run(twin, [t.double() for t in tensors])
    plain, ours = run(twin, tensors, chunk=8), run(kl.chunked_kl, tensors, chunk=8)
    for value, peer, expected in zip(ours, plain, truth, strict=True):
        assert value.dtype == peer.dtype
        assert error(value, expected) <= 1.2 * error(peer, expected) + 1e-6


@pytest.mark.parametrize("train", [(), ("student_hidden",), ("student_head",)])
def test_only_what_is_trained_gets_a_gradient(device, train):
    tensors = [t.float().to(device) for t in problem(5, 37, 8)]
    both = run(kl.chunked_kl, tensors)
    some = run(kl.chunked_kl, tensors, train=train)
    expected = [both[0], *(both[1 + NAMES.index(name)] for name in train)]
    for value, whole in zip(some, expected, strict=True):
        assert torch.equal(value, whole)
    with torch.no_grad():
        assert not kl.chunked_kl(*(t.requires_grad_() for t in tensors)).requires_grad


def test_small_divergences_keep_their_digits(device):
    _, _, hidden, head = problem(5, 3000, 16, scale=2.0)
    noise = torch.randn(head.shape, dtype=head.dtype, generator=torch.Generator().manual_seed(1))
    for distance in (1e-2, 1e-3):
        tensors = [t.float().to(device) for t in (hidden, head + distance * noise, hidden, head)]
        truth = run(twin, [t.double() for t in tensors])[0]
        plain, ours = run(twin, tensors)[0], run(kl.chunked_kl, tensors)[0]
        assert error(ours, truth) <= error(plain, truth) + 1e-6 / distance


@pytest.mark.parametrize("huge", [1e4, 1e15, 1e30])
def test_huge_logits_make_no_nan(device, huge):
    tensors = [t.float().to(device) for t in problem(4, 50, 8)]
    tensors[1], tensors[3] = tensors[1] * huge, tensors[3] * huge
    ours, plain = run(kl.chunked_kl, tensors), run(twin, tensors)
    for value, peer in zip(ours, plain, strict=True):
        assert torch.isfinite(peer).all() and torch.isfinite(value).all()
        assert error(value, peer) < 1e-4


def test_equal_models_diverge_by_nothing(device):
    hidden, head = (torch.randn(shape, device=device) * 5 for shape in ((3, 8), (300, 8)))
    loss, gradient, _ = run(kl.chunked_kl, [hidden, head, hidden, head])
    assert float(loss) == 0 and float(gradient.abs().max()) == 0


def test_another_width_of_the_teacher_and_autocast(device):
    student, head, teacher, other = (t.float().to(device) for t in problem(6, 90, 8))
    teacher, other = torch.cat([teacher, teacher], 1), torch.cat([other, other], 1) / 2
    with torch.autocast(device.type, torch.bfloat16):
        ours = run(kl.chunked_kl, [student, head, teacher, other])
        plain = run(twin, [student, head, teacher, other])
    for value, peer in zip(ours, plain, strict=True):
        assert value.dtype == peer.dtype == torch.float32
        assert error(value, peer) < 2e-2


def test_two_runs_give_the_same_bits(device):
    tensors = [t.bfloat16().to(device) for t in problem(10, 333, 16)]
    for first, second in zip(*(run(kl.chunked_kl, tensors, chunk=4) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_nothing_to_score_is_zero_and_still_differentiable(device):
    hidden, head = torch.randn(0, 3, device=device, requires_grad=True), torch.randn(5, 3, device=device)
    loss = kl.chunked_kl(hidden, head, hidden.detach(), head)
    loss.backward()
    assert float(loss.detach()) == 0 and hidden.grad.shape == (0, 3)


def test_wrong_shapes_are_named(device):
    student, head, teacher, other = (t.float().to(device) for t in problem(4, 9, 6))
    with pytest.raises(ValueError, match="teacher_hidden has shape"):
        kl.chunked_kl(student, head, teacher[:3], other)
    with pytest.raises(ValueError, match="teacher_head has shape"):
        kl.chunked_kl(student, head, teacher, other[:5])
    with pytest.raises(ValueError, match="weight has shape"):
        kl.chunked_kl(student, head, teacher, other, weight=torch.ones(3, device=device))


def test_a_chunk_of_logits_and_the_heads_gradient_fit_in_a_gigabyte():
    head = torch.empty(92_553, 2048, dtype=torch.bfloat16, device="meta")
    for train_head, least in ((False, 2048), (True, 1024)):
        chunk = kl._chunk(8192, head, train_head)
        assert chunk >= least and chunk % kl.ROWS == 0
        assert 2 * chunk * kl._stride(92_553) * 2 + train_head * head.nbytes < 1e9
    assert kl._chunk(5, head, False) == kl.ROWS


def test_the_operator_is_registered_soundly(device):
    student, head, teacher, other = (t.float().to(device) for t in problem(5, 40, 8))
    student.requires_grad_()
    weight = torch.ones(5, device=device)
    args = (student, head.requires_grad_(), teacher, other, weight, 1.0, 2, True, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kl._kl.traced, args, test_utils=checks)


def test_traced_without_a_break(device):
    tensors = [t.float().to(device) for t in problem(7, 45, 8)]
    traced = torch.compile(kl.chunked_kl, fullgraph=True, backend="aot_eager")
    for value, expected in zip(run(traced, tensors), run(kl.chunked_kl, tensors), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.gpu
def test_compiled_and_captured_in_a_graph(device):
    tensors = [t.bfloat16().to(device) for t in problem(300, 5001, 64)]
    truth = run(kl.chunked_kl, tensors)
    compiled = run(torch.compile(kl.chunked_kl, fullgraph=True), tensors)
    for value, expected in zip(compiled, truth, strict=True):
        assert torch.equal(value, expected)

    leaves = [t.clone().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kl.chunked_kl(*leaves)
        gradients = torch.autograd.grad(loss, leaves[:2])
    for _ in range(2):
        graph.replay()
        for value, expected in zip((loss, *gradients), truth, strict=True):
            assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("train_head", [False, True])
def test_less_than_a_gigabyte_at_full_size(device, train_head):
    shapes = ((8192, 2048), (92_553, 2048)) * 2
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02 for shape in shapes]
    tensors[0].requires_grad_(), tensors[1].requires_grad_(train_head)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kl.chunked_kl(*tensors).backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9
