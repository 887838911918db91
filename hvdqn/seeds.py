"""Every random number of a run comes from one seed, spawned per rank and per use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Seeds:
    """Independent streams of one rank (numpy's `SeedSequence.spawn`)."""

    environments: int
    evaluation: int
    exploration: np.random.Generator
    replay: np.random.Generator
    noise: int
    """Of torch's own generator: the noise of networks, the fractions of IQN, the dropout of a user's torso."""


def rank_seeds(seed: int, rank: int, env_steps: int = 0) -> Seeds:
    """The streams of one rank; they do not depend on how many ranks there are.

    Args:
        seed: of the run.
        rank: this rank.
        env_steps: where the run is resumed, so that what cannot be resumed exactly does not repeat itself.
    """
    uses = np.random.SeedSequence(seed, spawn_key=(rank, env_steps)).spawn(5)
    environments, evaluation, noise = (int(uses[i].generate_state(1)[0] >> 1) for i in (0, 1, 4))
    exploration, replay = (np.random.default_rng(use) for use in uses[2:4])
    return Seeds(environments, evaluation, exploration, replay, noise)


def torch_state(device: torch.device) -> dict[str, NDArray[np.uint8]]:
    """Where torch's generators are, of the CPU and of a rank's GPU."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy()
    return state


def load_torch_state(state: Mapping[str, NDArray[np.uint8]], device: torch.device) -> None:
    """Put back what `torch_state` gave; a generator that it does not know goes on as it is."""
    torch.set_rng_state(torch.tensor(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"]), device)
