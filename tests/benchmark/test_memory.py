"""Running out of memory is told from every other error, and leaves nothing behind."""

from __future__ import annotations

import weakref

import pytest
import torch

from mmmamba.benchmark.memory import attempt, is_full, peak, reset_peak

CPU = torch.device("cpu")


def failing(first: Exception, then: Exception | None = None):
    def call():
        try:
            raise first
        except Exception:
            if then is None:
                raise
            raise then  # noqa: B904  (as a broken capture does, without naming its cause)

    return call


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_full(error):
    assert is_full(error)
    assert attempt(failing(error), CPU) is None
    assert attempt(failing(error, RuntimeError("operation failed due to a previous error during capture")), CPU) is None


def test_what_is_something_else_is_raised():
    with pytest.raises(RuntimeError, match="shape"):
        attempt(failing(RuntimeError("a wrong shape")), CPU)


def test_what_a_failure_held_is_let_go():
    held = []

    def call():
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    assert attempt(call, CPU) is None
    assert held[0]() is None


def test_what_a_success_leaves_in_a_circle_is_let_go():
    class Pool:
        def __init__(self) -> None:
            self.tensor, self.self = torch.zeros(8), self

    held = []

    def call():
        pool = Pool()
        held.append(weakref.ref(pool.tensor))
        return True

    assert attempt(call, CPU)
    assert held[0]() is None


def test_what_fits_is_returned_and_a_cpu_counts_no_peak():
    reset_peak(CPU)
    assert attempt(lambda: 5, CPU) == 5
    assert peak(CPU) is None
