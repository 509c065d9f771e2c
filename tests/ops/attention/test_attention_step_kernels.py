"""The decoding attention's kernels against the twin in float64."""

from __future__ import annotations

import pytest
import torch

from mmmamba.ops.attention import attention_step_torch

kernels = pytest.importorskip("mmmamba.ops.attention.kernels", exc_type=ImportError)
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(positions, slots, h=4, g=2, p=32, capacity=200, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    pool = max(slots) + 2
    qkv = torch.randn(len(slots), (h + 2 * g) * p, generator=generator)
    k, v = (torch.randn(pool, capacity, g, p, generator=generator) for _ in range(2))
    tensors = [t.to(device, dtype) for t in (qkv, k, v)]
    frequencies = (1e4 ** -(torch.arange(0, p, 2) / p)).to(device)
    return *tensors, torch.tensor(slots, device=device), torch.tensor(positions, device=device), frequencies


def check(args, **options):
    qkv, k, v, slots, positions, frequencies = args
    held = torch.zeros(len(k), dtype=torch.long, device=k.device).index_put((slots[slots >= 0],), positions[slots >= 0])
    unread = torch.arange(k.shape[1], device=k.device) >= held[:, None]
    k, v = (t.masked_fill(unread[..., None, None], float("nan")) for t in (k, v))  # nothing there may be read
    wide = [t.double().nan_to_num() for t in (qkv, k, v)]
    truth = attention_step_torch(*wide, slots, positions, frequencies.double())
    ours = kernels.attention_step(qkv, k, v, slots, positions, frequencies, **options)
    assert ours.dtype == qkv.dtype
    assert (ours.double() - truth).norm() <= LIMITS[qkv.dtype] * truth.norm()
    for cache, expected in zip((k, v), wide[1:], strict=True):  # the token's own key and value, and nothing else
        added = (torch.arange(k.shape[1], device=k.device) == held[:, None]) & (held > 0)[:, None]
        assert (cache.double()[added] - expected[added]).abs().max() <= 4 * LIMITS[qkv.dtype]
        assert cache[unread & ~added].isnan().all()
        assert torch.equal(cache[~unread].double(), expected[~unread])
    return ours


@pytest.mark.parametrize("splits", [1, 3, 8, None])
def test_any_length_in_any_number_of_splits(splits, device):
    check(draw([1, 63, 64, 65, 199, 7], [3, 0, 4, 1, 2, 5], device=device), splits=splits)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("h", "g", "p"), [(2, 2, 32), (3, 1, 64), (4, 2, 128)])
def test_each_dtype_and_shape(dtype, h, g, p, device):
    check(draw([30, 101], [1, 0], h, g, p, dtype=dtype, device=device))


def test_the_first_token_sees_itself(device):
    args = draw([0, 0], [1, 0], device=device)
    ours = kernels.attention_step(*args)
    qkv, _, v, slots, *_ = args
    values = qkv.unflatten(1, (-1, 32))[:, 6:]
    torch.testing.assert_close(ours.unflatten(1, (2, 2, 32)), values[:, :, None].expand(-1, -1, 2, -1))
    torch.testing.assert_close(v[slots, 0], values)


def test_idle_rows_give_zeros_and_longest_is_but_a_bound(device):
    args = draw([5, 9, 3], [2, 0, 1], device=device)
    args[3][1] = -1
    out = check(args)
    assert not out[1].any()
    bounded = attention_step_torch(*(t.clone() for t in args), longest=10)
    torch.testing.assert_close(bounded, attention_step_torch(*args))


def test_far_positions_turn_as_far_as_the_twin_does(device):
    args = list(draw([3, 7], [1, 0], device=device))
    qkv, k, v, slots, _, frequencies = args
    far = torch.tensor([150, 160], device=device)
    truth = attention_step_torch(*(t.clone() for t in (qkv, k, v)), slots, far, frequencies)
    torch.testing.assert_close(kernels.attention_step(qkv, k, v, slots, far, frequencies), truth, rtol=1e-4, atol=1e-5)


def test_is_a_sound_custom_op(device):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._attention_step.traced, (*draw([4], [0], device=device), 2, False), test_utils=checks)


def test_refuses_what_does_not_fit(device):
    qkv, k, v, slots, positions, frequencies = draw([4], [0], device=device)
    with pytest.raises(ValueError, match="positions"):
        kernels.attention_step(qkv, k, v, slots, positions.repeat(2), frequencies)
    with pytest.raises(ValueError, match="qkv"):
        kernels.attention_step(qkv[:, 1:], k, v, slots, positions, frequencies)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.attention_step(qkv, k.transpose(0, 1).contiguous().transpose(0, 1), v, slots, positions, frequencies)
