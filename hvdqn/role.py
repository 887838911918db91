"""Which ranks act in environments and learn from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """The part that one rank has in the job.

    Attributes:
        acts: whether it steps environments, fills replay and computes gradients; else it serves those that do.
        index: its place among the acting ranks, 0 <= index < of; 0 for a rank that serves.
        of: number of acting ranks.
    """

    acts: bool
    index: int
    of: int


def assign_role(sync: str, rank: int, size: int) -> Role:
    """Return the role of a rank: all ranks act, but under `--sync server` rank 0 serves."""
    if sync != "server":
        return Role(True, rank, size)
    return Role(rank > 0, max(rank - 1, 0), size - 1)
