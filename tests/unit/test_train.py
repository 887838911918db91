"""Whole runs in one process: their files, their reproducibility, and third-party environments."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import yaml

from hvdqn import __main__, startup, train
from hvdqn.checkpoint import Checkpoints, open_checkpoint
from hvdqn.comm.local import LocalComm
from hvdqn.evaluate import Evaluation, Evaluator
from hvdqn.metrics import Metrics
from hvdqn.rank import Parts
from hvdqn.run_directory import sole_job
from hvdqn.trainer import Trainer
from tests.launchers import clean_environment

SMALL = ["--preset", "smoke", "--total-env-steps", "600", "--eval-episodes", "2"]
SUMMARY = {
    "env", "preset", "world_size", "comm", "sync", "env_steps", "updates", "wall_seconds", "env_steps_per_second",
    "updates_per_second", "eval_return_mean", "eval_return_std", "eval_episodes", "param_sha256", "stopped_by",
    "seconds",
}  # fmt: skip
PHASES = {"act", "env", "add", "sample", "compute", "comm", "optimizer", "save", "other"}
THIRD_PARTY = "popgym:popgym-AutoencodeEasy-v0"


def run(run_dir: Path, *argv: str) -> dict[str, Any]:
    """Train in this process; return the summary."""
    assert train.main([*SMALL, "--run-dir", str(run_dir), *argv]) == 0
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("first")
    return run_dir, run(run_dir)


def test_the_summary_holds_what_scripts_rely_on(first: tuple[Path, dict[str, Any]]) -> None:
    _, summary = first
    assert summary.keys() >= SUMMARY
    assert summary["seconds"].keys() >= PHASES
    assert sum(summary["seconds"].values()) == pytest.approx(summary["wall_seconds"])
    assert (summary["env"], summary["preset"], summary["comm"]) == ("CartPole-v1", "smoke", "local")
    assert (summary["world_size"], summary["sync"], summary["stopped_by"]) == (1, "gradients", "finished")
    assert summary["env_steps"] == 600
    assert summary["updates"] == (600 - 8 - 200) * 8 // 32  # none is owed for the last iteration's steps
    assert summary["eval_episodes"] == 2
    assert re.fullmatch(r"[0-9a-f]{64}", summary["param_sha256"])


def test_the_run_directory_holds_the_record(first: tuple[Path, dict[str, Any]]) -> None:
    run_dir, summary = first
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["env_steps"] for row in rows]
    assert steps == sorted(steps)
    assert {200, 400, 600} <= set(steps)
    assert any("loss" in row for row in rows)
    assert rows[-1]["eval_return_mean"] == summary["eval_return_mean"]
    assert list(run_dir.rglob("events.out.tfevents.*"))
    latest = run_dir / "checkpoints" / "latest"
    assert latest.resolve().name == f"{600:012d}"
    assert open_checkpoint(latest).env_steps == 600
    assert not list(run_dir.rglob(".*")), "a temporary file was left"
    assert not list((run_dir / "heartbeats").glob("*")), "a heartbeat was left"


def test_config_yaml_repeats_the_run(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run_dir, summary = first
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert settings["total_env_steps"] == 600
    argv = ["--config", str(run_dir / "config.yaml"), "--run-dir", str(tmp_path)]
    assert train.main(argv) == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    for name in ("param_sha256", "eval_return_mean", "updates"):
        assert again[name] == summary[name]


def test_a_finished_run_that_is_started_again_says_so_and_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run(tmp_path)
    assert "env steps: raise" not in capsys.readouterr().out
    again = run(tmp_path)
    assert "this run has had its 600 env steps: raise --total-env-steps" in capsys.readouterr().out
    for name in ("param_sha256", "eval_return_mean", "updates"):
        assert again[name] == finished[name]
    before = (tmp_path / "config.yaml").read_bytes()
    assert train.main([*SMALL, "--run-dir", str(tmp_path), "--seed", "2"]) == 2
    assert "was begun with --seed 1, not 2" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_setting_that_does_nothing_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--sync-every", "7")
    warning = "warning: --sync-every does nothing without --sync parameters\n"
    assert capsys.readouterr().out.count(warning) == 1


def test_records_of_a_run_without_checkpoints_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever deletes checkpoints to save space may not know that a run then begins anew."""
    run(tmp_path)
    before = {
        name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "config.yaml")
    }
    for number in ("", "2"):
        shutil.rmtree(tmp_path / "checkpoints")
        capsys.readouterr()
        run(tmp_path, "--env", "Acrobot-v1", "--gamma", f"0.9{number}")
        assert (
            f"records until now are in metrics.jsonl.old{number} and summary.json.old{number}"
            in capsys.readouterr().out
        )
    for name, content in before.items():
        assert (tmp_path / f"{name}.old").read_bytes() == content
        assert (tmp_path / name).read_bytes() != content


