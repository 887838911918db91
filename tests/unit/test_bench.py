"""The benchmark commands that need one process; scaling has a file of its own."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdqn import bench
from hvdqn.bench import allreduce, costs, gpu, jobs, kernels, loop, peers, scaling, solve
from hvdqn.bench.allreduce import AllreduceTiming
from hvdqn.bench.report import Row, write_json
from hvdqn.bench.training import Job, acting_parts, build_filled_parts, start_training
from hvdqn.comm.local import LocalComm
from hvdqn.config import parse
from hvdqn.errors import StoppedError, UserError
from hvdqn.faults import StopSignal
from hvdqn.learner import learning_rate
from hvdqn.metrics import PhaseTimer
from tests.unit.bench_timings import US, make_timing

# Comparisons


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("a", "x", (3.0, 1.0, 2.0), 1.9), ("a", "2x", "1 to 3", ">= 1.9", "yes")),
        (Row("b", "%", (4.0, 3.5), 3.0, at_most=True), ("b", "3.75%", "3.5 to 4", "<= 3", "no")),
        (Row("c", "", (math.inf,), 5.0, at_most=True), ("c", "never", "never to never", "<= 5", "no")),
    ],
)
def test_a_row_shows_median_and_spread(row, cells):
    assert row.cells() == cells


def test_a_missing_peer_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["peers", "w1", "--peer-python", "/bin/false"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--peer-python" in error


def test_cleanrl_needs_its_script(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["peers", "w1-cleanrl"]) == 2
    assert "--cleanrl" in capsys.readouterr().err


def test_comparisons_without_their_peer_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Only where no comparison is named."""
    monkeypatch.setattr(peers, "COMPARISONS", {"w1-sbx": peers.compare_with_sbx, "replay": lambda _: ()})
    assert bench.main(["peers", "--peer-python", "/bin/false", "--json", str(tmp_path / "rows.json")]) == 0
    output = capsys.readouterr()
    assert "left out: /bin/false has no sbx, which w1-sbx needs" in output.err
    assert "replay" in output.out
    assert "w1-sbx" not in output.out


def test_an_unknown_comparison_is_refused(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["peers", "w3"]) == 2
    assert "w1, w1-sbx, w1-64" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scaling", "peers w1-ranks", "peers w2-ranks", "peers solve"])
