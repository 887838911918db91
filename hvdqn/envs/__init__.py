"""One vector environment per rank, behind one step contract.

`make_environments` builds it from an `EnvironmentConfig`; whatever the environment, its observations and the way
its vector resets itself, an `Environments` answers every action with one `Step`.
"""

from __future__ import annotations

from hvdqn.envs.make import find_spec, make_environments
from hvdqn.envs.vector import Environments, Episode
from hvdqn.step import Step

__all__ = ["Environments", "Episode", "Step", "find_spec", "make_environments"]
