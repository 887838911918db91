"""Metrics of a run: timing, files and console, also after kills, resumes and errors of the disk."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdqn.metrics import (
    PHASES,
    LineConsole,
    Metrics,
    PhaseTimer,
    ProgressLine,
    Record,
    Status,
    WaitHint,
    number,
    read_metrics,
    write_summary,
)

BATCH_VARIABLES = (
    "ENVIRONMENT", "LSB_INTERACTIVE", "LSB_JOBID", "OMPI_COMM_WORLD_RANK", "PBS_ENVIRONMENT", "PBS_JOBID",
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_PTY_PORT", "SLURM_STEP_ID",
)  # fmt: skip


def open_metrics(
    run_dir: Path | None, total_env_steps: int = 1000, **options: float
) -> tuple[Metrics, io.StringIO]:
    stream = io.StringIO()
    return Metrics(run_dir, total_env_steps, PhaseTimer(), stream=stream, **options), stream


def lines_of(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scalars_of(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# The timer


def test_each_moment_belongs_to_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()
    now[0] = 101.0  # other: 1
    assert timer.start("act") == "other"
    now[0] = 103.0  # act: 2
    assert timer.start("comm") == "act"
    now[0] = 107.0  # comm: 4
    assert timer.start("act") == "comm"
    now[0] = 115.0  # act: 8, still running
    assert timer.seconds() == {**dict.fromkeys(PHASES, 0), "act": 10, "comm": 4, "other": 1}
    assert timer.total_seconds() == 15
    assert timer.phase == "act"


def test_timer_continues_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()
    timer.load({"act": 5.0, "env": 7.0, "a phase of another release": 1.0})
    timer.start("env")
    now[0] = 2.0
    assert timer.seconds() == {**dict.fromkeys(PHASES, 0.0), "act": 5.0, "env": 9.0}


@pytest.mark.parametrize(
    ("engine", "parameters", "suggests_mpi"),
    [("horovod", 10_000, True), ("horovod", 2_000_000, False), ("mpi", 10_000, False)],
)
def test_a_rank_that_waits_for_a_third_of_the_time_gets_one_hint(
    monkeypatch: pytest.MonkeyPatch, engine: str, parameters: int, suggests_mpi: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    timer = PhaseTimer()
    hint = WaitHint(timer, engine, parameters)

    def spend(act: float, comm: float) -> str:
        timer.start("act")
        now[0] += act
        timer.start("comm")
        now[0] += comm
        return hint.due()

    assert spend(70.0, 30.0) == ""
    hinted = spend(1.0, 1.0)  # since the last call, not since the beginning
    assert hinted.startswith("hint: 50% of the time")
    assert ("--comm mpi" in hinted) == suggests_mpi
    assert spend(1.0, 9.0) == ""


def test_the_hint_names_other_work_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "getloadavg", lambda: (7.04, 6.0, 5.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    timer = PhaseTimer()
    hint = WaitHint(timer, "horovod", 10_000)
    timer.start("comm")
    now[0] += 1.0
    hinted = hint.due()
    assert "the load average of this machine is 7.0 on 2 cores: end other work on it" in hinted
    assert "--comm mpi" not in hinted


def test_switching_is_cheap() -> None:
    timer = PhaseTimer()
    start = time.process_time()  # not affected by other processes
    for _ in range(10_000):
        timer.start("act")
        timer.start("env")
    assert (time.process_time() - start) / 20_000 < 5e-6  # with a margin for slow machines


# metrics.jsonl


def test_one_line_per_record_with_null_for_non_finite_numbers(tmp_path: Path) -> None:
    metrics, _ = open_metrics(tmp_path)
    metrics.log(100, 7, {"loss": 0.5, "episodes": 3, "episode_return_mean": math.nan, "q_mean": -math.inf})
    first, *rest = lines_of(tmp_path)
    assert not rest
    assert (first["env_steps"], first["updates"], first["loss"]) == (100, 7, 0.5)
    assert first["episodes"] == 3
    assert first["episode_return_mean"] is None
    assert first["q_mean"] is None
    assert isinstance(first["wall_seconds"], float)


def test_rates_are_those_since_the_last_line_that_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    metrics, _ = open_metrics(tmp_path)
    now[0] = 2.0
    metrics.log(100, 10, {})
    metrics.log(100, 10, {"eval_return_mean": 1.0})
    now[0] = 7.0
    metrics.log(200, 30, {})
    first, evaluation, last = lines_of(tmp_path)
    assert (first["env_steps_per_second"], first["updates_per_second"]) == (50, 5)
    assert "env_steps_per_second" not in evaluation
    assert (last["env_steps_per_second"], last["updates_per_second"]) == (20, 4)
    assert last["wall_seconds"] == 7


def test_resume_removes_records_beyond_the_checkpoint(tmp_path: Path) -> None:
    metrics, _ = open_metrics(tmp_path)
    for env_steps in (100, 200, 300, 400):
        metrics.log(env_steps, env_steps // 10, {"loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 150, "upd')  # killed in mid-write
    again, _ = open_metrics(tmp_path)
    again.resume(200, 20)
    assert [line["env_steps"] for line in lines_of(tmp_path)] == [100, 200]
    again.log(300, 30, {"loss": 2.0})
    assert [line["env_steps"] for line in lines_of(tmp_path)] == [100, 200, 300]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_incomplete_last_line_is_ignored_and_a_damaged_line_before_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"env_steps": 1}\n{"env_steps": 2}\n{"env_st')
    assert read_metrics(path) == [{"env_steps": 1}, {"env_steps": 2}]
    path.write_text('{"env_steps": 1}\n{"env_st\n{"env_steps": 3}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        read_metrics(path)


# TensorBoard


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    metrics, _ = open_metrics(tmp_path)
    metrics.log(100, 10, {"loss": 0.5, "epsilon": 1.0})
    metrics.log(200, 20, {"loss": 0.25, "epsilon": 0.5})
    metrics.log(200, 20, {"eval_return_mean": 42.0})
    assert scalars_of(tmp_path, "train/loss") == [(100, 0.5), (200, 0.25)]
    assert scalars_of(tmp_path, "eval/return_mean") == [(200, 42.0)]
    assert [step for step, _ in scalars_of(tmp_path, "time/env_steps_per_second")] == [100, 200]


def test_tensorboard_drops_records_that_a_resume_repeats(tmp_path: Path) -> None:
    metrics, _ = open_metrics(tmp_path)
    for env_steps in (100, 200, 300):
        metrics.log(env_steps, 1, {"loss": 1.0})
    again, _ = open_metrics(tmp_path)
    again.resume(200, 1)
    again.log(300, 1, {"loss": 2.0})
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert scalars_of(tmp_path, "train/loss") == [(100, 1.0), (200, 1.0), (300, 2.0)]


def test_without_tensorboard_one_warning_is_given_and_the_other_records_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("event_pb2", "summary_pb2"):
        monkeypatch.setitem(sys.modules, f"tensorboard.compat.proto.{name}", None)
    metrics, stream = open_metrics(tmp_path)
    for env_steps in (100, 200):
        metrics.log(env_steps, 1, {"loss": 1.0})
    metrics.close()
    warnings = [line for line in stream.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "no TensorBoard events are written" in warnings[0]
    assert "pip install tensorboard" in warnings[0]
    assert len(lines_of(tmp_path)) == 2
    assert metrics.write_failures == 0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_torch_and_tensorboard_are_not_loaded_before_the_first_record() -> None:
    code = "import sys, hvdqn.metrics; print({'torch', 'tensorboard', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "set()\n"


# Ranks above 0


def test_other_ranks_have_the_same_interface_and_no_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Metrics(None, 1000, PhaseTimer()) as metrics:
        metrics.resume(0, 0)
        metrics.log(100, 10, {"loss": 0.5})
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert metrics.write_failures == 0


# Failing disks


def test_a_removed_run_directory_does_not_end_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics, stream = open_metrics(run_dir)
    metrics.log(100, 1, {"loss": 1.0})
    for file in run_dir.iterdir():
        file.unlink()
    run_dir.rmdir()
    metrics.log(200, 1, {"loss": 1.0})
    metrics.log(300, 1, {"loss": 1.0})
    assert metrics.write_failures == 4  # two records, two files
    warnings = [line for line in stream.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"{run_dir}/metrics.jsonl: No such file or directory" in warnings[0]
    run_dir.mkdir()  # the file system is back
    metrics.log(400, 1, {"loss": 1.0})
    assert [line["env_steps"] for line in lines_of(run_dir)] == [400]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_counted_and_reported_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics, stream = open_metrics(tmp_path, line_every_seconds=0)
    for env_steps in (100, 200, 300):
        metrics.log(env_steps, 1, {"loss": 1.0})
    assert metrics.write_failures == 3
    assert stream.getvalue().count("No space left on device") == 1
    assert stream.getvalue().count("env steps ") == 3
    assert len(scalars_of(tmp_path, "train/loss")) == 3


def test_a_line_that_only_partly_fits_is_cut_off_again(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from hvdqn.metrics import Metrics, PhaseTimer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run_dir = Path(sys.argv[1])
metrics = Metrics(run_dir, 1000, PhaseTimer())
metrics.log(100, 1, {"loss": 1.0})
size = (run_dir / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
metrics.log(200, 2, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
metrics.log(300, 3, {"loss": 1.0})
print(metrics.write_failures >= 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.endswith("True\n")
    assert [line["env_steps"] for line in lines_of(tmp_path)] == [100, 300]


def test_a_console_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    metrics = Metrics(tmp_path, 1000, PhaseTimer(), stream=Gone())
    metrics.log(100, 1, {"loss": 1.0})
    metrics.close()
    assert metrics.write_failures > 0
    assert len(lines_of(tmp_path)) == 1


# The console


def test_the_plain_line() -> None:
    stream = io.StringIO()
    console = LineConsole(stream, 50_000, every_seconds=0)
    values = {"episode_return_mean": 143.21, "loss": 0.02134, "epsilon": 0.41, "q_mean": 3.0}
    console.write(Record(4_000, 400, 1.0, {"env_steps_per_second": 4_000.0, **values}))
    console.write(Record(12_800, 1_421, 2.0, values))
    assert stream.getvalue().splitlines()[1] == (
        "env steps 12,800/50,000 (25%)  8,800/s  updates 1,421  "
        "return 143.2  loss 0.0213  epsilon 0.41  left 0:00:05"
    )


def test_lines_are_held_back_and_the_last_one_is_printed_at_the_end(tmp_path: Path) -> None:
    metrics, stream = open_metrics(tmp_path, total_env_steps=300, line_every_seconds=3600)
    for env_steps in (100, 200, 300):
        metrics.log(env_steps, 1, {})
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["env steps 100/300 (33%)"]
    metrics.close()
    metrics.close()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "env steps 100/300 (33%)",
        "env steps 300/300 (100%)",
    ]


def test_the_last_line_has_the_speed_of_training_and_no_time_left() -> None:
    """The evaluation at the end takes time and no env steps."""
    status = Status(total_env_steps=3_000)
    for seconds, env_steps in ((0.0, 1_000), (1.0, 2_000), (2.0, 3_000)):
        status.update(Record(env_steps, 5, seconds, {"env_steps_per_second": 1_000.0}))
    status.update(Record(3_000, 5, 60.0, {"eval_return_mean": 7.0}))
    assert (status.speed(), status.time_left()) == ("1,000/s", "left 0:00:00")
    status = Status(total_env_steps=3_000)
    status.update(Record(3_000, 5, 1.0, {"eval_return_mean": 7.0}))
    assert status.time_left() == "left 0:00:00", "also where a run is over that is started again"


def test_status_keeps_the_last_known_value_and_the_recent_rate() -> None:
    status = Status(total_env_steps=1_000_000)
    assert status.speed() == "?/s"
    assert status.time_left() == "left ?"
    for second in range(1, 31):  # 1,000/s for 15 s, then 100/s
        env_steps = second * 1000 if second <= 15 else 15_000 + (second - 15) * 100
        values = {"episode_return_mean": 9.5} if second == 1 else {"episode_return_mean": math.nan}
        status.update(Record(env_steps, 5, float(second), values))
    assert status.speed() == "100/s"
    assert status.time_left() == "left 2:43:55"  # 983,500 env steps at 100/s
    assert status.learning() == ["updates 5", "return 9.5"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.02134, "0.0213"), (143.21, "143.2"), (-99.4, "-99.4"), (8912.4, "8,912"), (math.inf, "?")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_an_evaluation_does_not_count_for_the_speed() -> None:
    """Neither the speed nor the time left falls to nothing, and the last line of a run has both."""
    status = Status(total_env_steps=3_000)
    for second in range(11):
        status.update(Record(second * 100, 5, float(second), {}))
    for second in range(11, 71):  # an evaluation
        status.update(Record(1_000, 5, float(second), {}))
    assert (status.speed(), status.time_left()) == ("100/s", "left 0:00:20")
    status.update(Record(1_050, 5, 71.0, {}))
    assert status.speed() == "50/s"
    status = Status(total_env_steps=100)
    status.update(Record(100, 5, 1.0, {}))
    assert status.time_left() == "left 0:00:00"


def test_the_display_is_redrawn_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start and every 30 s, however rare the records are; without new counters there is no second line."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    metrics, stream = open_metrics(tmp_path, total_env_steps=1000)
    metrics.show(0, 0)
    for second in range(1, 70):
        now[0] = 100.0 + second
        if now[0] >= metrics.draw_at:  # as in the training loop
            metrics.show(second, 0, "evaluation: 1 of 3 episodes" if second > 50 else "")
    metrics.log(70, 0, {})
    metrics.show(70, 0, last=True)
    metrics.close()
    assert [line.split("  ") for line in stream.getvalue().splitlines()] == [
        ["env steps 0/1,000 (0%)", "?/s", "updates 0", "left ?"],
        ["env steps 30/1,000 (3%)", "1/s", "updates 0", "left 0:16:10"],
        ["env steps 60/1,000 (6%)", "1/s", "updates 0", "left 0:15:40", "evaluation: 1 of 3 episodes"],
        ["env steps 70/1,000 (7%)", "1.026/s", "updates 0", "left 0:15:07"],
    ]
    assert len(lines_of(tmp_path)) == 1, "the display writes no metrics"


def test_the_last_counters_are_shown_once(tmp_path: Path) -> None:
    metrics, stream = open_metrics(tmp_path, total_env_steps=100)
    metrics.show(0, 0)
    metrics.show(100, 0)  # too early for a line
    assert stream.getvalue().count("\n") == 1
    metrics.show(100, 0, last=True)
    metrics.show(100, 0, last=True)
    metrics.close()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "env steps 0/100 (0%)",
        "env steps 100/100 (100%)",
    ]


def test_a_progress_line_is_printed_at_the_start_and_then_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(stream)
    for second in range(61):
        now[0] = 100.0 + second
        line.show(f"{second} of 60")
    line.close()
    assert stream.getvalue() == "0 of 60\n30 of 60\n60 of 60\n"


def shown_on_a_terminal(code: str, *arguments: str, **environment: str) -> str:
    """Run Python code on a pseudo-terminal; return what it printed there."""
    outer = {name: value for name, value in os.environ.items() if name not in BATCH_VARIABLES}
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**outer, "TERM": "xterm", "COLUMNS": "100", **environment},
            stdout=theirs,
            timeout=30,
            check=True,
        )
        return os.read(ours, 100_000).decode(environment.get("PYTHONIOENCODING", "utf-8"))
    finally:
        os.close(theirs)
        os.close(ours)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_bar_on_a_terminal(tmp_path: Path, encoding: str) -> None:
    code = """
