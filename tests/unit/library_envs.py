"""Environments for tests of the Python API, and callbacks and functions that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

import hvdqn

EPISODE_STEPS = 10


class Rich(gym.Env[Any, int]):
    """Observes a Dict of all kinds of spaces, counts actions from 5, and reports numbers in its infos."""

    observation_space = spaces.Dict(
        {
            "box": spaces.Box(-1, 1, (2, 3), np.float32),
            "choice": spaces.Discrete(3, start=1),
            "choices": spaces.MultiDiscrete([2, 3]),
            "flags": spaces.MultiBinary(4),
            "pair": spaces.Tuple([spaces.Box(0, 255, (2,), np.uint8), spaces.Discrete(2)]),
        }
    )
    action_space = spaces.Discrete(3, start=5)

    def __init__(self, length: int = EPISODE_STEPS, fails_after: int = 0) -> None:
        self.length, self.fails_after, self.total = length, fails_after, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time, self.first_half = 0, 0
        return self.observation_space.sample(), {}

    def step(self, action: int):
        assert self.action_space.contains(action)
        self.time, self.total = self.time + 1, self.total + 1
        if self.total == self.fails_after:
            raise RuntimeError("the simulator broke")
        info = {
            "is_success": action == 5,
            "distance": np.float32(self.time / 4),
            "object": object(),
            "note": "x",
        }
        return self.observation_space.sample(), 1.0, self.time == self.length, False, info


def make_cartpole(length: int = 500) -> gym.Env[Any, int]:
    return gym.make("CartPole-v1", max_episode_steps=length)


class Flat(torch.nn.Linear):
    """A torso of a user."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape[0], 8)


def make_minari_dataset(name: str, episodes: int) -> int:
    """Create a dataset of CartPole in MINARI_DATASETS_PATH; return its transitions."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env, buffers = gym.make("CartPole-v1"), []
    for seed in range(episodes):
        observations, steps = [env.reset(seed=seed)[0]], []
        while not steps or not any(steps[-1][1:3]):
            observation, reward, terminated, truncated, _ = env.step(seed % 2)
            observations.append(observation)
            steps.append((reward, terminated, truncated))
        rewards, terminations, truncations = map(list, zip(*steps, strict=True))
        arrays = {"observations": np.array(observations), "actions": np.full(len(steps), seed % 2)}
        ends = {"rewards": rewards, "terminations": terminations, "truncations": truncations}
        buffers.append(EpisodeBuffer(id=seed, infos={}, **arrays, **ends))
    return int(minari.create_dataset_from_buffers(name, buffer=buffers, env=env).total_steps)


class Recording(hvdqn.Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        self.checkpoints: list[Path] = []
        self.episodes: list[Any] = []

    def on_log(self, run, values):
        self.logs.append({"env_steps": run.env_steps, "episodes_seen": len(self.episodes), **values})

    def on_evaluation(self, run, evaluation):
        self.evaluations.append((run.env_steps, evaluation.mean))

    def on_checkpoint(self, run, path):
        assert (path / "manifest.json").exists()
        self.checkpoints.append(path)

    def on_episode(self, run, episode):
        self.episodes.append(episode)


class StopsEarly(hvdqn.Callback):
    """The last rank alone asks for the end of the run."""

    def on_log(self, run, values):
        if run.rank == run.size - 1 and run.env_steps >= 800:
            run.stop()


class Fails(hvdqn.Callback):
    def on_episode(self, run, episode):
        raise ArithmeticError("a bug in a callback")


NOT_A_CALLBACK = {"on_log": print}
