"""Build the vectorized environments of a rank, and step them.

`make_environments` builds them from an `EnvironmentConfig`. `Environments.step` returns a `Step`, which has the same
fields for every environment, observation space and autoreset mode.
"""

from __future__ import annotations

from hvdqn.envs.actions import Actions, draw_legal
from hvdqn.envs.global_random import global_generators_kept
from hvdqn.envs.make import describe_missing_library, find_spec, make_environments
from hvdqn.envs.masks import ACTION_MASK, split_mask
from hvdqn.envs.single import as_exception
from hvdqn.envs.spaces import Spaces, make_actions, make_space, to_inputs
from hvdqn.envs.vector import Environments, Episode
from hvdqn.envs.workers import kill_all_workers
from hvdqn.step import Step

__all__ = [
    "ACTION_MASK",
    "Actions",
    "Environments",
    "Episode",
    "Spaces",
    "Step",
    "as_exception",
    "describe_missing_library",
    "draw_legal",
    "find_spec",
    "global_generators_kept",
    "kill_all_workers",
    "make_actions",
    "make_environments",
    "make_space",
    "split_mask",
    "to_inputs",
]
