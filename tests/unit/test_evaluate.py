"""Evaluation: the episodes of each environment and each rank; and the `hvdqn eval` command."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from threadpoolctl import ThreadpoolController, threadpool_limits

from hvdqn import __main__, evaluate, train
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config
from hvdqn.envs import make_environments
from hvdqn.errors import UserError
from hvdqn.evaluate import Evaluation, Evaluator
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import network_for
from hvdqn.seeds import eval_command_seed, rank_seeds

CPU = torch.device("cpu")


class Uneven(gym.Env[np.ndarray, int]):
    """Every second instance has episodes of 20 steps, the others of 1 step; the reward is 1."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)
    made = itertools.count()

    def __init__(self) -> None:
        self.length = 20 if next(self.made) % 2 == 0 else 1
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == self.length, False, {}


class Endless(Uneven):
    """The reward is 1; only action 1 ends the episode."""

    def step(self, action: int):
        return np.zeros(1, np.float32), 1.0, action == 1, False, {}


gym.register("Uneven-v0", Uneven)
gym.register("Endless-v0", Endless)


def evaluator(
    env: str, episodes: int, rank: int = 0, size: int = 1, epsilon: float = 0.0, seed: int = 3
) -> Evaluator:
    comm = LocalComm()
    comm.rank, comm.size = rank, size
    config = Config().replace(
        env=env, vectorization="sync", eval_episodes=episodes, eval_epsilon=epsilon, seed=seed
    )
    return Evaluator(config, comm, CPU, PhaseTimer())


def network(env: str, best_action: int = 0):
    """Return a network that always prefers one action."""
    config = Config().replace(env=env, hidden=(4,))
    envs = make_environments(config.environment, 1, 0, training=False)
    made = network_for(config, envs)
    envs.close()
    with torch.no_grad():
        last = made.head.streams[-1]
        last.weight.zero_()
        last.bias.zero_()
        last.bias[best_action] = 1.0
    return made


def test_short_episodes_are_not_favored():
    """Of 8 episodes over 8 envs, half must be long ones; taking the first 8 that end would be nearly all short."""
    returns = evaluator("Uneven-v0", 8).run(network("Uneven-v0")).returns
    assert sorted(returns) == [1.0] * 4 + [20.0] * 4


