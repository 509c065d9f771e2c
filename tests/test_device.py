"""The device module without a GPU: copies to the host, the choice of a device, and memory that runs out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmmamba import device
from mmmamba.device import pick_device, to_host, within_memory
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


def test_full_memory_is_named_and_other_errors_pass():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    assert within_memory(lambda: 3, torch.device("cpu"), "counting") == 3
    with pytest.raises(UserError, match=r"^out of memory on cpu while counting$") as error:
        within_memory(fail, torch.device("cpu"), "counting")
    assert error.value.__context__ is None, "the frames that filled the memory are let go"
    with pytest.raises(RuntimeError, match="another"):
        within_memory(lambda: (_ for _ in ()).throw(RuntimeError("another")), torch.device("cpu"), "counting")
