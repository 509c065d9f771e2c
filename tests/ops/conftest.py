"""Where the kernels are tested: on a GPU where there is one (marker ``gpu``), else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)] if GPU else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors the kernels are given."""
    pytest.importorskip("triton")
    return torch.device(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` by hand (graphs, compilation) needs what the interpreter can't do."""
    if item.get_closest_marker("gpu") and not GPU:
        pytest.skip("needs a GPU")
