"""Assign a GPU to each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process sees, in torch's order."""
    return [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())]


def assign_gpus(visible: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the GPU of each rank: the visible one with the fewest ranks so far, None if the rank sees no GPU.

    GPUs are compared by UUID because a launcher may show all ranks of a host the same GPUs, or each rank a different
    one that every rank then calls number 0 (`srun --gpus-per-task=1`).

    Args:
        visible: the GPUs that each rank sees, from `visible_gpus`.
    """
    ranks_on: Counter[str | None] = Counter()
    assigned = []
    for gpus in visible:
        assigned.append(min(gpus, key=lambda gpu: ranks_on[gpu], default=None))
        ranks_on[assigned[-1]] += 1
    return assigned