def test_a_comparison_of_ranks_needs_a_launcher(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for module in (scaling, peers):
        monkeypatch.setattr(module, "available_engines", list)
    monkeypatch.setattr(peers, "run_command", lambda *_: "")
    assert bench.main([*name.split(), "--json", str(tmp_path / "rows.json")]) == 2
    assert "run launch/setup.sh" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ratios_over_a_peer_that_is_half_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\necho SPS: 250\necho '{\"env_steps_per_second\": 500}'\n")
    peer.chmod(0o755)
    cleanrl = tmp_path / "dqn.py"
    monkeypatch.setattr(peers, "has_bf16", lambda: True)
    monkeypatch.setattr(peers, "run_bench_job", lambda *_, **__: loop.as_json(make_timing(rate=1000.0)))
    file = tmp_path / "peers.json"
    names, options = ["w1", "w1-sbx", "w1-64", "w1-cleanrl", "w2"], ["--cleanrl", str(cleanrl)]
    assert bench.main(["peers", *names, "--peer-python", str(peer), *options, "--json", str(file)]) == 0
    medians = {row["what"]: row["median"] for row in json.loads(file.read_text())["rows"]}
    assert list(medians.values()) == [2.0, 2.0, 2.0, 4.0, 2.0, 2.0, 0.03]
    options = ["--peer-python", str(peer), "--cleanrl", str(tmp_path / "pqn.py"), "--json", str(file)]
    assert bench.main(["peers", "pqn-cleanrl", *options]) == 0
    assert json.loads(file.read_text())["rows"][0]["median"] == 4.0
    assert "W1, one core, fp32" in capsys.readouterr().out


def test_infinity_is_null_in_json(tmp_path: Path):
    write_json(tmp_path / "rows.json", {"rows": [Row("c", "", (math.inf,)).as_json()]})
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["median"] is None


# Jobs


def test_allreduce_timings_can_be_written_and_read():
    found = [
        AllreduceTiming("horovod", 2, 7, {1: 0.5, 7: 1.0}),
        AllreduceTiming(allreduce.RAW_MPI, 2, 7, {1: 0.1}),
    ]
    back = allreduce.from_json(json.loads(json.dumps(allreduce.as_json(found))), "horovod-gloo")
    assert back == [AllreduceTiming("horovod-gloo", 2, 7, {1: 0.5, 7: 1.0}), found[1]]


def test_a_job_does_not_inherit_the_variables_of_a_rank(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK", "PMIX_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "1")
    monkeypatch.setenv("EXTRA", "yes")
    env = jobs.job_environment()
    assert not {"OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK", "PMIX_RANK"} & env.keys()
    assert (env["OMPI_MCA_btl"], env["HOROVOD_CYCLE_TIME"], env["EXTRA"]) == ("self", "1", "yes")


def test_a_failed_job_is_reported_with_its_output():
    code = "import sys; print('what is wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match="exit code 3: what is wrong"):
        jobs.run_command([sys.executable, "-c", code])


def test_a_failed_job_is_reported_with_its_own_error_message():
    code = "import sys; print('[0]<stderr>:hvdqn bench: error: what to do', file=sys.stderr); sys.exit(2)"
    with pytest.raises(UserError, match=r"^what to do$"):
        jobs.run_command([sys.executable, "-c", code])


def test_a_job_may_print_invalid_utf8_and_its_code_is_not_in_the_error():
    assert jobs.run_command(["printf", "\\377"]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match=r"-c \.\.\. ended with exit code 1: $"):
        jobs.run_command([sys.executable, "-c", "import sys\nsys.exit(1)"])


def test_a_signal_to_the_benchmark_ends_its_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(costs, "available_engines", lambda: ["mpi", "torch"])
    monkeypatch.setattr(
        costs,
        "run_bench_job",
        lambda args, name, np, stopped: jobs.run_command(["sleep", "100"], stopped=stopped),
    )
    stop = StopSignal()
    stop.requested = True
    began = time.monotonic()
    with pytest.raises(StoppedError, match="before the measurement was complete"):
        costs.time_installed_engines(Namespace(allreduce_seconds=1.0, np=2), [], stop)
    assert time.monotonic() - began < 50
    assert "left out" not in capsys.readouterr().err


def test_pinning_needs_a_core_for_each_rank(monkeypatch: pytest.MonkeyPatch):
    pinned_to: list[set[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 6})
    monkeypatch.setattr("os.sched_setaffinity", lambda _, cores: pinned_to.append(cores))
    monkeypatch.setenv("LOCAL_RANK", "1")
    loop.pin_to_core()
    assert pinned_to == [{6}]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this host may use 2; start fewer"):
        loop.pin_to_core()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4})
    loop.pin_to_core()  # the launcher has pinned it to a core
    assert pinned_to == [{6}]


# The commands, in this process


def test_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "loop.json"
    args = ["loop", "--preset", "smoke", "--seconds", "0.2", "--json", str(file)]
    assert bench.main(args) == 0
    found = loop.from_json(json.loads(file.read_text()))
    assert (found.env, found.comm, found.world_size, found.envs_per_rank) == ("CartPole-v1", "local", 1, 8)
    # 8 environments, and a minibatch of 32 every 4 env steps.
    assert found.updates_per_iteration == pytest.approx(2.0, rel=0.1)
    assert found.iteration_seconds == pytest.approx(8 / found.env_steps_per_second, rel=0.2)
    assert found.seconds_per_iteration["comm_hidden"] == 0.0
    assert "env steps/s" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--exploration softmax", "--exploration ladder"])
def test_actions_are_random_unless_the_whole_run_is_timed(flags, monkeypatch: pytest.MonkeyPatch):
    chosen: list[float] = []
    monkeypatch.setattr(
        "hvdqn.acting.RandomActions.replace",
        lambda self, greedy, epsilon, mask=None: chosen.append(float(np.mean(epsilon))) or greedy,
    )
    config = parse(["--preset", "smoke", "--total-env-steps", "400", *flags.split()])
    for whole in (False, True):
        job = Job(loop.benchmark_config(config, LocalComm(), whole), LocalComm(), StopSignal(), PhaseTimer())
        with start_training(job.config, job) as run:
            loop.time_whole_run(run) if whole else loop.time_loop(run, 0.1)
        assert (set(chosen) == {1.0}) is not whole
        chosen.clear()


