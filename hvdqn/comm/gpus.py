"""Which GPU each rank takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees, in the order in which torch numbers them."""
    return [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())]


def assign_gpus(seen: Sequence[Sequence[str]]) -> list[str | None]:
    """Each rank's GPU: of those that it sees, the one that the fewest ranks before it have; None if it sees none.

    A launcher may show all ranks of a host the same GPUs, or each of them another one, which is everybody's number 0
    (`srun --gpus-per-task=1`).
    """
    taken: Counter[str | None] = Counter()
    dealt = []
    for gpus in seen:
        dealt.append(min(gpus, key=lambda gpu: taken[gpu], default=None))
        taken[dealt[-1]] += 1
    return dealt
