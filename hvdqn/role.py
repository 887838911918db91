"""Decide which ranks act in environments and learn, and which one only serves the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """Says whether one rank acts, and which number it has among those that do.

    Attributes:
        acts: whether this rank steps environments, fills replay and computes gradients. If not, it only applies the
            gradients of those that do (rank 0 under `--sync server`).
        index: this rank's number among the acting ranks, 0 <= index < of; 0 if it does not act.
        of: number of acting ranks.
    """

    acts: bool
    index: int
    of: int


def assign_role(sync: str, rank: int, size: int) -> Role:
    """Return the role of a rank. All ranks act, except rank 0 under `--sync server`."""
    if sync != "server":
        return Role(True, rank, size)
    return Role(rank > 0, max(rank - 1, 0), size - 1)