def test_schedules_stay_at_their_start_during_a_measurement():
    """A learning rate that falls would be negative after the end of its schedule."""
    config = loop.benchmark_config(parse(["--preset", "cartpole"]), LocalComm(), whole_run=False)
    assert config.learning.lr_final < 1.0
    done = 10_000_000 / config.run.total_env_steps
    assert learning_rate(config.learning, 1.0, done) == pytest.approx(config.learning.lr, rel=0.01)


def test_a_whole_run_counts_all_env_steps(tmp_path: Path):
    file = tmp_path / "loop.json"
    args = ["loop", "--preset", "smoke", "--whole-run", "--total-env-steps", "500", "--json", str(file)]
    assert bench.main(args) == 0
    found = json.loads(file.read_text())
    # 304 env steps follow the start of learning, with one update every 4. The updates of the last 8 never run.
    assert (found["env_steps"], found["updates"]) == (504, 74)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--seconds -1", "hvdqn: error: argument --seconds: '-1' is not a number above 0"),
        ("scaling --seconds 0", "argument --seconds: '0' is not a number above 0"),
        ("startup --rounds 0", "argument --rounds: '0' is not a whole number of 1 or more"),
        ("solve --every 0", "argument --every: '0' is not a whole number of 1 or more"),
        ("loop --seconds inf", "argument --seconds: 'inf' is not a number above 0"),
        ("gpu --updates 0", "argument --updates: '0' is not a whole number of 1 or more"),
        ("loop --json no/such/file", "argument --json: cannot write 'no/such/file'; choose another file"),
        ("loop --json .", "argument --json: cannot write '.'; choose another file"),
        (
            "allreduce --replay-capacity 20 --learning-starts 10 --envs-per-rank 64",
            "32 is larger than the replay shard of a rank, 20",
        ),
        ("--np two", "argument --np: 'two' is not a whole number of 1 or more"),
        ("scalin", "hvdqn bench: error: unknown benchmark 'scalin'; did you mean 'scaling'?"),
        ("nosuch", "unknown benchmark 'nosuch'; choose one of allreduce, gpu"),
    ],
)
def test_wrong_input_is_refused_in_one_line(args: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert bench.main(args.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["loop", "allreduce", "replay", "solve"])
def test_a_server_without_workers_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    assert bench.main([name, "--preset", "smoke", "--sync", "server"]) == 2
    error = capsys.readouterr().err
    assert "sync" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["loop", "solve"])
def test_a_benchmark_stopped_by_a_signal_writes_no_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "result.json"
    stop = StopSignal()
    stop.requested = True
    monkeypatch.setattr("hvdqn.train.StopSignal", lambda: stop)
    assert bench.main([name, "--preset", "smoke", "--eval-episodes", "2", "--json", str(file)]) == 1
    assert (
        capsys.readouterr().err == "hvdqn: error: stopped by a signal before the measurement was complete\n"
    )
    assert not file.exists()


