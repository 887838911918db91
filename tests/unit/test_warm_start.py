"""Runs that do not begin with nothing: `--init-from` and `--prefill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import hvdqn
from hvdqn import train
from hvdqn.checkpoint import reset_environments
from hvdqn.comm.local import LocalComm
from hvdqn.config import preset_config
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.prefill import prefill
from hvdqn.replay import PrioritizedReplay, Replay
from hvdqn.replay.prefill import fill, make_transitions, share
from hvdqn.replay.replay import TERMINATED, TRUNCATED
from tests.unit import masked_envs
from tests.unit.library_envs import make_minari_dataset

SMALL: dict[str, Any] = {"preset": "smoke", "total_env_steps": 300, "eval_episodes": 0, "hidden": (16, 8)}


def collect(count: int) -> dict[str, np.ndarray]:
    """Return transitions of random play in CartPole, with a time limit of 12 steps."""
    env = gym.make("CartPole-v1", max_episode_steps=12)
    rng, columns = np.random.default_rng(0), [[] for _ in range(6)]
    observation, _ = env.reset(seed=0)
    for _ in range(count):
        action = int(rng.integers(2))
        following, reward, terminated, truncated, _ = env.step(action)
        row = (observation, action, reward, following, terminated, truncated)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        observation = env.reset()[0] if terminated or truncated else following
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return {name: np.array(column) for name, column in zip(names, columns, strict=True)}


def rows_of(arrays: dict[str, np.ndarray]) -> set[tuple[Any, ...]]:
    """Return each transition as a tuple: observation, action, reward, next observation, whether it ended."""
    return {
        (tuple(o.tolist()), int(a), float(r), tuple(n.tolist()), bool(t))
        for o, a, r, n, t in zip(
            *(
                arrays[key]
                for key in ("observations", "actions", "rewards", "next_observations", "terminations")
            ),
            strict=True,
        )
    }


@pytest.mark.parametrize("kind", [Replay, PrioritizedReplay])
@pytest.mark.parametrize("shuffled", [False, True])
def test_each_transition_is_in_the_replay_of_one_rank(kind: type[Replay], shuffled: bool) -> None:
    arrays, of, found = collect(200), 3, []
    if shuffled:
        order = np.random.default_rng(1).permutation(200)
        arrays = {name: array[order] for name, array in arrays.items()}
    for index in range(of):
        replay = kind(2, 400, (4,), np.float32, np.random.default_rng(0))
        known = make_transitions("x", arrays, replay, 2, 0)
        assert fill(replay, known, index, of, clip_rewards=False) == len(replay)
        replay.start(np.zeros((2, 4), np.float32))  # as the first reset of the environments does
        rows = replay.sampleable_rows()
        batch = replay.build_batch(rows)
        ended = replay.outcome[rows] == TERMINATED
        found += zip(
            batch.observation, batch.action, batch.reward, batch.next_observation, ended, strict=True
        )
    columns = ("observations", "actions", "rewards", "next_observations", "terminations")
    together = dict(zip(columns, map(np.array, zip(*found, strict=True)), strict=True))
    assert len(found) == 200
    assert rows_of(together) == rows_of(arrays)


def test_frame_stacks_and_returns_do_not_cross_episodes() -> None:
    arrays = collect(60)
    replay = Replay(1, 200, (4,), np.float32, np.random.default_rng(0), frame_stack=3, n_step=2, gamma=0.5)
    fill(replay, make_transitions("x", arrays, replay, 2, 0), 0, 1, clip_rewards=False)
    replay.start(np.zeros((1, 4), np.float32))
    ends = arrays["terminations"] | arrays["truncations"]
    first, naive = 0, []
    for time in range(60):
        stack = [arrays["observations"][max(time - back, first)] for back in (2, 1, 0)]
        last = time if ends[time] or time == 59 else time + 1
        reward = sum(0.5 ** (step - time) * arrays["rewards"][step] for step in range(time, last + 1))
        discount = 0.0 if arrays["terminations"][last] else 0.5 ** (last + 1 - time)
        naive.append((np.stack(stack).ravel().tolist(), reward, discount))
        first = time + 1 if ends[time] else first
    rows = replay.sampleable_rows()
    batch = replay.build_batch(rows)
    made = [
        (stack.ravel().tolist(), reward, discount)
        for stack, reward, discount in zip(batch.observation, batch.reward, batch.discount, strict=True)
    ]
    assert sorted(made) == sorted(naive)
    assert np.count_nonzero(replay.outcome == TRUNCATED) == np.count_nonzero(
        ends & ~arrays["terminations"]
    ) + (not ends[-1])


def test_segments_are_shared_evenly() -> None:
    lengths = [5, 3, 4, 1, 1, 6, 2]
    shares = [ring for index in range(2) for ring in share(lengths, index, 2, 2)]
    assert sorted(number for ring in shares for number in ring) == list(range(7))
    filled = [sum(lengths[number] for number in ring) for ring in shares]
    assert max(filled) - min(filled) <= max(lengths)
    assert share([7], 0, 2, 1) == [[0], []]


def test_a_run_begins_with_the_transitions_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "demos.npz", **collect(150))
    hvdqn.train(prefill=str(tmp_path / "demos.npz"), run_dir=tmp_path / "run", **SMALL)
    assert "replay begins with 150 transitions" in capsys.readouterr().out
    flags = ["--run-dir", str(tmp_path / "run"), "--total-env-steps", "400"]
    assert train.main(flags) == 0  # the file is read only at the beginning
    assert "replay begins" not in capsys.readouterr().out


def test_a_minari_dataset_fills_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    total = make_minari_dataset("cartpole/test-v0", 5)
    config = preset_config("smoke").replace(prefill="minari:cartpole/test-v0")
    parts = build_parts(config, LocalComm(), PhaseTimer())
    assert parts.acting is not None
    assert prefill(config, parts) == total == len(parts.acting.replay)
    parts.acting.envs.close()
    with pytest.raises(hvdqn.UserError, match="the datasets of this machine: cartpole/test-v0"):
        hvdqn.train(prefill="minari:other/one-v0", run_dir=tmp_path / "run", **SMALL)


WRONG: dict[str, tuple[Any, str]] = {
    "no file": (None, "No such file"),
    "text": ("hello", "it is no .npz file"),
    "no rewards": (lambda a: a.pop("rewards"), "lacks rewards"),
    "lengths": (lambda a: a.update(actions=a["actions"][1:]), "actions 19"),
    "shape": (lambda a: a.update(observations=np.zeros((20, 3), np.float32)), "shape [3]"),
    "actions": (lambda a: a.update(actions=a["actions"] + 1), "outside of 0 to 1"),
    "float actions": (lambda a: a.update(actions=a["actions"] + 0.5), "whole numbers"),
    "empty": (lambda a: a.update({name: array[:0] for name, array in a.items()}), "at least one"),
    "objects": (lambda a: a.update(actions=np.array([print] * 20)), "it is no .npz file of plain arrays"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, words = WRONG[name]
    path, arrays = tmp_path / "demos.npz", collect(20)
    if callable(change):
        change(arrays)
        np.savez(path, **arrays)
    elif change:
        path.write_text(change)
    with pytest.raises(hvdqn.UserError) as raised:
        hvdqn.train(prefill=str(path), run_dir=tmp_path / "run", **SMALL)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> hvdqn.Result:
    return hvdqn.train(run_dir=tmp_path_factory.mktemp("source"), **SMALL)


def parameters(policy: hvdqn.Policy) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in policy.network.named_parameters()}


def first_checkpoint(run_dir: Path, **settings: Any) -> hvdqn.Policy:
    """Train so few steps that no update is taken; return the policy."""
    given = {**SMALL, "learning_starts": 290, **settings}
    result = hvdqn.train(run_dir=run_dir, **given, lr=1e-30)
    return result.policy()


def test_weights_of_another_run_are_a_start(source: hvdqn.Result, tmp_path: Path) -> None:
    old = parameters(source.policy())
    for place in (source.run_dir, source.checkpoint, source.checkpoint / "policy.safetensors"):
        new = parameters(first_checkpoint(tmp_path / place.name, init_from=str(place), seed=5))
        for name, array in old.items():
            np.testing.assert_allclose(new[name], array, atol=1e-6, err_msg=name)
    fresh = parameters(first_checkpoint(tmp_path / "fresh", seed=5))
    assert not np.allclose(fresh["torso.0.weight"], old["torso.0.weight"])


def test_the_torso_alone_serves_another_head(source: hvdqn.Result, tmp_path: Path) -> None:
    other = {"head": "qr", "quantiles": 5, "init_from": str(source.run_dir)}
    new = parameters(first_checkpoint(tmp_path / "run", init_torso_only=True, **other))
    old = parameters(source.policy())
    np.testing.assert_allclose(new["torso.0.weight"], old["torso.0.weight"], atol=1e-6)
    with pytest.raises(hvdqn.UserError, match="or --init-torso-only"):
        first_checkpoint(tmp_path / "other", **other)
    with pytest.raises(hvdqn.UserError, match="give its settings of the torso"):
        first_checkpoint(tmp_path / "wide", **{**other, "hidden": (32, 8)}, init_torso_only=True)


def test_a_resumed_run_goes_on_with_its_own_weights(source: hvdqn.Result, tmp_path: Path) -> None:
    plain, resumed = (tmp_path / name for name in ("plain", "resumed"))
    for path in (plain, resumed):
        hvdqn.train(run_dir=path, **SMALL)
    more = {**SMALL, "total_env_steps": 400}
    hvdqn.train(run_dir=plain, **more)
    hvdqn.train(run_dir=resumed, **more, init_from=str(source.run_dir), seed=1)
    shas = [json.loads((path / "summary.json").read_text())["param_sha256"] for path in (plain, resumed)]
    assert shas[0] == shas[1]


def test_transitions_without_masks_precede_those_with(tmp_path: Path) -> None:
    """All actions are legal in rows of a file; the run goes on with the environment's masks."""
    numbers = np.arange(40, dtype=np.float32)
    observations = np.stack([numbers % 10, numbers], axis=1)
    arrays = {
        "observations": observations,
        "actions": np.arange(40) % masked_envs.ACTIONS,
        "rewards": numbers,
        "next_observations": observations + 1,
        "terminations": np.ones(40, bool),
    }
    np.savez(tmp_path / "known.npz", **arrays)
    config = preset_config("smoke").replace(
        env="tests.unit.masked_envs:Strict-v0", prefill=str(tmp_path / "known.npz")
    )
    parts = build_parts(config, LocalComm(), PhaseTimer())
    assert parts.acting is not None
    actor, replay = parts.acting.actor, parts.acting.replay
    known = prefill(config, parts)
    reset_environments(parts)
    for _ in range(30):
        actions = actor.choose(0.5)
        replay.add(actions, actor.step(actions))
    batch = replay.sample(500)
    assert batch.action_mask is not None
    of_file = batch.reward == batch.observation[:, 1]
    of_file &= (batch.observation[:, 0] < 10) & (batch.discount == 0)
    assert known == 40
    assert 0 < of_file.sum() < 500
    assert batch.action_mask[of_file].all()
    expected = masked_envs.mask_of(batch.observation[~of_file])
    np.testing.assert_array_equal(batch.action_mask[~of_file], expected)


def test_actions_of_several_dimensions_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(hvdqn.UserError, match="--prefill does not support actions of several dimensions"):
        hvdqn.train(
            run_dir=tmp_path / "run", env="tests.unit.action_envs:AdditiveEven-v0", prefill="x.npz", **SMALL
        )
