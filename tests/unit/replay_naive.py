"""What replay must hold and return, told by loops over Python lists of episodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hvdqn.replay import Ring
from hvdqn.replay.sampling import Assembler
from hvdqn.replay.storage import RUNNING, TERMINATED, TRUNCATED

Script = Sequence[
    Sequence[tuple[int, int]]
]  # per env, (length, how it ends) of its episodes, repeated for ever
Moment = tuple[int, int, int]  # env, episode, time: also what an observation shows


@dataclass
class FakeStep:
    reward: Any
    terminated: Any
    truncated: Any
    next_observation: Any
    observation: Any
    fresh: Any
    valid: Any


@dataclass
class Episode:
    length: int
    end: int
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return len(self.actions) == self.length


class Transition(NamedTuple):
    observation: np.ndarray
    action: int
    reward: float
    next_observation: np.ndarray
    discount: float


class ScriptedEnvs:
    """Environments whose observations say where they are, with a full record of what happened."""

    def __init__(self, script: Script, autoreset: str, seed: int = 0) -> None:
        self.envs = len(script)
        self.autoreset = autoreset
        self.rng = np.random.default_rng(seed)
        self.scripts: list[Iterator[tuple[int, int]]] = [itertools.cycle(episodes) for episodes in script]
        self.record: list[list[Episode]] = [[] for _ in script]

    def reset(self) -> np.ndarray:
        for env in range(self.envs):
            self._begin(env)
        return self._observe()

    def step(self) -> tuple[np.ndarray, FakeStep]:
        resetting = [self.autoreset == "next_step" and self.record[env][-1].over for env in range(self.envs)]
        actions = self.rng.integers(0, 5, self.envs)
        rewards = self.rng.normal(size=self.envs).astype(np.float32)
        ends = np.zeros(self.envs, np.int64)
        for env, episode in enumerate(episodes[-1] for episodes in self.record):
            if resetting[env]:
                rewards[env] = 0.0
                continue
            episode.actions.append(int(actions[env]))
            episode.rewards.append(float(rewards[env]))
            ends[env] = episode.end if episode.over else RUNNING
        next_observation = self._observe()
        fresh = np.array(resetting) if self.autoreset == "next_step" else ends != RUNNING
        for env in np.flatnonzero(fresh):
            self._begin(env)
        observation = self._observe()
        next_observation[resetting] = observation[resetting]
        return actions, FakeStep(
            rewards,
            ends == TERMINATED,
            ends == TRUNCATED,
            next_observation,
            observation,
            fresh,
            ~np.array(resetting),
        )

    def _begin(self, env: int) -> None:
        self.record[env].append(Episode(*next(self.scripts[env])))

    def _observe(self) -> np.ndarray:
        moments = [(env, len(done) - 1, len(done[-1].actions)) for env, done in enumerate(self.record)]
        return np.array(moments, np.float32)

    def starts(self, rows_per_env: int, frame_stack: int, n_step: int) -> set[Moment]:
        """Every moment that a transition can be built from, given how many rows a ring keeps."""
        found = set()
        for env, episodes in enumerate(self.record):
            oldest = sum(len(episode.actions) + 1 for episode in episodes) - rows_per_env
            first_row = 0
            for number, episode in enumerate(episodes):
                for time in range(len(episode.actions)):
                    frames_held = first_row + max(time - frame_stack + 1, 0) >= oldest
                    path_known = episode.over or time + n_step <= len(episode.actions)
                    if frames_held and path_known:
                        found.add((env, number, time))
                first_row += len(episode.actions) + 1
        return found

    def transition(self, moment: Moment, frame_stack: int, n_step: int, gamma: float) -> Transition:
        env, number, time = moment
        episode = self.record[env][number]
        reward, discount, later = 0.0, 1.0, time
        while later < min(time + n_step, len(episode.actions)):
            reward += discount * episode.rewards[later]
            discount *= gamma
            later += 1
        if episode.over and episode.end == TERMINATED and later == len(episode.actions):
            discount = 0.0

        def stack(at: int) -> np.ndarray:
            frames = [(env, number, max(at - back, 0)) for back in reversed(range(frame_stack))]
            return np.array(frames if frame_stack > 1 else frames[0], np.float32)

        return Transition(stack(time), episode.actions[time], reward, stack(later), discount)


def moments(observations: np.ndarray) -> list[Moment]:
    """What observations, or the newest frames of their stacks, show."""
    newest = observations[:, -1] if observations.ndim == 3 else observations
    return [(int(env), int(episode), int(time)) for env, episode, time in newest]


def ring_for(
    envs: ScriptedEnvs,
    capacity: int,
    frame_stack: int = 1,
    n_step: int = 1,
    gamma: float = 0.9,
    **others: Any,
) -> Ring:
    return Ring(envs.envs, capacity, (3,), np.float32, frame_stack, n_step, gamma, **others)


def check_batch(batch: Any, envs: ScriptedEnvs, ring: Ring) -> None:
    """Every transition of the batch is what the naive loop says."""
    for i, moment in enumerate(moments(batch.observation)):
        expected = envs.transition(moment, ring.frame_stack, ring.n_step, ring.gamma)
        np.testing.assert_array_equal(batch.observation[i], expected.observation)
        assert batch.action[i] == expected.action
        np.testing.assert_allclose(batch.reward[i], expected.reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.next_observation[i], expected.next_observation)
        np.testing.assert_allclose(batch.discount[i], expected.discount, rtol=1e-6)


def check_ring(ring: Ring, envs: ScriptedEnvs) -> None:
    """The ring's starts are exactly the naive ones, and each gives the naive transition."""
    expected = envs.starts(ring.rows_per_env, ring.frame_stack, ring.n_step)
    rows = ring.starts()
    assert rows.size == len(expected)
    if rows.size:
        batch = Assembler(ring).build(rows)
        assert set(moments(batch.observation)) == expected
        check_batch(batch, envs, ring)
