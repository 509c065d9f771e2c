"""Calls that are captured as CUDA graphs and replayed: the host launches all their kernels at once.

A graph has the shapes and addresses that it was captured with. So whatever changes from call to call lies in tensors
that stay, and the call reads it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from mmmamba.device import uncollected

T = TypeVar("T")
WARM_UP = 2  # calls before the first capture: they compile kernels and make what is made once


class CaptureStream:
    """Where what is captured runs: a stream of its own, and memory that the graphs share, for they take turns."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._keeper = self.capture(lambda: torch.zeros((), device=device))  # a pool that no graph has is gone

    def run(self, call: Callable[[], T]) -> T:
        """The call as it comes, but on that stream: what autograd remembers of streams must not outlive it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = call()
        current.wait_stream(self.stream)
        return results

    def capture(self, call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of the call, and the tensors that its replays write."""
        graph = torch.cuda.CUDAGraph()
        # The loader's threads go on pinning memory meanwhile, which only a capture of this thread alone lets them.
        options: dict[str, Any] = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with uncollected(), torch.cuda.graph(graph, **options):
            results = call()
        return graph, results


class Replayed(Generic[T]):
    """One call, made again and again: at first as it comes, then captured, and replayed from then on."""

    def __init__(self, stream: CaptureStream) -> None:
        self._stream, self._made = stream, 0
        self._captured: tuple[torch.cuda.CUDAGraph, T] | None = None

    def __call__(self, call: Callable[[], T]) -> T:
        """The call's results; those of a replay are overwritten by the next one."""
        # The call is given, not kept: a graph's memory goes with its last user, not when garbage is collected.
        if self._made < WARM_UP:
            self._made += 1
            return self._stream.run(call)
        if self._captured is None:
            self._captured = self._stream.capture(call)
        graph, results = self._captured
        graph.replay()
        return results