def test_more_episodes_than_environments_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_ENVS_PER_RANK", 2)
    evaluation = evaluator("Uneven-v0", 7).run(network("Uneven-v0"))
    assert len(evaluation.returns) == 7
    assert sorted([evaluation.returns.count(1.0), evaluation.returns.count(20.0)]) == [3, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("episodes", [1, 2, 7, 10, 100])
def test_the_shares_of_ranks_add_up(size, episodes):
    shares = [evaluator("Uneven-v0", episodes, rank, size).share for rank in range(size)]
    assert sum(shares) == episodes
    assert max(shares) - min(shares) <= 1


def test_a_rank_without_episodes_contributes_no_returns():
    idle = evaluator("Uneven-v0", 1, rank=1, size=2)
    assert idle.run(network("Uneven-v0")).returns == ()


def test_an_episode_without_an_end_counts_once(monkeypatch):
    monkeypatch.setattr(evaluate, "LONGEST_EPISODE_ENV_STEPS", 30)
    assert evaluator("Endless-v0", 3).run(network("Endless-v0")).returns == (30.0, 30.0, 30.0)
    assert evaluator("Endless-v0", 3).run(network("Endless-v0", best_action=1)).returns == (1.0, 1.0, 1.0)


def test_a_stop_request_ends_the_evaluation():
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    assert evaluator("Endless-v0", 3).run(network("Endless-v0"), stop) is None  # 27,000 steps were left
    assert len(asked) == 3


def test_finished_episodes_are_shown_during_an_evaluation():
    shown = []
    evaluator("Uneven-v0", 4).run(network("Uneven-v0"), show=shown.append)
    assert shown == [0, 2, 2, 4]  # two episodes of one step, two of 20; 8 steps at a time


def test_evaluations_of_one_run_play_the_same_episodes():
    plays = evaluator("CartPole-v1", 4, epsilon=0.3)
    made = network("CartPole-v1")
    first, second = plays.run(made), plays.run(made)
    assert first == second
    assert evaluator("CartPole-v1", 4, epsilon=0.3, seed=4).run(made) != first


def test_rewards_are_raw_where_training_clips_them():
    env = "tests.unit.scripted_envs:Scripted-v0"
    config = Config().replace(env=env, vectorization="sync", clip_rewards=True, eval_episodes=1)
    evaluation = Evaluator(config, LocalComm(), CPU, PhaseTimer()).run(network(env))
    assert evaluation.returns == (6.0,)  # 1 + 2 + 3


def test_the_text_of_an_evaluation():
    evaluation = Evaluation((1.0, 2.0, 3.0, 6.0))
    assert evaluation.mean == 3.0
    assert evaluation.std == pytest.approx(np.sqrt(3.5))
    assert str(evaluation) == "4 episodes: mean 3.00, std 1.87, min 1, max 6"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    argv = [
        "--preset",
        "smoke",
        "--total-env-steps",
        "400",
        "--eval-every",
        "200",
        "--checkpoint-every",
        "200",
    ]
    assert train.main([*argv, "--run-dir", str(path)]) == 0
    return path


def test_eval_plays_other_episodes_than_training_evaluated_on(run_dir, capsys):
    """`checkpoints/best` was chosen by its returns there: a score on the same episodes would be too good."""
    trained_on = rank_seeds(1, 0).evaluation
    assert eval_command_seed(1) != trained_on
    outputs = set()
    for place in (run_dir, run_dir / "checkpoints" / "latest", run_dir / "checkpoints" / f"{400:012d}"):
        capsys.readouterr()
        assert __main__.main(["eval", str(place), "--episodes", "4"]) == 0
        output = capsys.readouterr().out
        numbers = re.fullmatch(rf"{place}: 4 episodes: mean (.*), std (.*), min (.*), max (.*)\n", output)
        assert numbers is not None, output
        assert float(numbers[3]) <= float(numbers[1]) <= float(numbers[4])
        outputs.add(numbers.groups())
    assert len(outputs) == 1  # the same episodes each time
    assert outputs == {played(run_dir, "latest", eval_command_seed(1))}
    assert outputs != {played(run_dir, "latest", trained_on)}


def played(run_dir, name: str, seed: int | None) -> tuple[str, ...]:
    """Return what `hvdqn eval` would print of 4 episodes with this seed."""
    checkpoint = evaluate.find_checkpoint(run_dir / "checkpoints" / name)
    config = Config().replace(**checkpoint.manifest["config"])
    envs = make_environments(config.environment, 1, 0, training=False)
    made = evaluate.load_network(checkpoint, config, envs)
    envs.close()
    evaluation = Evaluator(config, LocalComm(), CPU, PhaseTimer(), seed=seed).run(made)
    return tuple(re.findall(r"(?:mean|std|min|max) ([\d.]+)", str(evaluation)))


def test_training_keeps_its_own_evaluation_episodes(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert played(run_dir, "latest", None)[0] == f"{summary['eval_return_mean']:.2f}"


def test_eval_shows_its_progress_apart_from_the_result(run_dir, capsys):
    assert __main__.main(["eval", str(run_dir), "--episodes", "4"]) == 0
    output = capsys.readouterr()
    assert output.err == "playing CartPole-v1: 0 of 4 episodes\n"
    assert output.out.count("\n") == 1


def test_eval_plays_checkpoints_that_text_files_name(run_dir, tmp_path, capsys):
    """File systems without symbolic links have such files."""
    copy = shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    for name in ("latest", "best"):
        link = copy / "checkpoints" / name
        target = link.readlink().name
        link.unlink()
        link.write_text(target + "\n")
    for place in (copy, copy / "checkpoints" / "best"):
        assert __main__.main(["eval", str(place), "--episodes", "2"]) == 0
        assert f"{place}: 2 episodes" in capsys.readouterr().out


def test_eval_ignores_the_launcher(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert __main__.main(["eval", str(run_dir), "--episodes", "2"]) == 0
    assert "2 episodes" in capsys.readouterr().out


def test_eval_plays_a_small_network_with_one_thread(run_dir):
    with threadpool_limits(2):  # restores the number of threads
        assert __main__.main(["eval", str(run_dir), "--episodes", "2"]) == 0
        blas = ThreadpoolController().select(user_api="blas").info()
        assert [library["num_threads"] for library in blas] == [1] * len(blas)


def test_returns_are_printed_before_a_video_fails(run_dir, capsys, monkeypatch, tmp_path):
    def cannot(*_):
        raise UserError("it cannot be drawn")

    monkeypatch.setattr(evaluate, "record", cannot)
    assert (
        __main__.main(["eval", str(run_dir), "--episodes", "2", "--video", str(tmp_path / "film.gif")]) == 2
    )
    output = capsys.readouterr()
    assert "2 episodes" in output.out
    assert "it cannot be drawn" in output.err


def test_eval_plays_the_best_weights(run_dir, capsys):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    best = max(row["eval_return_mean"] for row in rows if "eval_return_mean" in row)
    assert played(run_dir, "best", None)[0] == f"{best:.2f}"  # the weights that training found best
    assert __main__.main(["eval", str(run_dir / "checkpoints" / "best"), "--episodes", "4"]) == 0
    assert f"mean {played(run_dir, 'best', eval_command_seed(1))[0]}," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{tmp}/nowhere"], ["nowhere", "no checkpoint", "run directory"]),
        (["{tmp}"], ["no checkpoint", "run directory"]),
        (["{run}", "--episodes", "0"], ["--episodes is 0", "at least 1"]),
        (["{run}", "--epsilon", "3"], ["--epsilon is 3.0", "within [0, 1]"]),
        (["{run}", "--seed", "-1"], ["--seed is -1", "0 or more"]),
        (["{run}", "--episode", "3"], ["'--episode'", "--episodes"]),
        (["{broken}"], ["manifest.json", "another checkpoint"]),
        ([], ["PATH"]),
    ],
)
def test_wrong_input_is_one_line(argv, words, run_dir, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    places = {"tmp": tmp_path, "run": run_dir, "broken": broken}
    assert __main__.main(["eval", *(word.format(**places) for word in argv)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("hvdqn eval: error: ")
    assert output.count("\n") == 1
    for word in words:
        assert word in output


def test_eval_refuses_weights_of_another_network(run_dir, capsys, monkeypatch):
    """The user changed the torso after the run."""
    make = evaluate.network_for
    monkeypatch.setattr(evaluate, "network_for", lambda config, envs: make(config.replace(hidden=(7,)), envs))
    assert __main__.main(["eval", str(run_dir)]) == 2
    output = capsys.readouterr().err
    assert "and the network has [7, 4]; the torso or the environment has changed since" in output
    assert output.count("\n") == 1


def test_eval_refuses_altered_weights(run_dir, capsys):
    weights = run_dir / "checkpoints" / "best" / "policy.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert __main__.main(["eval", str(run_dir / "checkpoints" / "best")]) == 2
    assert "is not what was written" in capsys.readouterr().err


def test_eval_finds_the_newest_checkpoint_in_the_folder_of_checkpoints(run_dir, capsys):
    folder = run_dir / "checkpoints"
    assert __main__.main(["eval", str(folder), "--episodes", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: 1 episodes: mean ")


def test_eval_prints_json(run_dir, capsys):
    words = ["eval", str(run_dir), "--episodes", "3", "--epsilon", "0.5", "--seed", "9", "--json"]
    assert __main__.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    result = json.loads(said)
    assert (result["env"], result["env_steps"]) == ("CartPole-v1", 400)
    assert (result["seed"], result["epsilon"], result["episodes"]) == (9, 0.5, 3)
    returns = result["returns"]
    assert len(returns) == 3
    assert (result["min"], result["max"]) == (min(returns), max(returns))
    assert (result["mean"], result["std"]) == (
        pytest.approx(np.mean(returns)),
        pytest.approx(np.std(returns)),
    )


def test_json_has_no_number_that_json_has_not():
    assert [evaluate.finite(value) for value in (1.5, float("nan"), float("-inf"))] == [1.5, None, None]
