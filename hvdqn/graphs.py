"""A function recorded once as a CUDA graph and replayed from then on.

A small network's forward and backward passes are some hundred kernels, each of which takes longer to launch than to
run. A graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Record: TypeAlias = Callable[[Callable[[], Tensors]], tuple[Tensors, Callable[[], None]]]

WARM_UPS = 3


def record_cuda_graph(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
    """Record what a function does on the GPU; return its results, and what does it again and overwrites them.

    The random numbers it drew meanwhile are given back, so that a run that resumes draws the same.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        # Libraries set themselves up in the first calls, which a graph must not record: torch's manual asks for this.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Horovod's and NCCL's threads go on meanwhile: what they ask of CUDA is not this graph's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function()
    return results, graph.replay


class Replayed:
    """A function of tensors, recorded at its first call.

    Args:
        function: its inputs keep their shapes, and it must not ask on the host what a tensor holds.
        record: how.
        device: where its inputs are to lie; they are copied there at each call.
        changes: tensors that it changes, but for those that it overwrites: it is called a few times before it is
            recorded, and they must not show it.
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
        """The results for these inputs, in tensors that the next call overwrites."""
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