import logging, sys
from pathlib import Path
from hvdqn.logs import setup_logging
from hvdqn.metrics import Metrics, PhaseTimer
setup_logging(0, 1)
with Metrics(Path(sys.argv[1]), 1000, PhaseTimer()) as metrics:
    metrics.log(500, 50, {"loss": 0.5, "epsilon": 0.41})
    logging.getLogger("hvdqn.test").info("checkpoint [bold]\\u00e9[/bold] :smile:")
    metrics.log(1000, 100, {"loss": 0.25})
"""
    shown = shown_on_a_terminal(code, str(tmp_path), PYTHONIOENCODING=encoding)
    assert "500/1,000 (50%)" in shown
    assert "1,000/1,000 (100%)" in shown
    assert "updates 100  loss 0.25  epsilon 0.41" in shown
    letter = "é" if encoding == "utf-8" else r"\xe9"
    assert f"checkpoint [bold]{letter}[/bold] :smile:" in shown
    assert "left 0:00:00" in shown
    assert shown.index("checkpoint") < shown.rindex("1,000/1,000"), "the message is above the bar"
    assert shown.index("\x1b[?25h") < shown.index(
        "500/1,000"
    )  # also a run that is killed leaves the cursor visible


BAR = """
import sys
from pathlib import Path
from hvdqn.metrics import Metrics, PhaseTimer
with Metrics(Path(sys.argv[1]), 1000, PhaseTimer()) as metrics:
    metrics.show(0, 0)
    metrics.log(500, 50, {"loss": 0.5})
    metrics.log(1000, 100, {"loss": 0.25})