def test_the_command_finds_what_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m hvdqn.train` does, whose runs `hvdqn eval` is then to play."""
    (tmp_path / "wrapper_of_mine.py").write_text("def same(env):\n    return env\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [*SMALL, "--wrapper", "wrapper_of_mine:same", "--run-dir", "run"]
    assert __main__.main(["train", *words]) == 0
    assert __main__.main(["eval", "run", "--episodes", "1", "--trust"]) == 0


def test_a_config_file_in_the_run_directory_is_not_lost(tmp_path: Path) -> None:
    mine = tmp_path / "config.yaml"
    mine.write_text("gamma: 0.9  # as in the paper\n")
    run(tmp_path, "--config", str(mine))
    assert (tmp_path / "config.yaml.old").read_text() == "gamma: 0.9  # as in the paper\n"
    assert "gamma: 0.9\n" in mine.read_text()


def test_settings_that_come_after_the_end_are_not_recorded(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    run(tmp_path, "--gamma", "0.5")
    assert (tmp_path / "config.yaml").read_text() == before


def test_the_best_weights_are_written_at_the_next_evaluation_as_good_where_a_disk_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, attempts = Checkpoints.save, []

    def fails_at_first(self: Checkpoints, env_steps: int, *rest: Any) -> str:
        best = rest[-1]
        attempts.extend([env_steps] * best)
        return "rank 0: no space left" if best and len(attempts) == 1 else save(self, env_steps, *rest)

    monkeypatch.setattr(Checkpoints, "save", fails_at_first)
    # A network that stays as it is plays as well each time.
    monkeypatch.setattr(Evaluator, "run", lambda *_: Evaluation((5.0,)))
    summary = run(tmp_path, "--eval-every", "200")
    assert len(attempts) == 2
    assert summary["failed_checkpoints"] == 1
    kept = open_checkpoint(tmp_path / "checkpoints" / "best")
    assert (kept.env_steps, kept.read("policy")["policy"]["eval_return_mean"]) == (attempts[1], 5.0)


def test_a_second_job_in_one_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "sole_job", partial(sole_job, patience_seconds=0.0))
    with sole_job(tmp_path, LocalComm()):
        assert train.main([*SMALL, "--run-dir", str(tmp_path)]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert "another job trains in" in capsys.readouterr().err


def test_the_same_seed_ends_with_the_same_parameters(
    first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, overlapped = first
    assert run(tmp_path / "again")["param_sha256"] == overlapped["param_sha256"]
    in_turn = run(tmp_path / "in turn", "--no-overlap")
    assert run(tmp_path / "in turn again", "--no-overlap")["param_sha256"] == in_turn["param_sha256"]
    assert in_turn["param_sha256"] != overlapped["param_sha256"]  # acting one update later is another run
    assert run(tmp_path / "other", "--seed", "2")["param_sha256"] != overlapped["param_sha256"]


@pytest.mark.parametrize(
    "flags", [("--replay", "prioritized"), ("--env", "ALE/Pong-v5", "--frame-stack", "4")]
)
def test_what_is_learned_while_environments_are_busy_is_the_same(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a GPU: the same bits, with two updates per iteration of which the last overlaps the environments."""
    words = (
        "--replay-ratio",
        "8",
        "--batch-per-rank",
        "16",
        "--envs-per-rank",
        "4",
        "--hidden",
        "16",
        *flags,
    )
    after = run(tmp_path / "after", *words)
    build = startup.build_parts

    def build_parts_as_on_a_gpu(*args: Any) -> Parts:
        return replace(build(*args), overlap="update")

    monkeypatch.setattr(startup, "build_parts", build_parts_as_on_a_gpu)
    beside = run(tmp_path / "beside", *words)
    assert beside["updates"] == after["updates"] > 0
    assert beside["param_sha256"] == after["param_sha256"]


def test_it_says_what_runs_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    said = capsys.readouterr().out
    assert said.count("comm local") == 1
    assert "1 rank, comm local (no launcher started this process)" in said
    assert "native vector" in said
    assert "env steps 600/600" in said
    assert re.search(r"2 episodes: mean [\d.]+, std [\d.]+, min [\d.]+, max [\d.]+", said)
    assert f"run directory: {tmp_path}   checkpoint: " in said


@pytest.mark.parametrize("flags", [(), ("--sync", "parameters", "--outer-momentum", "0.9", "--torso", "mlp")])
def test_the_header_names_device_and_run_directory_in_lines_that_fit(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapper = [word for _ in range(4) for word in ("--wrapper", "tests.unit.scripted_envs:doubled")]
    run(tmp_path, "--device", "cpu", *wrapper, *flags)
    lines = capsys.readouterr().out.splitlines()
    end = lines.index(f"run directory: {tmp_path}")
    header = lines[:end]
    assert any(line.endswith("device cpu") for line in header)
    assert max(map(len, header)) <= 100
    assert any(line.startswith("  ") for line in header), "a long line goes on in the next one"
    words = " ".join(" ".join(header).split())
    assert words.count("wrapped by tests.unit.scripted_envs:doubled") == 4


def test_progress_is_shown_by_time_and_not_only_with_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = ("--log-every", "600", "--eval-every", "0")
    run(tmp_path / "slow lines", *rare)
    shown = re.findall(r"^env steps (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["0/600", "600/600"]
    monkeypatch.setitem(Metrics.__init__.__kwdefaults__, "line_every_seconds", 0.0)
    run(tmp_path / "fast lines", *rare)
    output = capsys.readouterr().out
    shown = re.findall(r"^env steps (\S+)/600 .* left \S+$", output, re.MULTILINE)
    assert [*dict.fromkeys(shown)] == [str(env_steps) for env_steps in range(0, 601, 8)]
    assert re.search("^env steps 600/600 .*  evaluation: 0 of 2 episodes$", output, re.MULTILINE)
    assert re.search("^env steps 600/600 .*  saving a checkpoint$", output, re.MULTILINE)
    rows = (tmp_path / "fast lines" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2, "a record of training and one of the evaluation"


def test_odd_sizes_take_the_updates_they_owe(tmp_path: Path) -> None:
    flags = ("--replay-ratio", "3.7", "--batch-per-rank", "7", "--envs-per-rank", "3", "--n-step", "3")
    summary = run(tmp_path, *flags, "--learning-starts", "50")
    assert summary["env_steps"] == 600
    assert summary["updates"] == int((597 - 50) * 3.7 / 7)


def with_hidden_state(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """A third party's wrapper that makes its observations a Dict of a Tuple and another Tuple."""
    from popgym.core.observability import Observability
    from popgym.wrappers import Markovian

    return Markovian(env, Observability.FULL_AND_PARTIAL)


def test_an_environment_nobody_here_wrote_trains_by_its_id_alone(tmp_path: Path) -> None:
    """From the package index, in a fresh process that knows nothing of it: Tuple observations."""
    need_third_party()
    argv = [
        "--preset",
        "smoke",
        "--env",
        THIRD_PARTY,
        "--total-env-steps",
        "2000",
        "--run-dir",
        str(tmp_path),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "hvdqn.train", *argv],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["env"], summary["env_steps"], summary["eval_episodes"]) == (THIRD_PARTY, 2000, 4)
    assert summary["updates"] > 400


def test_an_environment_nobody_here_wrote_trains_with_dict_observations(tmp_path: Path) -> None:
    need_third_party()
    wrapper = "tests.unit.test_train:with_hidden_state"
    summary = run(tmp_path / "run", "--env", THIRD_PARTY, "--wrapper", wrapper, "--total-env-steps", "2000")
    assert summary["updates"] > 400
    # Its cards are arrays of text, and still the run can be resumed exactly.
    rank = open_checkpoint(tmp_path / "run" / "checkpoints" / "latest").read("rank-00000")
    assert rank["actor"]["environments"] is not None


def need_third_party() -> None:
    if find_spec("popgym") is None:
        pytest.skip("popgym is not installed (the extra `test`): third-party environments are NOT tested")


def test_denormals_are_zero_during_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, iterate, products = torch.tensor([1e-38]), Trainer.iterate, []

    def iterate_and_multiply(trainer: Trainer) -> None:
        products.append((small * 0.01).item())
        iterate(trainer)

    monkeypatch.setattr(Trainer, "iterate", iterate_and_multiply)
    run(tmp_path)
    assert set(products) == {0.0}
    assert (small * 0.01).item() > 0


def test_a_resume_compares_the_arguments_of_the_environment_by_their_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--env-kwargs", '{"sutton_barto_reward": true}')
    capsys.readouterr()
    run(tmp_path, "--env-kwargs", '{ "sutton_barto_reward" : true }', "--total-env-steps", "700")
    said = capsys.readouterr().out
    assert "at env step 600" in said
    assert "--env-kwargs" not in said
    words = ["--env-kwargs", '{"sutton_barto_reward": false}']
    assert train.main([*SMALL, "--run-dir", str(tmp_path), *words]) == 2
    assert "was begun with --env-kwargs {" in capsys.readouterr().err


def test_a_run_directory_alone_resumes_with_the_settings_of_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--lr", "0.01", "--dueling", "--seed", "5", "--log-every", "100")
    capsys.readouterr()
    assert train.main(["--run-dir", str(tmp_path), "--total-env-steps", "700"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"those of {tmp_path / 'config.yaml'}\n") == 1
    assert "--total-env-steps was 600, is 700" in said
    assert said.count(" was ") == 1, "another setting than the one that was given has changed"
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (settings["preset"], settings["lr"], settings["dueling"]) == ("smoke", 0.01, True)
    assert (settings["seed"], settings["log_every"], settings["total_env_steps"]) == (5, 100, 700)
    assert train.main(["--run-dir", str(tmp_path), "--no-dueling"]) == 2
    assert "was begun with --dueling True, not False" in capsys.readouterr().err


def test_no_evaluation_with_zero_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(tmp_path, "--eval-episodes", "0", "--eval-every", "300")
    assert (summary["eval_return_mean"], summary["eval_episodes"]) == (None, None)
    assert "evaluation at" not in capsys.readouterr().out
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_a_process_that_trains_treats_denormals_as_zero(tmp_path):
    script = "import sys, torch; from hvdqn import train; print((torch.tensor([1e-38]) * 0.01).item() > 0); "
    script += "print(train.command(sys.argv[1:])); print((torch.tensor([1e-38]) * 0.01).item() == 0)"
    done = subprocess.run(
        [sys.executable, "-c", script, *SMALL, "--run-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env=clean_environment(),
        check=True,
    )
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-2:]) == ("True", ["0", "True"])
