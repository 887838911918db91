"""What replay must hold and return, computed by loops over Python lists of episodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hvdqn.replay import Replay
from hvdqn.replay.replay import RUNNING, TERMINATED, TRUNCATED
from hvdqn.step import Step

# Per environment, the length and the outcome of each of its episodes, repeated for ever.
Script = Sequence[Sequence[tuple[int, int]]]
# Environment, episode and time: also the numbers of an observation.
Moment = tuple[int, int, int]
AnyReplay = TypeVar("AnyReplay", bound=Replay)


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
    """Environments that observe their own environment, episode and time, and record all that happened."""

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

    def step(self) -> tuple[np.ndarray, Step]:
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
        return actions, Step(
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

    def sampleable(self, rows_per_env: int, frame_stack: int, n_step: int) -> set[Moment]:
        """Return every moment at which a complete transition begins, given how many rows a ring keeps."""
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
    """Return the moments of observations, or of the newest frames of their stacks."""
    newest = observations[:, -1] if observations.ndim == 3 else observations
    return [(int(env), int(episode), int(time)) for env, episode, time in newest]


def make_replay(
    envs: ScriptedEnvs,
    capacity: int,
    frame_stack: int = 1,
    n_step: int = 1,
    gamma: float = 0.9,
    *,
    replay_class: type[AnyReplay] = Replay,
    seed: int = 0,
    **others: Any,
) -> AnyReplay:
    """Return an empty replay for the observations of these environments."""
    rng = np.random.default_rng(seed)
    return replay_class(envs.envs, capacity, (3,), np.float32, rng, frame_stack, n_step, gamma, **others)


def check_batch(batch: Any, envs: ScriptedEnvs, replay: Replay) -> None:
    """Check that every transition of the batch equals the naive one."""
    for i, moment in enumerate(moments(batch.observation)):
        expected = envs.transition(moment, replay.frame_stack, replay.n_step, replay.gamma)
        np.testing.assert_array_equal(batch.observation[i], expected.observation)
        assert batch.action[i] == expected.action
        np.testing.assert_allclose(batch.reward[i], expected.reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.next_observation[i], expected.next_observation)
        np.testing.assert_allclose(batch.discount[i], expected.discount, rtol=1e-6)


def check_replay(replay: Replay, envs: ScriptedEnvs) -> None:
    """Check that the same transitions can be sampled as from the naive record, and that each equals the naive one."""
    expected = envs.sampleable(replay.rows_per_env, replay.frame_stack, replay.n_step)
    rows = replay.sampleable_rows()
    assert rows.size == len(expected)
    if rows.size:
        batch = replay.build_batch(rows)
        assert set(moments(batch.observation)) == expected
        check_batch(batch, envs, replay)
