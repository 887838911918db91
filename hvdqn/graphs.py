"""Record functions as CUDA graphs, and replay them.

The forward and backward pass of a small network take some hundred kernels, each of which takes longer to launch than to
run. A graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Record: TypeAlias = Callable[[Callable[[], Tensors]], tuple[Tensors, Callable[[], None]]]
"""The type of functions that record another one.

They return the results of the recorded function, and a function that computes these results anew in the same tensors.
"""

WARM_UPS = 3


def record_cuda_graph(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
    """Record what a function does on the GPU as a CUDA graph; return its results and the graph's `replay`.

    This calls the function a few times. It restores the states of torch's generators afterwards, so that a resumed run
    draws the same numbers.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        # CUDA's libraries initialize in the first calls, and a graph must not record that: torch's manual asks for
        # warm-up calls in another stream.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The threads of Horovod and NCCL call CUDA meanwhile. In this mode, that does not break the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function()
    return results, graph.replay


class Recorded:
    """Wraps a function of tensors: the first call records it, and every call replays the recording.

    Args:
        function: the function; its inputs must keep their shapes, and it must never read a tensor's content on the
            host.
        record: records the function, as `record_cuda_graph` does.
        device: the device of the recorded inputs; each call copies the given inputs there.
        changes: returns the tensors that the function changes. They are restored after recording, which calls the
            function a few times.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        record: Record,
        device: torch.device,
        changes: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        self.function, self.record, self.device, self.changes = function, record, device, changes
        self.inputs: Sequence[Tensor] = ()

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the results for these inputs, in tensors that the next call overwrites."""
        if not self.inputs:
            self.inputs = [given.to(self.device, copy=True) for given in inputs]
            before = [tensor.clone() for tensor in self.changes()]
            self.results, self.replay = self.record(lambda: self.function(*self.inputs))
            for tensor, old in zip(self.changes(), before, strict=True):
                tensor.copy_(old)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.replay()
        return self.results
