"""The benchmarks' arithmetic by hand, and each command that needs one process."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdqn import bench
from hvdqn.bench import allreduce, costs, gpu, jobs, loop, peers, scaling, solve
from hvdqn.bench.allreduce import Allreduce
from hvdqn.bench.loop import Loop
from hvdqn.bench.projection import Line, Work, allreduce_seconds, efficiency, fit, project
from hvdqn.bench.report import Row, write_json
from hvdqn.comm.local import LocalComm
from hvdqn.config import parse
from hvdqn.errors import StoppedError, UserError
from hvdqn.faults import StopSignal
from hvdqn.learner import learning_rate
from hvdqn.metrics import PhaseTimer
from hvdqn.train import Training, start

US = 1e-6


def a_loop(ranks: int = 1, rate: float = 1000.0, exposed: float = 0.0, hidden: float = 0.0) -> Loop:
    """8 env steps and one update an iteration, 90 us of work."""
    work = {"act": 30 * US, "env": 20 * US, "compute": 40 * US}
    return Loop(
        env="CartPole-v1",
        preset="smoke",
        comm="mpi",
        world_size=ranks,
        envs_per_rank=8,
        batch_per_rank=128,
        parameters=10_000,
        replay_bytes_per_transition=30.0,
        env_steps=800 * ranks,
        updates=100,
        wall_seconds=1.0,
        env_steps_per_second=rate,
        updates_per_second=rate / 8 / ranks,
        seconds_per_iteration={**work, "comm_exposed": exposed, "comm_hidden": hidden},
    )


# Projection


@pytest.mark.parametrize(
    ("model", "ranks", "expected"),
    [
        # 10 us + 4000 bytes x 1 ns = 14 us on 2 ranks. Ring: alpha 5 us, beta 1 ns; tree: alpha 10 us, beta 1 ns.
        ("ring", 2, 14.0),
        ("tree", 2, 14.0),
        ("ring", 8, 2 * 7 * 5.0 + 2 * 7 / 8 * 4.0),
        ("ring", 512, 2 * 511 * 5.0 + 2 * 511 / 512 * 4.0),
        ("tree", 8, 3 * (10.0 + 4.0)),
        ("tree", 9, 4 * (10.0 + 4.0)),
        ("tree", 512, 9 * (10.0 + 4.0)),
    ],
)
def test_allreduce_by_hand(model, ranks, expected):
    line = Line(latency=10 * US, seconds_per_byte=1e-9)
    assert allreduce_seconds(model, line, 2, ranks, 4_000) == pytest.approx(expected * US)


def test_a_model_gives_what_was_measured_where_it_was_measured():
    line = Line(latency=30 * US, seconds_per_byte=2e-9)
    for model in ("ring", "tree"):
        assert allreduce_seconds(model, line, 4, 4, 10_000) == pytest.approx(50 * US)


def test_fit_finds_a_line_over_six_orders_of_magnitude():
    line = fit({size: 20 * US + 3e-10 * size for size in (4, 400, 40_000, 16_000_000)})
    assert line.latency == pytest.approx(20 * US)
    assert line.seconds_per_byte == pytest.approx(3e-10)


def test_fit_is_never_negative():
    assert fit({4: 30 * US, 4_000: 20 * US}).seconds_per_byte == 0.0


def test_efficiency_by_hand():
    work = Work(seconds=100 * US, updates=2.0, hidden_seconds=5 * US)
    assert efficiency(work, 4 * US) == 1.0
    assert efficiency(work, 30 * US) == pytest.approx(100 / (100 + 2 * 25))


def test_projection_holds_both_models_at_each_number_of_ranks():
    found = project(Line(10 * US, 0.0), 2, 4_000, Work(90 * US, 1.0, 0.0), (2, 8))
    assert [(one.model, one.ranks) for one in found] == [("ring", 2), ("ring", 8), ("tree", 2), ("tree", 8)]
    assert found[1].efficiency == pytest.approx(90 / (90 + 14 * 5))
    assert found[3].efficiency == pytest.approx(90 / (90 + 3 * 10))


# Scaling


def test_rows_are_rate_over_ranks():
    loops = [a_loop(), a_loop(4, rate=3000.0, exposed=10 * US)]
    assert scaling.rows(loops) == [
        ("1", "1,000", "125.0", "100%", "0.0%"),
        ("4", "3,000", "93.8", "75%", "10.0%"),
    ]


def test_shares_leave_out_what_does_not_divide():
    flags = ["--preset", "smoke", "--envs-per-rank", "8", "--batch-per-rank", "32"]
    assert scaling.shares(flags, [1, 2, 3, 8]) == {
        1: ["--envs-per-rank", "8", "--batch-per-rank", "32"],
        2: ["--envs-per-rank", "4", "--batch-per-rank", "16"],
        8: ["--envs-per-rank", "1", "--batch-per-rank", "4"],
    }


def test_what_follows_from_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weak = [a_loop(), a_loop(2, rate=1800.0, exposed=10 * US, hidden=5 * US)]
    messages = Allreduce("mpi", 2, 1_000, {1: 10 * US + 4e-9, 1_000: 14 * US, 1_000_000: 4_010 * US})
    found = scaling.projected("mpi", weak, weak, messages)
    eight = {one.model: one for one in found.projected if one.ranks == 8}
    assert eight["tree"].allreduce_seconds == pytest.approx(3 * 14 * US)
    assert eight["tree"].efficiency == pytest.approx(90 / (90 + 42 - 5))
    scaling.show_projected(found)
    printed = capsys.readouterr().out
    assert "42, 71%" in printed
    late = [a_loop(), a_loop(2, rate=200.0, exposed=900 * US, hidden=800 * US)]
    eight = {
        one.model: one for one in scaling.projected("mpi", late, late, messages).projected if one.ranks == 8
    }
    assert eight["tree"].efficiency == pytest.approx(90 / (90 + 42 - 14))
    assert "Assumed" in printed
    scaling.draw(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_rank_has_the_same_threads_in_every_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    assert scaling.with_threads(["--preset", "smoke"], 4)[-2:] == ["--threads-per-rank", "2"]
    assert scaling.with_threads([], 16)[-2:] == ["--threads-per-rank", "1"]
    assert scaling.with_threads(["--threads-per-rank=3"], 4) == ["--threads-per-rank=3"]


def test_a_loop_without_an_update_scales_nothing(monkeypatch: pytest.MonkeyPatch):
    idle = loop.as_json(dataclasses.replace(a_loop(), updates=0))
    monkeypatch.setattr(scaling, "bench", lambda *_: idle)
    with pytest.raises(UserError, match="raise --seconds"):
        scaling.timed("mpi", 1, 0.1, [])


@pytest.mark.parametrize("text", ["", "2", "1,x", "0,2", "2,2"])
def test_wrong_numbers_of_ranks_are_refused(text):
    with pytest.raises(UserError, match="--np"):
        scaling.rank_counts(text)


def test_one_rank_is_always_measured():
    assert scaling.rank_counts("4,2") == [1, 2, 4]


def test_reading_what_jobs_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for ranks in (4, 1):
        content = loop.as_json(a_loop(ranks, rate=1000.0 * ranks))
        (tmp_path / f"{ranks}.json").write_text(json.dumps(content))
    assert bench.main(["scaling", "--read", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("1,000") < printed.index("4,000")
    assert bench.main(["scaling", "--read", str(tmp_path), "--nonsense"]) == 2
    for wrong in ("{}", "[1]"):
        (tmp_path / "other.json").write_text(wrong)
        assert bench.main(["scaling", "--read", str(tmp_path)]) == 2
    assert "--nonsense is of no use" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("name", ["scaling", "peers w1-ranks", "peers w2-ranks", "peers solve"])
def test_without_a_launcher_there_is_nothing_to_compare(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for module in (scaling, peers):
        monkeypatch.setattr(module, "available", list)
    monkeypatch.setattr(peers, "run", lambda *_: "")
    assert bench.main([*name.split(), "--json", str(tmp_path / "rows.json")]) == 2
    assert "run launch/setup.sh" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Comparisons


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("a", "x", (3.0, 1.0, 2.0), 1.9), ("a", "2x", "1 to 3", ">= 1.9", "yes")),
        (Row("b", "%", (4.0, 3.5), 3.0, at_most=True), ("b", "3.75%", "3.5 to 4", "<= 3", "no")),
        (Row("c", "", (math.inf,), 5.0, at_most=True), ("c", "never", "never to never", "<= 5", "no")),
    ],
)
def test_a_row_is_a_median_with_its_spread(row, cells):
    assert row.cells() == cells


def test_a_missing_peer_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["peers", "w1", "--peer-python", "/bin/false"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--peer-python" in error


def test_an_unknown_comparison_is_refused(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["peers", "w3"]) == 2
    assert "w1, w2" in capsys.readouterr().err


def test_comparisons_with_a_peer_that_is_half_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\necho '{\"env_steps_per_second\": 500}'\n")
    peer.chmod(0o755)
    monkeypatch.setattr(peers, "has_bf16", lambda: True)
    monkeypatch.setattr(peers, "bench", lambda *_, **__: loop.as_json(a_loop(rate=1000.0)))
    file = tmp_path / "peers.json"
    assert bench.main(["peers", "w1", "w2", "--peer-python", str(peer), "--json", str(file)]) == 0
    medians = {row["what"]: row["median"] for row in json.loads(file.read_text())["rows"]}
    assert list(medians.values()) == [2.0, 2.0, 2.0, 0.03]
    assert "W1, one core, fp32" in capsys.readouterr().out


def test_what_never_came_is_null_in_json(tmp_path: Path):
    write_json(tmp_path / "rows.json", {"rows": [Row("c", "", (math.inf,)).as_json()]})
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["median"] is None


# Messages


def test_messages_survive_json():
    found = [Allreduce("horovod", 2, 7, {1: 0.5, 7: 1.0}), Allreduce(allreduce.RAW_MPI, 2, 7, {1: 0.1})]
    back = allreduce.from_json(json.loads(json.dumps(allreduce.as_json(found))), "horovod-gloo")
    assert back == [Allreduce("horovod-gloo", 2, 7, {1: 0.5, 7: 1.0}), found[1]]


def test_a_job_is_not_taken_for_a_rank(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK", "PMIX_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "1")
    env = jobs.environment({"EXTRA": "yes"})
    assert not {"OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK", "PMIX_RANK"} & env.keys()
    assert (env["OMPI_MCA_btl"], env["HOROVOD_CYCLE_TIME"], env["EXTRA"]) == ("self", "1", "yes")


def test_a_job_that_fails_says_why():
    code = "import sys; print('what is wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match="exit code 3: what is wrong"):
        jobs.run([sys.executable, "-c", code])


def test_a_job_that_knows_why_it_failed_says_nothing_else():
    code = "import sys; print('[0]<stderr>:hvdqn bench: error: what to do', file=sys.stderr); sys.exit(2)"
    with pytest.raises(UserError, match=r"^what to do$"):
        jobs.run([sys.executable, "-c", code])


def test_a_job_may_print_anything_and_long_code_is_not_repeated():
    assert jobs.run(["printf", "\\377"]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match=r"-c \.\.\. ended with exit code 1: $"):
        jobs.run([sys.executable, "-c", "import sys\nsys.exit(1)"])


def test_a_job_ends_when_its_benchmark_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(costs, "available", lambda: ["mpi", "torch"])
    monkeypatch.setattr(
        costs, "bench", lambda words, name, np, stopped: jobs.run(["sleep", "100"], stopped=stopped)
    )
    stop = StopSignal()
    stop.requested = True
    began = time.monotonic()
    with pytest.raises(StoppedError, match="before all was measured"):
        costs.engines(Namespace(allreduce_seconds=1.0, np=2), [], stop)
    assert time.monotonic() - began < 50
    assert "left out" not in capsys.readouterr().err


def test_each_pinned_rank_needs_a_core(monkeypatch: pytest.MonkeyPatch):
    given: list[set[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 6})
    monkeypatch.setattr("os.sched_setaffinity", lambda _, cores: given.append(cores))
    monkeypatch.setenv("LOCAL_RANK", "1")
    loop.pin_to_core()
    assert given == [{6}]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this host may use 2; start fewer"):
        loop.pin_to_core()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4})
    loop.pin_to_core()  # bound by the launcher
    assert given == [{6}]


# The commands, in this process


def test_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "loop.json"
    words = ["loop", "--preset", "smoke", "--seconds", "0.2", "--json", str(file)]
    assert bench.main(words) == 0
    found = loop.from_json(json.loads(file.read_text()))
    assert (found.env, found.comm, found.world_size, found.envs_per_rank) == ("CartPole-v1", "local", 1, 8)
    assert found.updates_per_iteration == pytest.approx(
        2.0, rel=0.1
    )  # batch 32 every 4 env steps, 8 environments
    assert found.iteration_seconds == pytest.approx(8 / found.env_steps_per_second, rel=0.2)
    assert found.seconds_per_iteration["comm_hidden"] == 0.0
    assert "env steps/s" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--exploration softmax", "--exploration ladder"])
def test_a_loop_plays_at_random_and_a_whole_run_does_not(flags, monkeypatch: pytest.MonkeyPatch):
    chosen: list[float] = []
    monkeypatch.setattr(
        "hvdqn.acting.RandomActions.replace",
        lambda self, greedy, epsilon: chosen.append(float(np.mean(epsilon))) or greedy,
    )
    config = parse(["--preset", "smoke", "--total-env-steps", "400", *flags.split()])
    for whole in (False, True):
        loop.built_and_timed(0.1, whole, config, LocalComm(), StopSignal(), PhaseTimer())
        assert (set(chosen) == {1.0}) is not whole
        chosen.clear()


def test_a_loop_outlives_its_schedules():
    """A learning rate that falls would be below zero long after the end of the run that it was meant for."""
    config = loop.prepared(parse(["--preset", "cartpole"]), LocalComm(), whole=False)
    assert config.learning.lr_final < 1.0
    done = 10_000_000 / config.run.total_env_steps
    assert learning_rate(config.learning, 128, 128, done) == pytest.approx(config.learning.lr, rel=0.01)


def test_a_whole_run_counts_all_env_steps(tmp_path: Path):
    file = tmp_path / "loop.json"
    words = ["loop", "--preset", "smoke", "--whole-run", "--total-env-steps", "500", "--json", str(file)]
    assert bench.main(words) == 0
    found = json.loads(file.read_text())
    # 304 env steps after learning starts, one update every 4; the last 8 env steps' are not due any more.
    assert (found["env_steps"], found["updates"]) == (504, 74)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seconds -1", "hvdqn: error: argument --seconds: '-1' is no number above 0"),
        ("scaling --seconds 0", "argument --seconds: '0' is no number above 0"),
        ("startup --rounds 0", "argument --rounds: '0' is no whole number of 1 or more"),
        ("solve --every 0", "argument --every: '0' is no whole number of 1 or more"),
        ("loop --seconds inf", "argument --seconds: 'inf' is no number above 0"),
        ("gpu --updates 0", "argument --updates: '0' is no whole number of 1 or more"),
        ("loop --json no/such/file", "argument --json: cannot write 'no/such/file'; choose another file"),
        ("loop --json .", "argument --json: cannot write '.'; choose another file"),
        (
            "allreduce --replay-capacity 20 --learning-starts 10 --envs-per-rank 64",
            "32 is larger than the replay shard of a rank, 20",
        ),
        ("--np two", "argument --np: 'two' is no whole number of 1 or more"),
        ("scalin", "hvdqn bench: error: there is no benchmark 'scalin'; did you mean 'scaling'?"),
        ("nosuch", "there is no benchmark 'nosuch'; there are allreduce, gpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert bench.main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["loop", "allreduce", "replay", "solve"])
def test_no_benchmark_of_a_server_without_workers(name: str, capsys: pytest.CaptureFixture[str]):
    assert bench.main([name, "--preset", "smoke", "--sync", "server"]) == 2
    error = capsys.readouterr().err
    assert "sync" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["loop", "solve"])
def test_a_stopped_benchmark_has_measured_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "result.json"
    stop = StopSignal()
    stop.requested = True
    monkeypatch.setattr("hvdqn.train.StopSignal", lambda: stop)
    assert bench.main([name, "--preset", "smoke", "--eval-episodes", "2", "--json", str(file)]) == 1
    assert capsys.readouterr().err == "hvdqn: error: stopped by a signal before all was measured\n"
    assert not file.exists()


def test_wrong_flags_are_one_line(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["loop", "--preset", "smoke", "--seconds", "soon"]) == 2
    assert bench.main(["--preset", "smokey"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--seconds" in first
    assert "did you mean 'smoke'" in second


def test_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """With an engine that cannot run, and what another job would have written."""

    def job(words: list[str], engine: str, np: int, stopped: object) -> dict[str, object]:
        if engine == "torch":
            raise UserError("torchrun broke")
        assert words == ["allreduce", "--seconds", "0.5", "--preset", "smoke"]
        return {"allreduce": allreduce.as_json([Allreduce("mpi", np, 1_000, {1: 10 * US, 1_000: 20 * US})])}

    monkeypatch.setattr("hvdqn.bench.costs.available", lambda: ["mpi", "torch"])
    monkeypatch.setattr("hvdqn.bench.costs.bench", job)
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
    words = ["solve", "--preset", "smoke", "--eval-episodes", "2", "--every", "400", "--json", str(file)]
    assert bench.main([*words, "--goal", "1"]) == 0
    found = json.loads(file.read_text())
    assert found["solved"]
    assert found["env_steps"] == 400
    assert bench.main([*words, "--goal", "501", "--total-env-steps", "600"]) == 0
    found = json.loads(file.read_text())
    assert not found["solved"]
    assert found["env_steps"] == 600


def test_the_policy_of_all_ranks_is_evaluated_where_their_weights_may_differ(monkeypatch: pytest.MonkeyPatch):
    agreed: list[int] = []
    monkeypatch.setattr(Training, "agree", lambda training: agreed.append(training.clock.env_steps))
    config = parse(["--preset", "smoke", "--eval-episodes", "1", "--total-env-steps", "400"])
    with tempfile.TemporaryDirectory() as folder:
        training = start(Training, config, LocalComm(), Path(folder), StopSignal(), PhaseTimer())
        solve.train_until(training, 501.0, 200)
        training.close()
    assert agreed == [200, 400]


def test_gpu_without_one_is_refused(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: the refusal is NOT tested")
    assert bench.main(["gpu"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_what_a_gpu_has_shown_stays_where_pong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(words: list[str]) -> None:
        raise UserError("no Pong here")

    monkeypatch.setattr(gpu, "measure", lambda *_: iter([Row("samples/s", "", (1.0,))]))
    monkeypatch.setattr(gpu, "bench", fails)
    file = tmp_path / "gpu.json"
    assert bench.main(["gpu", "--pong", "--device", "cpu", "--json", str(file)]) == 2
    assert [row["what"] for row in json.loads(file.read_text())["rows"]] == ["samples/s"]


def test_replay(tmp_path: Path):
    file = tmp_path / "replay.json"
    words = ["replay", "--preset", "smoke", "--capacities", "800", "400", "--json", str(file)]
    assert bench.main(words) == 0
    found = json.loads(file.read_text())
    assert found["ratio"] == pytest.approx(found["seconds"]["800"] / found["seconds"]["400"])
