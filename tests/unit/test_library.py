"""The Python API: `hvdqn.train`, callbacks, `hvdqn.load` and `Policy`, in this process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.vector import SyncVectorEnv

import hvdqn
from hvdqn import train
from hvdqn.acting import FrameStack
from hvdqn.checkpoint import write_part
from hvdqn.checkpoint.files import read_part
from hvdqn.config import preset_config
from hvdqn.envs.episode_info import info_of
from hvdqn.envs.spaces import describe_space, make_space
from tests.launchers import clean_environment
from tests.unit import library_envs
from tests.unit.library_envs import EPISODE_STEPS, Fails, Recording, Rich, StopsEarly, make_cartpole
from tests.unit.masked_envs import Strict

SMALL: dict[str, Any] = {"preset": "smoke", "total_env_steps": 600, "eval_episodes": 2}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[hvdqn.Result, Recording]:
    """A short run with a frame stack, and what a callback saw of it."""
    seen = Recording()
    path = tmp_path_factory.mktemp("rich") / "run"
    result = hvdqn.train(
        env=Rich,
        run_dir=path,
        callbacks=[seen],
        frame_stack=2,
        checkpoint_every=200,
        eval_every=400,
        log_info=["distance"],
        hidden=(16,),
        **SMALL,
    )
    return result, seen


def test_importing_the_package_imports_neither_torch_nor_gymnasium() -> None:
    code = "import hvdqn, sys; print(dir(hvdqn)); sys.exit(bool({'torch', 'gymnasium', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done
    assert "Policy" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'learn'"):
        hvdqn.learn  # noqa: B018


def test_training_returns_what_the_run_directory_holds(rich: tuple[hvdqn.Result, Recording]) -> None:
    result, _ = rich
    assert result.summary == json.loads((result.run_dir / "summary.json").read_text())
    assert len(result.returns) == 2
    assert np.mean(result.returns) == result.summary["eval_return_mean"]
    assert (result.checkpoint / "manifest.json").exists()
    assert (result.summary["env"], result.summary["stopped_by"]) == (
        "tests.unit.library_envs:Rich",
        "finished",
    )


def test_callbacks_see_what_is_recorded(rich: tuple[hvdqn.Result, Recording]) -> None:
    result, seen = rich
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [line["env_steps"] for line in lines if "epsilon" in line]
    assert [values["env_steps"] for values in seen.logs] == logged == [200, 400, 600]
    assert [path.name for path in seen.checkpoints] == [f"{steps:012d}" for steps in (200, 400, 600)]
    assert [steps for steps, _ in seen.evaluations] == [400, 600]
    assert len(seen.episodes) == 600 // 8 // EPISODE_STEPS * 8
    for episode in seen.episodes:
        assert (episode.length, episode.episode_return) == (EPISODE_STEPS, EPISODE_STEPS)
        assert episode.info.keys() == {"is_success", "distance", "note"}
        assert episode.info["distance"] == EPISODE_STEPS / 4


def test_numbers_of_infos_are_averaged(rich: tuple[hvdqn.Result, Recording]) -> None:
    _, seen = rich
    first, second, third = seen.logs
    assert [values["info/distance"] for values in seen.logs] == [EPISODE_STEPS / 4] * 3
    assert "info/is_success" not in first  # found at the first checkpoint, which comes after the line
    success = [episode.info["is_success"] for episode in seen.episodes]
    until_first, until_second, until_third = (values["episodes_seen"] for values in seen.logs)
    assert second["info/is_success"] == pytest.approx(np.mean(success[until_first:until_second]))
    assert third["info/is_success"] == pytest.approx(np.mean(success[until_second:until_third]))
    assert 0 < until_second < until_third


def test_infos_of_a_vector_are_taken_apart() -> None:
    infos = {
        "score": np.array([1.0, 2.0]),
        "_score": np.array([False, True]),
        "best": np.array([3, 4]),
        "n": 1,
    }
    assert info_of(infos, 0) == {"best": 3}
    assert info_of(infos, 1) == {"score": 2.0, "best": 4}


def test_the_policy_plays_as_the_evaluation_did(rich: tuple[hvdqn.Result, Recording], tmp_path: Path) -> None:
    """Through `load`, from a run, a checkpoint and a file copied elsewhere; one observation and batches."""
    result, _ = rich
    result.policy().save(tmp_path / "mine.safetensors")
    with pytest.raises(hvdqn.UserError, match="contains no checkpoint"):
        hvdqn.load(tmp_path)
    policies = [
        hvdqn.load(path) for path in (result.run_dir, result.checkpoint, tmp_path / "mine.safetensors")
    ]
    vector = SyncVectorEnv([Rich, Rich])
    batch, _ = vector.reset(seed=3)
    alone = {name: part[0] for name, part in batch.items() if name != "pair"}
    alone["pair"] = tuple(part[0] for part in batch["pair"])
    values = [policy.q_values(batch) for policy in policies]
    for policy, q in zip(policies, values, strict=True):
        np.testing.assert_array_equal(q, values[0])
        assert policy.act(batch).tolist() == (q.argmax(axis=1) + 5).tolist()
        policy.reset()
        np.testing.assert_allclose(policy.q_values(alone), q[0], rtol=1e-5, atol=1e-6)
        assert policy.act(alone) == q[0].argmax() + 5
        assert isinstance(policy.act(alone), int)
        policy.reset()


def test_the_network_sees_what_gymnasium_flattens(rich: tuple[hvdqn.Result, Recording]) -> None:
    policy = rich[0].policy()
    env = Rich()
    frames = [env.reset(seed=1)[0], *(env.step(5)[0] for _ in range(3))]
    flat = [gym.spaces.flatten(Rich.observation_space, frame).astype(np.float32) for frame in frames]
    stack = [flat[0], flat[0]]
    for frame, vector in zip(frames, flat, strict=True):
        stack = [stack[1], vector]
        with torch.no_grad():
            expected = policy.network.q_values(torch.tensor(np.stack(stack))[None])[0].numpy()
        np.testing.assert_allclose(policy.q_values(frame), expected, rtol=1e-5, atol=1e-6)
        policy.act(frame)


def test_frame_stacks_of_a_batch_begin_anew_one_by_one(rich: tuple[hvdqn.Result, Recording]) -> None:
    policy = rich[0].policy()
    batches = [make_batch(seed) for seed in range(3)]
    known = FrameStack(np.zeros((2, 3)), 2)
    assert known.frames.shape == (2, 2, 3)
    policy.act(batches[0])
    policy.reset(1)
    mixed = policy.q_values(batches[1])
    policy.reset()
    fresh = policy.q_values(batches[1])
    np.testing.assert_array_equal(mixed[1], fresh[1])
    assert not np.array_equal(mixed[0], fresh[0])
    policy.act(batches[1])
    with pytest.raises(hvdqn.UserError, match="frames of 2 environments and got 1 observations"):
        policy.act(Rich().reset(seed=1)[0])


def make_batch(seed: int) -> Any:
    return SyncVectorEnv([Rich, Rich]).reset(seed=seed)[0]


def test_masks_and_wrong_observations(rich: tuple[hvdqn.Result, Recording]) -> None:
    policy = rich[0].policy()
    observation = Rich().reset(seed=1)[0]
    q = policy.q_values(observation)
    mask = np.ones(3, np.int8)
    mask[q.argmax()] = 0
    second = np.flatnonzero(q == np.sort(q)[1])[0]
    assert policy.act(observation, mask) == second + 5
    policy.reset()
    batch = make_batch(1)
    only = [[0, 0, 1], [1, 0, 0]]
    assert policy.act(batch, action_mask=only).tolist() == [7, 5]
    for wrong, words in (([1, 1], "takes \\[3\\]"), ([0, 0, 0], "allows no action")):
        with pytest.raises(hvdqn.UserError, match=words):
            policy.act(batch, action_mask=wrong)
    for broken in (
        {"box": np.zeros((2, 3))},
        np.zeros(7),
        {**observation, "box": np.zeros((3, 3), np.float32)},
    ):
        with pytest.raises(hvdqn.UserError, match="does not fit"):
            policy.act(broken)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Uneven", {}), ("Masked", {}), ("Matrix", {}), ("Binary", {}), ("Box", {"action_bins": 3})],
)
def test_a_policy_acts_in_several_dimensions(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    env_id = f"tests.unit.action_envs:Additive{name}-v0"
    result = hvdqn.train(env=env_id, run_dir=tmp_path / "run", hidden=(16,), **SMALL, **settings)
    policy, env = result.policy(), gym.make(env_id)
    observation, info = env.reset(seed=0)
    batch = policy.act(np.arange(4), action_mask=info.get("action_mask"))
    assert batch.shape == (4, *env.action_space.shape)
    for _ in range(10):  # the environment refuses actions outside of its space, and illegal ones
        assert policy.q_values(observation).shape == (*policy.spaces.action_shape, policy.spaces.num_actions)
        action = policy.act(observation, info.get("action_mask"))
        np.testing.assert_array_equal(action, batch[observation])
        observation, _, _, _, info = env.step(action)
    policy.save(tmp_path / "policy.safetensors")
    again = hvdqn.load(tmp_path / "policy.safetensors")
    np.testing.assert_array_equal(again.act(np.arange(4), action_mask=info.get("action_mask")), batch)


@pytest.mark.parametrize("source", ["info", "method", "observation"])
def test_a_policy_keeps_to_masks(source: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"env": "tests.unit.masked_envs:Strict-v0", "env_kwargs": {"source": source}}
    policy = hvdqn.train(run_dir=tmp_path / "run", hidden=(16,), **SMALL, **settings).policy()
    env = Strict(source)
    observation, info = env.reset(seed=0)
    for _ in range(30):  # the environment raises on an illegal action
        mask = env.action_masks() if source == "method" else info.get("action_mask")
        observation, _, terminated, truncated, info = env.step(policy.act(observation, mask))
        if terminated or truncated:
            observation, info = env.reset()


def test_policy_files_without_an_action_space_have_discrete_actions(
    rich: tuple[hvdqn.Result, Recording], tmp_path: Path
) -> None:
    part = read_part(rich[0].checkpoint / "policy.safetensors")
    for name in ("action_shape", "action_space"):
        del part["policy"]["spaces"][name]
    write_part(tmp_path / "old.safetensors", part)
    batch = make_batch(1)
    expected = rich[0].policy().act(batch)
    assert hvdqn.load(tmp_path / "old.safetensors").act(batch).tolist() == expected.tolist()


def test_a_policy_file_is_a_state_dict_for_other_programs(rich: tuple[hvdqn.Result, Recording]) -> None:
    result, _ = rich
    path = result.checkpoint / "policy.safetensors"
    policy = result.policy()
    state = safetensors.torch.load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: tuple(tensor.shape) for name, tensor in policy.network.named_parameters()
    }
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["data"])["policy"]
    assert about["env_steps"] == 600
    assert about["config"]["env"] == "tests.unit.library_envs:Rich"
    assert about["spaces"]["num_actions"] == 3


def test_spaces_survive_their_description() -> None:
    data = json.loads(json.dumps(describe_space(Rich.observation_space)))
    again = make_space(data)
    assert describe_space(again) == data
    sample = Rich.observation_space.sample()
    np.testing.assert_array_equal(
        gym.spaces.flatten(again, sample), gym.spaces.flatten(Rich.observation_space, sample)
    )


def test_a_factory_with_arguments_works_in_worker_processes_and_is_resumed_by_its_name(
    tmp_path: Path,
) -> None:
    factory = partial(make_cartpole, length=5)
    result = hvdqn.train(env=factory, vectorization="async", envs_per_rank=2, run_dir=tmp_path, **SMALL)
    assert set(result.returns) == {5.0}
    more = {**SMALL, "total_env_steps": 700}
    assert train.main(["--run-dir", str(tmp_path), "--total-env-steps", "650"]) == 0
    again = hvdqn.train(preset_config("smoke").replace(eval_episodes=1), env=factory, run_dir=tmp_path,
                        vectorization="async", envs_per_rank=2, total_env_steps=more["total_env_steps"])  # fmt: skip
    assert again.summary["env_steps"] == 700


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"env": lambda: make_cartpole()}, "cannot find by name"),
        ({"env": partial(make_cartpole, length=object())}, "are not JSON"),
        ({"learning_rate": 1e-3}, "did you mean 'lr'"),
        ({"lr": "much"}, "must be a number"),
        ({"gamma": 1.5}, "--gamma is 1.5"),
        ({"config": preset_config("smoke"), "preset": "smoke"}, "leave one of them out"),
        ({"env": "CartPoll-v1"}, "unknown environment"),
        ({"callbacks": [print]}, "derive it from hvdqn.Callback"),
        ({"callback": ["tests.unit.library_envs:NOT_A_CALLBACK"]}, "is a dict; derive it"),
        ({"callback": ["tests.unit.library_envs:missing"]}, "has no 'missing'"),
        ({"init_torso_only": True}, "needs --init-from"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),  # processes must agree on names
)
def test_wrong_use_raises_one_line(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(hvdqn.UserError) as raised:
        hvdqn.train(**{"run_dir": tmp_path / "run", "total_env_steps": 2000, **arguments})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_callback_stops_the_run_and_is_named_on_the_command_line(tmp_path: Path) -> None:
    argv = [
        "--preset",
        "smoke",
        "--callback",
        "tests.unit.library_envs:StopsEarly",
        "--run-dir",
        str(tmp_path),
    ]
    assert train.main(argv) == 0  # not 75: nobody has to start it again
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped_by"] == "callback"
    assert 800 <= summary["env_steps"] < 1000
    resumed = hvdqn.train(preset="smoke", run_dir=tmp_path, total_env_steps=1000, eval_episodes=1)
    assert resumed.summary["env_steps"] == 1000


def test_exceptions_of_environments_and_callbacks_are_raised(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the simulator broke"):
        hvdqn.train(env=partial(Rich, fails_after=20), run_dir=tmp_path / "env", **SMALL)
    with pytest.raises(ArithmeticError, match="a bug in a callback"):
        hvdqn.train(callbacks=[Fails()], run_dir=tmp_path / "callback", **SMALL)


@pytest.mark.parametrize("signals", [False, True])
def test_signals_are_left_alone_unless_asked_for(signals: bool, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    during = []

    class Looks(hvdqn.Callback):
        def on_log(self, run, values):
            during.append(signal.getsignal(signal.SIGTERM) is before)

    hvdqn.train(callbacks=[Looks()], signals=signals, run_dir=tmp_path, **SMALL)
    assert set(during) == {not signals}
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_works_in_a_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(
        target=lambda: results.append(hvdqn.train(run_dir=tmp_path, **SMALL)), daemon=True
    )
    thread.start()
    thread.join(120)
    assert results[0].summary["env_steps"] == 600


def test_a_policy_with_a_torso_of_its_own_needs_trust(tmp_path: Path) -> None:
    result = hvdqn.train(torso="tests.unit.library_envs:Flat", run_dir=tmp_path, **SMALL)
    with pytest.raises(hvdqn.UserError, match="names code that would be imported: --torso") as raised:
        hvdqn.load(tmp_path)
    assert "trust=True" in str(raised.value)
    observation = np.zeros(4, np.float32)
    assert hvdqn.load(tmp_path, trust=True).act(observation) == result.policy().act(observation)


def test_the_environment_of_a_policy_is_not_imported(
    rich: tuple[hvdqn.Result, Recording], tmp_path: Path
) -> None:
    code = "import hvdqn, sys; hvdqn.load(sys.argv[1]); sys.exit('tests.unit.library_envs' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(rich[0].run_dir)],
        env=clean_environment(),
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0
    assert library_envs.Rich is Rich
    assert StopsEarly is not Rich
