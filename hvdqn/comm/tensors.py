"""Check tensors before an allreduce, and view them as bytes for a broadcast, for all engines."""

from __future__ import annotations

import torch
from torch import Tensor


def check_reducible(tensor: Tensor) -> None:
    """Assert that `Comm.allreduce_sum_async` accepts `tensor`: flat [n], contiguous, float32 or float64."""
    assert tensor.dim() == 1, f"allreduce takes a flat tensor, not {list(tensor.shape)}"
    assert tensor.is_contiguous(), "allreduce takes a contiguous tensor"
    assert tensor.dtype in (torch.float32, torch.float64), (
        f"allreduce takes float32 or float64, not {tensor.dtype}"
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a flat uint8 view of the tensor's bytes, which every engine can send, whichever dtypes it supports."""
    assert tensor.is_contiguous(), "broadcast_ takes a contiguous tensor"
    return tensor.detach().reshape(-1).view(torch.uint8)
