"""Environments that break a rule of Gymnasium are refused in one line, and those that keep it oddly are played."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvdqn import __main__, train
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, EnvironmentConfig
from hvdqn.envs import Environments, make_environments
from hvdqn.envs.contract import warn_once
from hvdqn.errors import UserError
from hvdqn.evaluate import Evaluator
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import network_for
from tests.launchers import clean_environment
from tests.unit import broken_envs

HERE = "tests.unit.broken_envs"


def make(name: str, envs: int = 2, **settings: Any) -> Environments:
    kwargs = settings.pop("kwargs", {})
    config = EnvironmentConfig(env=f"{HERE}:Broken{name}-v0", env_kwargs=json.dumps(kwargs), **settings)
    return make_environments(config, envs, seed=1, training=True)


def play(environments: Environments, steps: int = 6) -> Iterator[np.ndarray]:
    """Reset, step, and yield the rewards."""
    environments.reset()
    for _ in range(steps):
        yield environments.step(np.zeros(environments.num_envs, np.int64)).reward


BROKEN = {
    "OldReset": r"OldReset\.reset\(\) takes no 'seed'; write reset\(self, \*, seed=None, options=None\)",
    "NoOptions": r"NoOptions\.reset\(\) takes no 'options'",
    "OnlyObservation": r"OnlyObservation\.reset\(\) returned a ndarray of shape \(2,\); .* \(observation, info\)",
    "OldStep": r"OldStep\.step\(\) returned a tuple of 4 values, as Gym did before 0\.26; .* truncated, info\)",
    "NoInfo": r"NoInfo\.step\(\) returned an info that is a NoneType; it must be a dict",
    "ThreeFlags": r"ThreeFlags\.step\(\) returned 3 values as terminated; it must be True or False",
    "WrongShape": r"WrongShape\.reset\(\) returned an observation of shape \(2, 1\), .* needs \(2,\)",
    "WrongShapeInStep": r"WrongShapeInStep\.step\(\) returned an observation of shape \(3,\), .* needs \(2,\)",
    "Ragged": r"Ragged\.reset\(\) returned an observation of",
    "WrongDtype": r"WrongDtype\.reset\(\) returned an observation of dtype float32, .* has uint8",
    "MissingKey": r"MissingKey\.reset\(\) .* does not fit its observation_space \(KeyError: 'b'\)",
    "OutOfDiscrete": r"OutOfDiscrete\.reset\(\) .* does not fit its observation_space \(IndexError",
    "Nothing": r"observes Dict\(\), which holds no number",
    "NoSpace": r"has no observation_space: NoSpace\.observation_space is a NoneType",
    "NoEnvironment": r"is no environment of Gymnasium: .* must inherit from the gymnasium.Env class",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_rule_that_an_environment_breaks_is_named(name: str) -> None:
    with (
        pytest.raises(UserError, match=f"^'{HERE}:Broken{name}-v0' .*{BROKEN[name]}") as raised,
        closing(make(name)) as environments,
    ):
        list(play(environments))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["OldReset", "OldStep", "WrongShape"])
def test_workers_name_the_rule_without_a_traceback(name: str, recwarn: pytest.WarningsRecorder) -> None:
    with (
        pytest.raises(UserError, match=BROKEN[name]),
        closing(make(name, vectorization="async")) as environments,
    ):
        list(play(environments))
    assert not [warning for warning in recwarn if "Traceback" in str(warning.message)]


def test_the_wrapper_that_breaks_a_rule_is_named() -> None:
    with (
        pytest.raises(UserError, match=r"OldWrapper\.step\(\) returned a tuple of 4 values"),
        closing(make("Plain", wrapper=(f"{HERE}:OldWrapper",))) as environments,
    ):
        list(play(environments))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("observation", r"OwnVector\.reset\(\) returned an observation of shape \(2, 3\), .* needs \(2, 2\)"),
        ("step", r"OwnVector\.step\(\) returned a tuple of 4 values"),
        ("reward", r"OwnVector\.step\(\) returned a reward of shape \(2, 1\)"),
        ("final", r"resets in the step that ends an episode, and its infos have no 'final_obs'"),
    ],
)
def test_the_rule_that_a_vector_environment_breaks_is_named(fault: str, message: str) -> None:
    with (
        pytest.raises(UserError, match=message),
        closing(make("OwnVector", kwargs={"fault": fault})) as environments,
    ):
        list(play(environments))


def test_checked_environments_are_as_they_were() -> None:
    """Nothing of the checks stays behind, and state can be saved before the first step."""
    with closing(make("Plain")) as environments:
        environments.reset()
        assert environments._save() is not None
        list(play(environments))
        for env in environments._vector.envs:  # type: ignore[attr-defined]
            while env is not None:
                assert not {"reset", "step"} & vars(env).keys()
                env = vars(env).get("env")


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("kind", "rewards"), [("single", [1.5] * 4), ("numbers", [1, 1, 1, 2]), ("odd", [1.5] * 4)]
)
def test_a_reward_may_be_anything_that_holds_one_number(
    kind: str, rewards: list[float], vectorization: str
) -> None:
    with closing(make("Rewarding", vectorization=vectorization, kwargs={"rewards": kind})) as environments:
        found = list(play(environments, 4))
    np.testing.assert_array_equal(found, np.array([rewards, rewards]).T)


@pytest.mark.parametrize("kind", ["two", "none", "empty", "complex", "late"])
def test_a_reward_that_is_not_one_number_is_refused(kind: str) -> None:
    with (
        pytest.raises(UserError, match=r"gives a reward that is .*; it must be one number"),
        closing(make("Rewarding", kwargs={"rewards": kind})) as environments,
    ):
        list(play(environments))


@pytest.mark.parametrize(
    ("name", "kwargs"), [("OldReset", {}), ("OldStep", {}), ("Rewarding", {"rewards": "late"})]
)
def test_training_refuses_a_broken_environment_in_one_line(
    name: str, kwargs: dict[str, str], tmp_path: Path
) -> None:
    """Also a rule that is broken after the start, when other ranks are training."""
    flags = ["--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--env", f"{HERE}:Broken{name}-v0"]
    done = subprocess.run(
        [sys.executable, "-m", "hvdqn.train", *flags, "--env-kwargs", json.dumps(kwargs)],
        capture_output=True,
        text=True,
        timeout=100,
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"hvdqn: error: '{HERE}:Broken{name}-v0'")
    assert done.stderr.count("\n") == 1


def test_a_program_that_trains_a_broken_environment_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(tmp_path, "Rewarding", rewards="late")) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- Generators that a process shares -------------------------------------------------------------------------------


def starts(environments: Environments, resets: int = 3) -> np.ndarray:
    """Return the first observations of several episodes, `[resets, envs, 2]`."""
    return np.array([environments.reset().copy() for _ in range(resets)])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_that_share_a_generator_draw_different_numbers(vectorization: str) -> None:
    with closing(make("Global", 3, vectorization=vectorization)) as environments:
        drawn = starts(environments)
    assert len(np.unique(drawn[..., 0])) == len(np.unique(drawn[..., 1])) == 9
    with closing(make("Global", 3, vectorization=vectorization)) as environments:
        np.testing.assert_array_equal(starts(environments), drawn, err_msg="the seed is the same")


def test_an_evaluation_does_not_repeat_what_training_draws() -> None:
    """It plays the same episodes each time, and training goes on with its own numbers."""
    config = Config().replace(
        env=f"{HERE}:BrokenGlobal-v0", eval_episodes=2, seed=3, vectorization="sync", hidden=(4,)
    )
    with closing(make("Global")) as alone:
        expected = starts(alone, 6)
    with closing(make("Global")) as environments:
        drawn = [starts(environments)]
        evaluator = Evaluator(config, LocalComm(), torch.device("cpu"), PhaseTimer())
        evaluations = [evaluator.run(network_for(config, environments)) for _ in range(2)]
        drawn.append(np.array([environments.reset() for _ in range(3)]))
    np.testing.assert_array_equal(np.concatenate(drawn), expected)
    assert evaluations[0] == evaluations[1]


def test_the_test_of_exact_resume_leaves_shared_generators_alone() -> None:
    with closing(make("Global")) as environments:
        environments.reset()
        states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert environments.state() is None
        assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


# --- Warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Masked", {"vectorization": "sync"}),
        ("Masked", {"vectorization": "async"}),
        ("OwnVector", {"kwargs": {"fault": "mask"}}),
    ],
)
def test_an_action_mask_of_reset_alone_is_refused(name: str, settings: dict[str, Any]) -> None:
    with (
        closing(make(name, **settings)) as environments,
        pytest.raises(UserError, match=r"gives an action_mask with some observations and not with others"),
    ):
        list(play(environments))


# --- Environments that cannot be made twice, or closed --------------------------------------------------------------


def flags(tmp_path: Path, name: str, **kwargs: Any) -> list[str]:
    words = ["--preset", "smoke", "--total-env-steps", "300", "--eval-episodes", "2", "--envs-per-rank", "2"]
    words += [
        "--run-dir",
        str(tmp_path),
        "--env",
        f"{HERE}:Broken{name}-v0",
        "--env-kwargs",
        json.dumps(kwargs),
    ]
    return words


@pytest.mark.parametrize("ever", [False, True])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_simulator_of_which_a_process_may_hold_one(ever: bool, vectorization: str, tmp_path: Path) -> None:
    """It is trained, evaluated, resumed and played again, and is never built a second time while it is open."""
    words = [*flags(tmp_path, "Single", ever=ever), "--eval-every", "100", "--vectorization", vectorization]
    envs = ["--envs-per-rank", "1" if vectorization == "sync" else "2"]
    for more in ([], ["--total-env-steps", "400"]):
        done = in_a_process("hvdqn.train", [*words, *envs, *more])
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"built here: {int(vectorization == 'sync')}\n" in done.stdout
        assert done.stdout.count("the evaluation plays in those at hand") == (vectorization == "sync")
    assert "resumed from" in done.stdout
    assert (
        json.loads((tmp_path / "summary.json").read_text())["eval_return_mean"] == 12.0
    )  # raw, 4 steps of 3
    video = [] if ever else ["--video", str(tmp_path / "video.gif")]
    done = in_a_process("hvdqn.evaluate", [str(tmp_path), "--episodes", "20", "--trust", *video])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 episodes: mean 12.00, std 0.00" in done.stdout


IN_A_PROCESS = """
import importlib, sys
import tests.unit.broken_envs as envs
code = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
print("built here:", envs.Single.built)
sys.exit(code)
"""


def in_a_process(module: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IN_A_PROCESS, module, *words]
    env = clean_environment()
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, check=False)


def test_the_remedy_is_named_where_a_process_may_hold_one_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the first one is closed when there is no second one
        assert train.main(flags(tmp_path, "Single")) == 2
        error = capsys.readouterr().err
        assert "no second one (RuntimeError: a simulation is already running" in error
        assert error.count("\n") == 1
        assert "--vectorization async" in error


def test_an_evaluation_in_the_environments_of_training_has_raw_rewards() -> None:
    config = Config().replace(env=f"{HERE}:BrokenSingle-v0", eval_episodes=3)
    with closing(make("Single", 1, clip_rewards=True)) as training:
        training.reset()
        evaluator = Evaluator(config, LocalComm(), torch.device("cpu"), PhaseTimer(), others=training)
        evaluation = evaluator.run(network_for(config, training))
        assert evaluation is not None
        assert evaluation.returns == (12.0, 12.0, 12.0)
        assert evaluator.borrowed
        training.reset(seed=2)
        assert training.step(np.zeros(1, np.int64)).reward == [1.0]


def test_training_goes_on_with_other_seeds_after_an_evaluation_in_its_environments(tmp_path: Path) -> None:
    broken_envs.Single.seeds.clear()
    words = [*flags(tmp_path, "Single"), "--envs-per-rank", "1", "--eval-every", "100"]
    assert train.main(words) == 0
    trained, played = broken_envs.Single.seeds[::2], broken_envs.Single.seeds[1::2]
    assert len(played) == 3
    assert len(set(played)) == 1
    assert len(set(trained + played)) == len(trained) + 1


def test_an_exception_in_the_test_of_exact_resume_means_that_it_is_not_exact() -> None:
    with closing(make("Single", 1)) as environments:
        environments.reset()
        assert environments.state() is None
        assert environments.step(np.zeros(1, np.int64)).reward == [3.0]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("leaves", [False, True])
def test_an_environment_that_cannot_be_closed_does_not_lose_the_run(
    vectorization: str, leaves: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_once.cache_clear()
    words = [*flags(tmp_path, "RaisesInClose", leaves=leaves), "--vectorization", vectorization]
    assert train.main(words) == 0
    assert (tmp_path / "summary.json").exists()
    out = capsys.readouterr().out
    assert out.count("BrokenRaisesInClose-v0' could not be closed") == 1
    assert not multiprocessing.active_children()


# --- Environments that change what the whole process shares ---------------------------------------------------------


@pytest.mark.parametrize("what", broken_envs.CHANGES)
def test_settings_of_the_process_are_put_back(what: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with closing(make("Changes", kwargs={"what": what})) as environments:
        assert what in caplog.text
        assert "--vectorization async" in caplog.text
        list(play(environments))
        # What would differ, or fail, with any of the settings.
        assert torch.ones(1, requires_grad=True).mul(2.0).requires_grad
        assert (torch.ones(1).dtype, torch.ones(1).device) == (torch.float32, torch.device("cpu"))
        assert sys.getrecursionlimit() > 300


def test_workers_may_change_what_their_process_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(tmp_path, "Changes", what="default device"), "--vectorization", "async"]
    assert train.main(words) == 0
    assert "has changed" not in capsys.readouterr().out


def test_a_closed_standard_output_is_opened_again(tmp_path: Path) -> None:
    done = in_a_process("hvdqn.train", flags(tmp_path, "ClosesOutput"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("the environment has closed sys.stdout, which is opened again") == 1
    assert done.stdout.count("run directory: ") == 2


def test_numbers_that_float32_does_not_hold_are_refused() -> None:
    with (
        pytest.raises(UserError, match=r"Large\.reset\(\) .* up to 1e\+300; .* float32"),
        closing(make("Large")) as envs,
    ):
        envs.reset()


@pytest.mark.parametrize("dtype", ["longdouble", "float16", "bool", "int64", "uint8"])
def test_observations_may_have_any_dtype_of_numbers(dtype: str) -> None:
    with closing(make("Typed", kwargs={"dtype": dtype})) as envs:
        assert len(list(play(envs))) == 6


# --- Environments that change the current folder --------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder of a test whose environments work below another one; `~` is a third."""
    for name in ("start", "simulators", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "start")
    monkeypatch.setenv("SIMULATOR_FOLDERS", str(tmp_path / "simulators"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(train, "command", train.main)  # the command would keep the process of the tests
    return tmp_path / "start"


RUN = ["--preset", "smoke", "--total-env-steps", "300", "--eval-episodes", "2", "--envs-per-rank", "2"]
RUN += ["--env", f"{HERE}:BrokenChangesFolder-v0"]


@pytest.mark.parametrize(
    ("flags", "found"),
    [(["--run-dir", "runs/x"], "start/runs/x"), ([], "start/runs/*"), (["--run-dir=~/runs"], "home/runs")],
)
def test_paths_are_those_of_the_start(flags: list[str], found: str, folders: Path) -> None:
    """Records, resume, evaluation and video lie where the user named them."""
    top = folders.parent
    assert __main__.main(["train", *RUN, *flags]) == 0
    (run_dir,) = top.glob(found)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints/latest/manifest.json"):
        assert (run_dir / name).exists(), name
    os.chdir(folders)
    given = flags[-1].removeprefix("--run-dir=") if flags else str(run_dir.relative_to(folders))
    video = ["--video", "video.gif"] if find_spec("imageio_ffmpeg") else []
    assert __main__.main(["eval", given, "--trust", "--episodes", "1", *video]) == 0
    assert (folders / "video.gif").exists() == bool(video)
    os.chdir(folders)
    words = ["--config", f"{given}/config.yaml", "--run-dir", given, "--total-env-steps", "400"]
    assert __main__.main(["train", *words]) == 0
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] == 400
    assert not [path for path in (top / "simulators").rglob("*") if path.is_file()]
    assert not (folders / "~").exists()


def test_modules_in_the_folder_of_the_start_are_found_after_the_folder_has_changed(folders: Path) -> None:
    (folders / "late_wrapper_of_a_test.py").write_text("def same(env):\n    return env\n")
    words = ["--run-dir", "run", "--wrapper", "late_wrapper_of_a_test:same"]
    assert __main__.main(["train", *RUN, *words]) == 0


def test_plot_knows_the_home_folder(folders: Path) -> None:
    pytest.importorskip("matplotlib")
    assert __main__.main(["train", *RUN, "--run-dir", "~/run"]) == 0
    assert __main__.main(["plot", "~/run", "-o", "~/curves.png"]) == 0
    assert (folders.parent / "home" / "curves.png").exists()
