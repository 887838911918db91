"""Functions recorded as CUDA graphs.

The passes of a small network are some hundred kernels, each of which takes longer to launch than to run. A graph
launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Record: TypeAlias = Callable[[Callable[[], Tensors]], tuple[Tensors, Callable[[], None]]]
"""Records a function: returns its results, and a function that computes them again and overwrites them."""

WARM_UPS = 3


def record_cuda_graph(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
    """Record what a function does on the GPU; see `Record`.

    Torch's random state is restored afterwards, so that a resumed run draws the same numbers.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        # Libraries initialize in the first calls, which a graph must not record: torch's manual asks for this.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The threads of Horovod and NCCL go on calling CUDA meanwhile: that must not break the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function()
    return results, graph.replay


class Recorded:
    """A function of tensors that is recorded at its first call and replayed from then on.

    Args:
        function: its inputs keep their shapes, and it never reads a tensor's content on the host.
        record: how to record it.
        device: where its inputs lie; they are copied there at each call.
        changes: returns the tensors that the function changes. They are restored after recording, which runs the
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
