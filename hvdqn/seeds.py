"""Derive the seeds of all random generators of a run from its one seed, differently per rank and per use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Seeds:
    """The seeds and generators of one rank, statistically independent of each other (NumPy's `SeedSequence.spawn`).

    Args:
        environments: seed of the training environments.
        evaluation: seed of the evaluation environments and of random actions in them.
        exploration: generator that draws the random actions of training.
        replay: generator that draws the minibatches.
        noise: seed of torch's generator, from which noisy layers, IQN and dropout in a user's torso draw.
    """

    environments: int
    evaluation: int
    exploration: np.random.Generator
    replay: np.random.Generator
    noise: int


def rank_seeds(seed: int, rank: int, env_steps: int = 0) -> Seeds:
    """Return the seeds of one rank. They do not depend on the number of ranks.

    Args:
        seed: seed of the run.
        rank: this rank.
        env_steps: global env steps at which the run resumes; with other seeds than at the start, generators that
            cannot be restored do not repeat their numbers.
    """
    uses = np.random.SeedSequence(seed, spawn_key=(rank, env_steps)).spawn(5)
    environments, evaluation, noise = (int(uses[i].generate_state(1)[0] >> 1) for i in (0, 1, 4))
    exploration, replay = (np.random.default_rng(use) for use in uses[2:4])
    return Seeds(environments, evaluation, exploration, replay, noise)


# A key for `hvdqn eval` that no rank has: ranks' keys have three numbers.
_EVAL_COMMAND = (0x6576616C,)


def eval_command_seed(seed: int) -> int:
    """Return the seed for the episodes of `hvdqn eval`, which differ from those of all evaluations while training."""
    return int(np.random.SeedSequence(seed, spawn_key=_EVAL_COMMAND).generate_state(1)[0] >> 1)


def torch_state(device: torch.device) -> dict[str, NDArray[np.uint8]]:
    """Return the states of torch's generators: of the CPU, and of `device` if it is a GPU."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy()
    return state


def load_torch_state(state: Mapping[str, NDArray[np.uint8]], device: torch.device) -> None:
    """Set torch's generators to the states that `torch_state` returned; leave one without a saved state as it is."""
    torch.set_rng_state(torch.tensor(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"]), device)
