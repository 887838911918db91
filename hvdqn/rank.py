"""The parts that one rank trains with. `parts` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hvdqn.acting import Actor, Epsilons
from hvdqn.clock import Clock
from hvdqn.envs import Environments, Spaces
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.replay import Replay
from hvdqn.role import Role
from hvdqn.sync import Strategy


@dataclass
class Acting:
    """What a rank needs to act and to remember."""

    envs: Environments
    actor: Actor
    replay: Replay


@dataclass
class Parts:
    """What one rank trains with.

    Attributes:
        role: whether this rank acts.
        spaces: of the environments of the job.
        clock, learner, strategy, epsilons, timer, device: of this rank.
        threads: number of threads that this rank may use.
        overlap: what happens while the environments step: "exchange": gradients travel; "update": a GPU takes a whole
            update; "none": nothing.
        acting: None on a rank that serves.
    """

    role: Role
    spaces: Spaces
    clock: Clock
    learner: Learner
    strategy: Strategy
    epsilons: Epsilons
    timer: PhaseTimer
    device: torch.device
    threads: int
    overlap: Literal["none", "exchange", "update"]
    acting: Acting | None
