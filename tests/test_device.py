"""What the device module does without a GPU: tensors that travel together arrive as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmmamba import device
from mmmamba.device import pick_device, to_host
from mmmamba.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@given(shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from(DTYPES)), max_size=8))
def test_tensors_that_travel_together_arrive_as_they_were(shapes):
    torch.manual_seed(len(shapes))
    tensors = [torch.randint(0, 2, (rows, columns)).to(dtype) for rows, columns, dtype in shapes]
    tensors = [t.t() if i % 2 else t for i, t in enumerate(tensors)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "TOGETHER", 40)
        found = to_host(tensors)
    for there, here in zip(tensors, found, strict=True):
        assert torch.equal(there, here) and there.dtype == here.dtype


@pytest.mark.parametrize(
    "name", ["", "cpu:", "cuda:", "cuda:-1", "cuda:x", "cuda:99999999999999999999", "cuda:²", "meta"]
)
def test_a_device_that_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="must be auto, cpu, cuda, cuda:N or mps"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda:9999", *([] if torch.backends.mps.is_available() else ["mps"])])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="PyTorch sees"):
        pick_device(name)
