"""The decoding attention's kernels against the twin in float64."""

from __future__ import annotations

import pytest
import torch

from mmmamba.ops.attend import attend_step_torch

kernels = pytest.importorskip("mmmamba.ops.triton.attend", exc_type=ImportError)
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(lengths, slots, h=4, g=2, p=32, capacity=200, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    pool = max(slots) + 2
    q = torch.randn(len(slots), h, p, generator=generator)
    k, v = (torch.randn(pool, capacity, g, p, generator=generator) for _ in range(2))
    tensors = [t.to(device, dtype) for t in (q, k, v)]
    return *tensors, torch.tensor(slots, device=device), torch.tensor(lengths, device=device)


def check(args, **options):
    q, k, v, slots, lengths = args
    behind = (
        torch.arange(k.shape[1], device=k.device)
        >= torch.zeros(len(k), device=k.device).index_copy(0, slots.clamp(min=0), lengths.float())[:, None]
    )
    k, v = (t.masked_fill(behind[..., None, None], float("nan")) for t in (k, v))  # nothing there may be read
    ours = kernels.attend_step(q, k, v, slots, lengths, **options)
    truth = attend_step_torch(*(t.double().nan_to_num() for t in (q, k, v)), slots, lengths)
    assert ours.dtype == q.dtype
    assert (ours.double() - truth).norm() <= LIMITS[q.dtype] * truth.norm()
    return ours


@pytest.mark.parametrize("splits", [1, 3, 8, None])
def test_any_length_in_any_number_of_splits(splits, device):
    check(draw([1, 64, 65, 200, 7], [3, 0, 4, 1, 2], device=device), splits=splits)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("h", "g", "p"), [(2, 2, 32), (3, 1, 64), (4, 2, 128)])
def test_each_dtype_and_shape(dtype, h, g, p, device):
    check(draw([30, 101], [1, 0], h, g, p, dtype=dtype, device=device))


def test_idle_rows_give_zeros_and_longest_is_but_a_bound(device):
    args = draw([5, 9, 3], [2, 0, 1], device=device)
    args[3][1] = -1
    out = check(args)
    assert not out[1].any()
    bounded = attend_step_torch(*args, longest=9)
    torch.testing.assert_close(bounded, attend_step_torch(*args))


def test_is_a_sound_custom_op(device):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._attend, (*draw([4], [0], device=device), 2), test_utils=checks)


def test_refuses_what_does_not_fit(device):
    q, k, v, slots, lengths = draw([4], [0], device=device)
    with pytest.raises(ValueError, match="lengths"):
        kernels.attend_step(q, k, v, slots, lengths.repeat(2))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.attend_step(q, k.transpose(0, 1).contiguous().transpose(0, 1), v, slots, lengths)
