"""Assign a GPU to each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process can use, in the order of torch's device numbers."""
    return [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())]


def assign_gpus(visible: Sequence[Sequence[str]]) -> list[str | None]:
    """Give each rank, in order, the GPU that fewest ranks before it got; return the GPUs' UUIDs, one per rank.

    A rank that sees no GPU gets None.

    GPUs are compared by UUID because a launcher may show all ranks of a host the same GPUs, or each rank a different
    one that every rank then calls number 0 (`srun --gpus-per-task=1`).

    Args:
        visible: for each rank, what `visible_gpus` returned there.
    """
    ranks_on: Counter[str | None] = Counter()
    assigned = []
    for gpus in visible:
        assigned.append(min(gpus, key=lambda gpu: ranks_on[gpu], default=None))
        ranks_on[assigned[-1]] += 1
    return assigned
