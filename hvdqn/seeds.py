"""Every random number of a run comes from one seed, spawned per rank and per use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seeds:
    """Independent streams of one rank (numpy's `SeedSequence.spawn`)."""

    environments: int
    evaluation: int
    exploration: np.random.Generator
    replay: np.random.Generator


def rank_seeds(seed: int, rank: int, env_steps: int = 0) -> Seeds:
    """The streams of one rank; they do not depend on how many ranks there are.

    Args:
        seed: of the run.
        rank: this rank.
        env_steps: where the run is resumed, so that what cannot be resumed exactly does not repeat itself.
    """
    uses = np.random.SeedSequence(seed, spawn_key=(rank, env_steps)).spawn(4)
    environments, evaluation = (int(use.generate_state(1)[0] >> 1) for use in uses[:2])
    exploration, replay = (np.random.default_rng(use) for use in uses[2:])
    return Seeds(environments, evaluation, exploration, replay)
