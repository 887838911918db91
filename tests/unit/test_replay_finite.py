"""Transitions that are not finite are never sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn import train
from hvdqn.replay import PrioritizedReplay, Replay
from hvdqn.replay.replay import TERMINATED, TRUNCATED
from tests.unit.replay_naive import ScriptedEnvs, make_replay, moments

SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
)
BAD = (np.nan, np.inf, -np.inf)


class PoisonedEnvs(ScriptedEnvs):
    """Replaces some rewards and the last number of some observations by numbers that are not finite."""

    def __init__(self, autoreset: str, share: float, seed: int) -> None:
        super().__init__(SCRIPT, autoreset, seed)
        self.poison, self.share = np.random.default_rng(seed + 1), share
        self.observations: dict[tuple[int, int, int], float] = {}

    def step(self) -> tuple[np.ndarray, Any]:
        actions, step = super().step()
        for env in np.flatnonzero((self.poison.random(self.envs) < self.share) & step.valid):
            episode = self.record[env][-2 if step.fresh[env] and self.autoreset == "same_step" else -1]
            episode.rewards[-1] = step.reward[env] = self.poison.choice(BAD)
        return actions, step

    def _observe(self) -> np.ndarray:
        """Return the moment of each environment, and the same number at each look at one moment."""
        seen = super()._observe()
        extra = []
        for moment in moments(seen):
            bad = self.poison.random() < self.share
            extra.append(self.observations.setdefault(moment, self.poison.choice(BAD) if bad else 0.0))
        return np.concatenate([seen, np.array(extra, np.float32)[:, None]], axis=1)


@pytest.mark.parametrize("kind", [Replay, PrioritizedReplay])
@settings(max_examples=30, deadline=None)
@given(
    autoreset=st.sampled_from(["same_step", "next_step"]),
    frame_stack=st.integers(1, 4),
    n_step=st.integers(1, 4),
    share=st.sampled_from([0.02, 0.1, 0.3]),
    resume=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_every_sampled_transition_is_finite_and_no_other_is_lost(
    kind: type[Replay], autoreset: str, frame_stack: int, n_step: int, share: float, resume: int, seed: int
) -> None:
    envs = PoisonedEnvs(autoreset, share, seed)
    arguments: Any = (2, 60, (4,), np.float32)
    replay = kind(*arguments, np.random.default_rng(0), frame_stack, n_step)
    replay.start(envs.reset())
    for i in range(60):
        replay.add(*envs.step())
        if i == resume:
            state = {name: array.copy() for name, array in replay.state().items()}
            replay = kind(*arguments, np.random.default_rng(1), frame_stack, n_step)
            replay.load_state(state)
        rows = replay.sampleable_rows()
        if isinstance(replay, PrioritizedReplay):
            np.testing.assert_array_equal(np.flatnonzero(replay._tree.priorities), rows)
        if rows.size:
            batch = replay.build_batch(rows)
            for array in (batch.observation, batch.reward, batch.next_observation):
                assert np.isfinite(array).all()
    # Only transitions near a bad number are missing: within n steps before it, or a frame stack after it.
    observed = moments(replay.build_batch(rows).observation[..., :3]) if rows.size else []
    for env, number, time in envs.sampleable(replay.rows_per_env, frame_stack, n_step) - set(observed):
        near = range(time - frame_stack + 1, time + n_step + 1)
        rewards = envs.record[env][number].rewards
        bad = [not np.isfinite(rewards[at]) for at in near if 0 <= at < len(rewards)]
        bad += [not np.isfinite(envs.observations.get((env, number, at), 0.0)) for at in near]
        assert any(bad), (env, number, time)


def test_finite_replay_discards_nothing() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_replay(envs, 60)
    replay.start(envs.reset())
    for _ in range(100):
        replay.add(*envs.step())
    assert replay.discarded == 0


class Poisoned(gym.Env[np.ndarray, int]):
    """Episodes of 10 steps; a share of the steps has a reward that is NaN."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, share: float) -> None:
        self.share, self.rng = share, np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int):
        self.steps += 1
        reward = np.nan if self.rng.random() < self.share else 1.0
        return self.rng.random(2, np.float32), reward, self.steps == 10, False, {}


gym.register("Poisoned-v0", Poisoned)


def run(run_dir: Path, share: float, replay: str) -> int:
    kwargs = json.dumps({"share": share})
    flags = (
        f"--preset smoke --env Poisoned-v0 --n-step 3 --replay {replay} --eval-episodes 1 --run-dir {run_dir}"
    )
    return train.main([*flags.split(), "--env-kwargs", kwargs])


@pytest.mark.parametrize("replay", ["uniform", "prioritized"])
def test_a_run_skips_no_update_and_warns_once(
    replay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, 0.02, replay) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_updates"] == 0
    assert 10 < summary["discarded_transitions"] < 100
    output = capsys.readouterr().out
    assert output.count("transitions of rank 0 have a reward, an observation or a TD error that is not") == 1


@pytest.mark.parametrize("replay", ["uniform", "prioritized"])
def test_a_run_without_any_finite_transition_ends_with_one_line(
    replay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, 1.0, replay) == 1
    error = capsys.readouterr().err
    assert error.startswith("hvdqn: error: 10 updates in a row had a gradient that is not finite")
    assert error.count("\n") == 1