def test_wrong_flags_of_training_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["loop", "--preset", "smoke", "--seconds", "soon"]) == 2
    assert bench.main(["--preset", "smokey"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--seconds" in first
    assert "did you mean 'smoke'" in second


def test_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """One engine fails; the other writes a result."""

    def job(args: list[str], engine: str, np: int, stopped: object) -> dict[str, object]:
        if engine == "torch":
            raise UserError("torchrun broke")
        assert args == ["allreduce", "--seconds", "0.5", "--preset", "smoke"]
        return {
            "allreduce": allreduce.as_json([AllreduceTiming("mpi", np, 1_000, {1: 10 * US, 1_000: 20 * US})])
        }

    monkeypatch.setattr("hvdqn.bench.costs.available_engines", lambda: ["mpi", "torch"])
    monkeypatch.setattr("hvdqn.bench.costs.run_bench_job", job)
    file = tmp_path / "bench.json"
    assert bench.main(["--preset", "smoke", "--seconds", "0.2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["loop"]["env_steps_per_second"] > 0
    assert [one["engine"] for one in found["allreduce"]] == ["mpi"]
    printed = capsys.readouterr()
    assert "20.0 (200)" in printed.out
    assert "torch is left out: torchrun broke" in printed.err


def test_solve(tmp_path: Path):
    file = tmp_path / "solve.json"
    args = ["solve", "--preset", "smoke", "--eval-episodes", "2", "--every", "400", "--json", str(file)]
    assert bench.main([*args, "--goal", "1"]) == 0
    found = json.loads(file.read_text())
    assert found["solved"]
    assert found["env_steps"] == 400
    assert bench.main([*args, "--goal", "501", "--total-env-steps", "600"]) == 0
    found = json.loads(file.read_text())
    assert not found["solved"]
    assert found["env_steps"] == 600


def test_weights_are_made_equal_before_each_evaluation(monkeypatch: pytest.MonkeyPatch):
    synchronized: list[int] = []
    config = parse(["--preset", "smoke", "--eval-episodes", "1", "--total-env-steps", "400"])
    with start_training(config, Job(config, LocalComm(), StopSignal(), PhaseTimer())) as run:
        strategy, clock = run.parts.strategy, run.parts.clock
        synchronize = strategy.synchronize
        monkeypatch.setattr(
            strategy, "synchronize", lambda: synchronized.append(clock.env_steps) or synchronize()
        )
        solve.train_until(run, 501.0, 200)
    assert synchronized == [200, 400, 400]  # the end of the run synchronizes, too


def test_gpu_needs_a_gpu(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: the refusal is NOT tested")
    assert bench.main(["gpu"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_measurements_of_a_gpu_are_kept_if_pong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(args: list[str]) -> None:
        raise UserError("no Pong here")

    monkeypatch.setattr(gpu, "measure", lambda *_: iter([Row("samples/s", "", (1.0,))]))
    monkeypatch.setattr(gpu, "run_bench_job", fails)
    file = tmp_path / "gpu.json"
    assert bench.main(["gpu", "--pong", "--device", "cpu", "--json", str(file)]) == 2
    assert [row["what"] for row in json.loads(file.read_text())["rows"]] == ["samples/s"]


def test_replay(tmp_path: Path):
    file = tmp_path / "replay.json"
    args = ["replay", "--preset", "smoke", "--capacities", "800", "400", "--json", str(file)]
    assert bench.main(args) == 0
    found = json.loads(file.read_text())
    assert found["ratio"] == pytest.approx(found["seconds"]["800"] / found["seconds"]["400"])


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "kernels.json"
    assert bench.main(["kernels", "--preset", "smoke", "--calls", "3", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["seconds"].keys() == {"update", "gradient", "products"}
    assert content["ratio"] == content["seconds"]["update"] / content["seconds"]["products"]
    assert "Update over its matrix products" in capsys.readouterr().out


def test_kernels_of_a_network_that_learns_by_autograd(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["kernels", "--preset", "smoke", "--noisy"]) == 2
    assert "by autograd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "forward_rows"),
    [("--no-double", [5, 5]), ("--double", [10, 5]), ("--no-double --munchausen", [5, 10])],
)
def test_the_products_of_an_update(target, forward_rows):
    """Four inputs, 6 shared units, 3 units of each stream, 2 actions: five layers."""
    flags = "--preset smoke --hidden 6 3 --dueling"
    config = parse([*flags.split(), *target.split()])
    parts = build_filled_parts(config, 20)
    acting_parts(parts).envs.close()
    assert parts.learner.dense is not None
    products = kernels.products_of(parts.learner.dense, 5)
    shapes = [(left.shape, right.shape) for left, right, _ in products]
    layers = [(4, 6), (6, 3), (3, 2), (6, 3), (3, 1)]
    expected = [((rows, i), (i, o)) for rows in forward_rows for i, o in layers]
    for index, (i, o) in enumerate(layers):
        expected.append(((o, 5), (5, i)))
        if index:
            expected.append(((5, o), (o, i)))
    assert shapes == expected
    assert all(np.matmul(left, right).shape == result.shape for left, right, result in products)
