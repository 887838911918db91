"""Matrix products with many weights, by the library that is fast for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDE = 1 << 18  # with fewer weights, changing the layout takes more time than it saves
ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def wide_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map `[rows, inputs]` to `[rows, outputs]`, as `functional.linear` does.

    Many weights in float32 on a CPU use oneDNN, as convolutions do. Torch's default for linear layers, MKL, is much
    slower on some processors.
    """
    plain = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and weight.numel() >= WIDE
    if not (ONEDNN and plain) or torch.is_autocast_enabled("cpu"):
        return functional.linear(inputs, weight, bias)
    return functional.linear(inputs.to_mkldnn(), weight, bias).to_dense()


class WideLinear(nn.Linear):
    """A linear layer of many weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[rows, inputs]` to `[rows, outputs]`."""
        return wide_product(inputs, self.weight, self.bias)
