"""slurm/*.sbatch without Slurm: srun and scontrol are replaced by programs that record their arguments."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.readme import command

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.launch

SRUN = """#!/bin/sh
[ "$1" != --help ] || exec echo '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'
printf '%s\\n' "$@" >>"$RECORDS/srun"
echo "TERM=$TERM"
for run_dir; do :; done
[ -z "$SUMMARY" ] || { mkdir -p "$run_dir"; echo "$SUMMARY" >"$run_dir/summary.json"; }
exit "${SRUN_CODE:-0}"
"""
SCONTROL = """#!/bin/sh
printf '%s\\n' "$*" >>"$RECORDS/scontrol"
[ "$1" != show ] || [ -z "$NO_ANSWER" ] || exit 1
[ "$1" != show ] || printf '%s\\n' "$JOB_RECORD"
"""


@dataclass(frozen=True)
class Batch:
    """The result of a batch script."""

    code: int
    output: str
    srun: list[str]  # arguments of srun
    scontrol: list[str]  # arguments of each call of scontrol

    def ran_in(self) -> str:
        """Return the run directory in the ranks' arguments. The script must have printed it, too."""
        assert self.code == 0, self
        given = self.srun[len(self.srun) - self.srun[::-1].index("--run-dir")]
        assert f"run directory: {given}; restarts: 0\n" in self.output, self
        return given


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder in which sbatch is called, with the programs above."""
    (tmp_path / "programs").mkdir()
    programs = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "apptainer": "#!/bin/sh\n",
        "sleep": "#!/bin/sh\n",
    }
    for name, text in programs.items():
        (tmp_path / "programs" / name).write_text(text)
        (tmp_path / "programs" / name).chmod(0o755)
    (tmp_path / "image.sif").touch()
    (tmp_path / "list.txt").write_text("--seed 1\n--seed 2 --run-dir second\n")
    return tmp_path


def batch(folder: Path, script: str, *arguments: str, **environment: str) -> Batch:
    """Run a batch script as job 7, on its first node."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("HVDQN_", "SLURM_"))}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    ours = {
        "HVDQN_HOME": str(REPOSITORY),
        "HVDQN_VENV": sys.prefix,
        "HVDQN_SITE_ENV": os.devnull,
        "PATH": f"{folder}/programs:{os.environ['PATH']}",
        "RECORDS": str(folder),
    }
    done = subprocess.run(
        ["bash", REPOSITORY / "slurm" / script, *arguments],
        cwd=folder,
        env=outer | job | ours | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    records = [(folder / name) for name in ("srun", "scontrol")]
    srun, scontrol = (path.read_text().splitlines() if path.exists() else [] for path in records)
    return Batch(done.returncode, done.stdout, srun, scontrol)


@pytest.mark.parametrize("script", ["train.sbatch", "train_container.sbatch"])
def test_the_terminal_of_the_ranks_shows_no_colors(folder: Path, script: str) -> None:
    """srun gives them a pseudo-terminal, and what they print ends in a file."""
    done = batch(folder, script, HVDQN_IMAGE="image.sif", TERM="xterm-256color")
    assert "TERM=dumb\n" in done.output, done


@pytest.mark.parametrize("image", ["", "image.sif", "image.sqsh"])
@pytest.mark.parametrize(
    ("arguments", "runs", "expected"),
    [
        ([], "", "{folder}/runs/7"),
        ([], "scratch", "{folder}/scratch/7"),
        (["--run-dir", "{folder}/my run"], "/scratch", "{folder}/my run"),
        (["--run-dir=mine", "--seed", "1"], "", "{folder}/mine"),
        (["--run-dir", "not/this", "--run_dir=mine"], "", "{folder}/mine"),
        (["--run-dir="], "", "{folder}/runs/7"),
    ],
)
def test_the_run_directory_is_the_one_that_is_named(
    folder: Path, arguments: list[str], runs: str, expected: str, image: str
) -> None:
    script = "train_container.sbatch" if image else "train.sbatch"
    arguments = [word.format(folder=folder) for word in arguments]
    done = batch(folder, script, *arguments, HVDQN_RUNS=runs, HVDQN_IMAGE=image)
    run_dir = expected.format(folder=folder)
    assert done.ran_in() == run_dir
    if image == "image.sif":
        assert done.srun[done.srun.index("--bind") + 1] == run_dir
    elif image:
        assert f"--container-mounts={run_dir}:{run_dir},{folder}:{folder}" in done.srun
    assert Path(run_dir).is_dir() == bool(image)


@pytest.mark.parametrize(
    ("task", "tasks", "arguments", "expected"),
    [
        ("1", "2", [], "runs/7_1"),
        ("2", "2", [], "second"),
        ("2", "2", ["--run-dir", "all"], "second"),
        ("1", "1", ["--run-dir", "runs/5_1"], "runs/5_1"),  # to continue a run that was not requeued
    ],
)
def test_a_run_of_a_sweep_has_its_own_run_directory(
    folder: Path, task: str, tasks: str, arguments: list[str], expected: str
) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": tasks}
    done = batch(folder, "sweep.sbatch", "list.txt", *arguments, **array)
    assert done.ran_in() == f"{folder}/{expected}"


def test_runs_of_a_sweep_may_not_share_a_run_directory(folder: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    done = batch(folder, "sweep.sbatch", "list.txt", "--run-dir", "all", **array)
    assert done.code == 2, done
    assert (
        f"all runs would write into --run-dir {folder}/all; name one in each line of 'list.txt'"
        in done.output
    )
    assert done.srun == []


def test_scaling_writes_to_the_run_directory(folder: Path) -> None:
    done = batch(folder, "scaling.sbatch", "--run-dir", "table", SLURM_NTASKS="2")
    assert [word for word in done.srun if word.endswith("-ranks.json")] == [
        f"{folder}/table/1-ranks.json",
        f"{folder}/table/2-ranks.json",
    ]


STOPPED = '{"wall_seconds": 2.5, "stopped_by": "signal"}'
RUNNING = "JobState=RUNNING Reason=None\n   RunTime=00:00:20 TimeLimit={limit} TimeMin=N/A\n   PreemptTime={preempted}"


@pytest.mark.parametrize("code", ["75", "140"])
@pytest.mark.parametrize(
    ("limit", "preempted", "seconds", "goes_on"),
    [
        ("00:01:00", "None", "10", False),
        ("00:05:00", "None", "50", False),
        ("00:06:00", "None", "50", False),
        ("00:05:00", "None", "60", True),  # for example with --signal=USR2@60
        ("00:05:00", "2024-01-31T12:00:00", "10", True),  # another job needs the nodes
        ("00:07:00", "None", "10", True),  # a signal by the user: that of --signal comes later
        ("00:30:00", "None", "10", True),
        ("1-00:00:00", "None", "10", True),
        ("UNLIMITED", "None", "10", True),
    ],
)
def test_a_job_that_its_time_limit_stops_at_once_is_not_requeued(
    folder: Path, limit: str, preempted: str, seconds: str, goes_on: bool, code: str
) -> None:
    record = RUNNING.format(limit=limit, preempted=preempted)
    job = {"SRUN_CODE": code, "SUMMARY": STOPPED, "JOB_RECORD": record, "SECONDS": seconds}
    done = batch(folder, "train.sbatch", **job)
    assert done.code == int(code), done
    assert done.scontrol == ["show job 7", *["requeue 7"] * goes_on], done
    assert ("stopped by a signal; requeued, restart 1 of at most 20" in done.output) == goes_on
    remedy = "give --time=0:30:00 or --signal=USR2@60, and --run-dir"
    assert (f"{remedy} {folder}/runs/7 to go on\n" in done.output) == (not goes_on), done


def test_a_stopped_job_prints_its_run_directory(folder: Path) -> None:
    job = {"SRUN_CODE": "75", "SUMMARY": STOPPED, "JOB_RECORD": "JobState=RUNNING", "HVDQN_MAX_RESTARTS": "0"}
    done = batch(folder, "train.sbatch", "--run-dir", "mine", **job)
    assert done.code == 75, done
    assert f"to go on, submit again with --run-dir {folder}/mine\n" in done.output


def test_a_stopped_job_is_requeued_if_slurm_does_not_answer(folder: Path) -> None:
    """For example while its controller restarts. Slurm refuses the requeue if the job is being cancelled."""
    done = batch(folder, "train.sbatch", SRUN_CODE="75", SUMMARY=STOPPED, NO_ANSWER="1")
    assert done.code == 75, done
    assert done.scontrol == [*["show job 7"] * 6, "requeue 7"], done
    assert "stopped by a signal; requeued, restart 1 of at most 20" in done.output


PREEMPTED = RUNNING.format(limit="1-00:00:00", preempted="2024-01-31T12:00:00")
OVER = "JobState=COMPLETING Reason=TimeLimit\n   TimeLimit=00:30:00\n   PreemptTime=None"
UNDISTURBED = RUNNING.format(limit="1-00:00:00", preempted="None")


@pytest.mark.parametrize("code", ["75", "140"])
@pytest.mark.parametrize(
    ("record", "earlier", "recorded", "goes_on"),
    [
        (UNDISTURBED, "", STOPPED, True),
        (UNDISTURBED, STOPPED.replace("2.5", "1.5"), STOPPED, True),
        (UNDISTURBED, "", "", False),  # Slurm could not launch the step
        (UNDISTURBED, STOPPED, "", False),  # the same after an earlier start that stopped
        (UNDISTURBED, "", STOPPED.replace("signal", "finished"), False),
        ("", "", "", False),
        (PREEMPTED, "", "", True),
        (OVER, "", "", True),
    ],
)
def test_a_job_is_requeued_only_if_ranks_or_slurm_say_that_it_was_stopped(
    folder: Path, record: str, earlier: str, recorded: str, goes_on: bool, code: str
) -> None:
    (folder / "runs" / "7").mkdir(parents=True)
    if earlier:
        (folder / "runs" / "7" / "summary.json").write_text(f"{earlier}\n")
    job = {"SRUN_CODE": code, "SUMMARY": recorded, "JOB_RECORD": record, "SECONDS": "90"}
    done = batch(folder, "train.sbatch", **job)
    assert ("requeue 7" in done.scontrol) == goes_on, done
    assert ("stopped by a signal" in done.output) == goes_on, done
    if not goes_on:
        assert done.code == {"75": 1, "140": 140}[code], done
        assert "no rank recorded that it stopped after a checkpoint; not requeued" in done.output
        assert f"submit again with --run-dir {folder}/runs/7\n" in done.output


# A process of a study


RUN = """#!/bin/sh
printf '%s\\n' "$@" >>"$RECORDS/srun"
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.mark.parametrize(
    "line",
    [
        "sbatch --array=1-8 slurm/tune.sbatch STUDY --search lr=1e-5:1e-2:log -- --preset minatar",
        "sbatch --array=1-8 slurm/tune.sbatch STUDY --trials 100 --search lr=1e-5:1e-2:log -- --preset minatar",
    ],
)
def test_tune_trains_under_srun(folder: Path, line: str) -> None:
    if importlib.util.find_spec("optuna") is None:
        pytest.skip("optuna is not installed: slurm/tune.sbatch is NOT tested; launch/setup.sh installs it")
    (folder / "programs" / "srun").write_text(RUN)
    short = "--preset smoke --total-env-steps 600 --eval-episodes 2"
    words = shlex.split(command(line, {"--preset minatar": short}))[3:]
    if "--trials" in words:
        words[words.index("--trials") + 1] = "1"
    else:
        words[1:1] = ["--trials", "1"]
    done = batch(folder, "tune.sbatch", *words)
    assert done.code == 0, done
    assert "--mpi=pmix" in done.srun
    assert (
        done.srun.index("--cpus-per-task=1") < done.srun.index("-m") < done.srun.index("--threads-per-rank")
    )
    assert "best: trial 0" in done.output
    assert (folder / "STUDY" / "best.yaml").exists()


@pytest.mark.parametrize("arguments", [[], ["--search", "lr=1,2"]])
def test_tune_without_a_study_is_wrong(folder: Path, arguments: list[str]) -> None:
    done = batch(folder, "tune.sbatch", *arguments)
    assert (done.code, done.srun) == (2, [])
    assert "no study; usage: sbatch" in done.output


def test_a_process_of_a_study_that_is_stopped_is_requeued(folder: Path) -> None:
    """srun ends with 75, as ranks do that Slurm has stopped, and the trial is put back."""
    if importlib.util.find_spec("optuna") is None:
        pytest.skip("optuna is not installed: slurm/tune.sbatch is NOT tested; launch/setup.sh installs it")
    record = "JobId=7 JobState=RUNNING Reason=None TimeLimit=01:00:00 PreemptTime=None"
    words = ("STUDY", "--trials", "1", "--search", "lr=1,2", "--", "--preset", "smoke")
    done = batch(folder, "tune.sbatch", *words, SRUN_CODE="75", JOB_RECORD=record)
    assert done.code == 75, done
    assert "trial 0 was interrupted" in done.output
    assert "requeue 7" in done.scontrol
