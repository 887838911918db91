"""Collect the state that a checkpoint holds: one file for what is equal on all ranks, and one file for each rank.

A file of a checkpoint is called a part; its name is the file's without ".safetensors".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from hvdqn.checkpoint.files import BrokenCheckpointError
from hvdqn.comm import Comm
from hvdqn.rank import Parts
from hvdqn.seeds import torch_state
from hvdqn.sync import Totals

LEARNER = "learner"
"""Name of the part (file) that rank 0 writes for all ranks."""


def rank_part(rank: int) -> str:
    """Return the name of the part (file) that this rank writes for itself: "rank-00003"."""
    return f"rank-{rank:05d}"


@dataclass
class Progress:
    """Counters and decisions of a run that are kept nowhere else. A resumed run continues with them."""

    failed_checkpoints: int = 0
    evaluated_at_env_steps: int = -1
    evaluation: dict[str, float] = field(default_factory=dict)
    keeps_replay: bool | None = None  # whether checkpoints hold replay; None until that is decided
    world_changes: int = 0  # only elastic runs have any


def shared_state(parts: Parts, totals: Totals, progress: Progress) -> dict[str, Any]:
    """Return the state that is equal on all ranks: networks, optimizer, counters, clock and progress.

    Its tensors are those of the parts, not copies.
    """
    strategy = parts.strategy
    carried = {f"sync.{name}": tensor for name, tensor in strategy.state().items()}
    return {
        "learner": {**parts.learner.state(), **carried},
        "counters": {
            **totals.counters(),
            "skipped_in_a_row": strategy.skipped_in_a_row,
            "sync": strategy.counters(),
        },
        "clock": parts.clock.state(),
        "progress": asdict(progress),
    }


def load_shared_state(
    state: Mapping[str, Any], parts: Parts, totals: Totals, refill: bool = False
) -> Progress:
    """Load what `shared_state` returned into `parts` and `totals`; return its progress.

    Args:
        state: the state of another rank, or of a checkpoint, which holds NumPy arrays in place of tensors.
        parts: this rank's parts, built with the same settings of network and optimizer.
        totals: this rank's sums of statistics.
        refill: whether replay is empty, so that it must fill before the next update.
    """
    tensors = {name: torch.as_tensor(values) for name, values in state["learner"].items()}
    prefix = "sync."
    carried = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    counters, strategy = state["counters"], parts.strategy
    parts.learner.load_state(tensors)
    strategy.load_state(carried)
    totals.load_counters(counters)
    strategy.skipped_in_a_row = counters["skipped_in_a_row"]
    strategy.load_counters(counters["sync"])
    parts.clock.resume(state["clock"], refill)
    return Progress(**state["progress"])


def check_learner(part: Any, path: object) -> None:
    """Check that the content of a checkpoint's file has a learner's tensors, with shapes that fit each other.

    The hash of the file does not prove that.

    Args:
        part: the content of the part `LEARNER`, as `read_part` returned it.
        path: the checkpoint's directory, for error messages.

    Raises:
        BrokenCheckpointError: the network's parameters are missing, or the tensors do not fit each other.
    """
    tensors = part.get("learner") if isinstance(part, dict) else None
    online = tensors.get("online") if isinstance(tensors, dict) else None
    if not isinstance(tensors, dict) or not isinstance(online, np.ndarray) or online.ndim != 1:
        raise BrokenCheckpointError(f"{path} holds no parameters of a network")
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray) or tensor.dtype.kind != "f":
            raise BrokenCheckpointError(f"{path}: {name} is no array of floats")
        is_scalar = tensor.shape == () or name == "sync.largest_weight"  # `--sync parameters` keeps it
        if not is_scalar and tensor.shape != online.shape:
            raise BrokenCheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, where the network has {list(online.shape)}"
            )


def contents(parts: Parts, comm: Comm, totals: Totals, progress: Progress) -> dict[str, Any]:
    """Return the content of each part (file) that this rank writes to a checkpoint, by the part's name."""
    acting = parts.acting if progress.keeps_replay else None  # without replay, a resume resets environments
    written: dict[str, Any] = {
        rank_part(comm.rank): {
            "actor": acting.actor.state() if acting else None,
            "clock": parts.clock.own_state(),
            "replay": acting.replay.state() if acting else None,
            "seconds": parts.timer.seconds(),
            "torch": torch_state(parts.device),
        }
    }
    if comm.rank == 0:
        written[LEARNER] = shared_state(parts, totals, progress)
    return written
