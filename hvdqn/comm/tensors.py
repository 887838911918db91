"""What the engines ask of the tensors they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_reducible(tensor: Tensor) -> None:
    """Assert what `Comm.allreduce_sum_async` promises its engines: [n], contiguous, float32 or float64."""
    assert tensor.dim() == 1, f"allreduce takes a flat tensor, not {list(tensor.shape)}"
    assert tensor.is_contiguous(), "allreduce takes a contiguous tensor"
    assert tensor.dtype in (torch.float32, torch.float64), (
        f"allreduce takes float32 or float64, not {tensor.dtype}"
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """View `tensor` as uint8 [bytes]: every engine can send those, whatever dtypes it knows."""
    assert tensor.is_contiguous(), "broadcast_ takes a contiguous tensor"
    return tensor.detach().reshape(-1).view(torch.uint8)
