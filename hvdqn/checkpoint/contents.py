"""Which state a checkpoint holds: what all ranks share in one file, and what belongs to one rank in a file per rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from hvdqn.acting import Actor
from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.replay import Replay
from hvdqn.seeds import torch_state

LEARNER = "learner"
"""Name of the part that rank 0 writes for all ranks."""


def rank_part(rank: int) -> str:
    """Return the name of the part that a rank writes for itself."""
    return f"rank-{rank:05d}"


class RankParts(Protocol):
    """The parts of one rank whose state a checkpoint holds: those of `hvdqn.parts.Parts`, which imports come later."""

    learner: Learner
    clock: Clock
    replay: Replay
    actor: Actor
    timer: PhaseTimer
    device: torch.device


@dataclass
class Progress:
    """Counters and decisions of a run that no other part keeps. A resumed run continues with them."""

    failed_checkpoints: int = 0
    evaluated_at_env_steps: int = -1
    evaluation: dict[str, float] = field(default_factory=dict)
    keeps_replay: bool | None = None  # whether checkpoints hold replay; None until that is decided
    world_changes: int = 0  # only elastic runs have any


def shared_state(learner: Learner, clock: Clock, progress: Progress) -> dict[str, Any]:
    """Return the state that is the same on every rank: networks, optimizer, counters, clock and progress.

    Tensors are not copied.
    """
    return {
        "learner": learner.state(),
        "counters": learner.counters(),
        "clock": clock.state(),
        "progress": asdict(progress),
    }


def load_shared_state(
    state: Mapping[str, Any], learner: Learner, clock: Clock, refill: bool = False
) -> Progress:
    """Load what `shared_state` returned into the learner and the clock, and return its progress.

    Args:
        state: from another rank, or from a checkpoint, where arrays stand in for tensors.
        learner: built with the same network and optimizer settings.
        clock: may count updates at another rate than before; see `Clock.resume`.
        refill: True if replay is empty, so that it must fill before the next update.
    """
    learner.load_state({name: torch.as_tensor(values) for name, values in state["learner"].items()})
    learner.load_counters(state["counters"])
    clock.resume(state["clock"], refill)
    return Progress(**state["progress"])


def contents(parts: RankParts, comm: Comm, progress: Progress) -> dict[str, Any]:
    """Return what this rank writes to a checkpoint, by the name of the part."""
    written: dict[str, Any] = {
        rank_part(comm.rank): {
            "actor": parts.actor.state(),
            "clock": parts.clock.own_state(),
            "replay": parts.replay.state() if progress.keeps_replay else None,
            "seconds": parts.timer.seconds(),
            "torch": torch_state(parts.device),
        }
    }
    if comm.rank == 0:
        written[LEARNER] = shared_state(parts.learner, parts.clock, progress)
    return written
