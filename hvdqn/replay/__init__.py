"""Replay: store single observations in a ring per environment; build frame stacks and n-step returns when sampling."""

from __future__ import annotations

from hvdqn.replay.batch import Batch, Importance
from hvdqn.replay.memory import HOST_MEMORY, Memory
from hvdqn.replay.prioritized import PrioritizedReplay
from hvdqn.replay.replay import Replay
from hvdqn.replay.resharding import reshard
from hvdqn.replay.rollout import Rollout, Values, rollout_rows

__all__ = [
    "HOST_MEMORY",
    "Batch",
    "Importance",
    "Memory",
    "PrioritizedReplay",
    "Replay",
    "Rollout",
    "Values",
    "reshard",
    "rollout_rows",
]
