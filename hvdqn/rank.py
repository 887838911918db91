"""Hold the parts that one rank trains with; `hvdqn/parts.py` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hvdqn.acting import Actor, Epsilons
from hvdqn.clock import Clock
from hvdqn.envs import Environments
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.replay import Replay
from hvdqn.role import Role
from hvdqn.sync import Strategy


@dataclass
class Acting:
    """What a rank needs to act in environments and to store transitions."""

    envs: Environments
    actor: Actor
    replay: Replay


@dataclass
class Parts:
    """All objects that one rank trains with.

    Attributes:
        role: whether this rank acts in environments, and its number among those that do.
        clock: decides when updates and events are due.
        learner: computes and applies gradients.
        strategy: exchanges gradients or parameters with the other ranks.
        epsilons: the share of random actions in each environment.
        timer: counts this rank's seconds by phase.
        device: the device of this rank's networks.
        threads: number of threads that this rank may use.
        overlap: what this rank does while the environments step: "exchange": it exchanges gradients with other ranks;
            "update": a GPU takes a whole update; "none": it waits.
        acting: environments, actor and replay; None on a rank that only serves others.
    """

    role: Role
    clock: Clock
    learner: Learner
    strategy: Strategy
    epsilons: Epsilons
    timer: PhaseTimer
    device: torch.device
    threads: int
    overlap: Literal["none", "exchange", "update"]
    acting: Acting | None