"""


@pytest.mark.parametrize(
    ("environment", "is_batch"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "4", "ENVIRONMENT": "BATCH"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "interactive"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "4"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}, False),
        ({"PBS_JOBID": "7", "PBS_ENVIRONMENT": "PBS_BATCH"}, True),
        ({"PBS_JOBID": "7", "PBS_ENVIRONMENT": "PBS_INTERACTIVE"}, False),
        ({"LSB_JOBID": "7"}, True),
        ({"LSB_JOBID": "7", "LSB_INTERACTIVE": "Y"}, False),
    ],
    ids=[
        "srun",
        "sbatch from a shell of srun --pty",
        "srun in a shell of salloc",
        "srun --pty",
        "salloc",
        "qsub",
        "qsub -I",
        "bsub",
        "bsub -Is",
    ],
)
def test_a_batch_job_prints_plain_lines_even_on_a_terminal(
    tmp_path: Path, environment: dict[str, str], is_batch: bool
) -> None:
    """`srun --unbuffered` gives ranks a pseudo-terminal that ends in a file."""
    shown = shown_on_a_terminal(BAR, str(tmp_path), **environment)
    assert ("\x1b" not in shown) == is_batch, shown
    if is_batch:
        counted = [line.split("  ")[0] for line in shown.splitlines()]
        assert counted == ["env steps 0/1,000 (0%)", "env steps 1,000/1,000 (100%)"]


# summary.json


def test_summary_is_whole_in_order_and_finite(tmp_path: Path) -> None:
    write_summary(tmp_path, {"env": "old"})
    write_summary(
        tmp_path, {"env": "CartPole-v1", "eval_return_mean": math.nan, "seconds": {"act": 1.5}, "b": [1]}
    )
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {
        "env": "CartPole-v1",
        "eval_return_mean": None,
        "seconds": {"act": 1.5},
        "b": [1],
    }
    assert text.index("eval_return_mean") < text.index('"b"')
    assert text.endswith("}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_summary_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write_summary(tmp_path, {"env": "old"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_summary(tmp_path, {"env": "new"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"env": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


# Settings in TensorBoard


def test_tensorboard_shows_the_settings_as_text_and_hparams(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    metrics, _ = open_metrics(tmp_path)
    settings = {"env": "CartPole-v1", "lr": 0.5, "double": True, "hidden": [64, 32], "stop_at_return": None}
    metrics.describe(settings)
    metrics.log(10, 5, {"loss": 1.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.PluginTagToContent("text").keys() == {"config"}
    [text] = events.Tensors("config")
    assert "    lr: 0.5\n" in text.tensor_proto.string_val[0].decode()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    session = HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["lr"].number_value == 0.5
    assert session.hparams["double"].bool_value is True
    assert session.hparams["hidden"].string_value == "[64, 32]"
    assert scalars_of(tmp_path, "train/loss") == [(10, 1.0)]
