"""slurm/*.sbatch under a real Slurm: slurmctld, two slurmd with hosts of their own, srun over PMIx."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.launch.slurm_cluster import Cluster, Job, why_not
from tests.readme import command

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[2]
# Updates are rare: between two ranks they cost the most, and nothing is to be learned here.
WORKLOAD = ["--preset", "smoke", "--replay-ratio", "1", "--log-every", "100"]
TOTAL = 6_000
ONE_NODE = ["--ntasks=2", "--cpus-per-task=1"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
ENDLESS = ["--total-env-steps", "1000000000"]

# Environments that slow down the first start, so that the signal always comes during it.
ENVIRONMENTS = """\
import os
import signal
import time

import gymnasium


class SlowAtFirst(gymnasium.Wrapper):
    def __init__(self, env):
        super().__init__(env)
        self.unsaved = open(os.devnull)  # cannot be pickled, so that saving states is not tried with slow steps

    def step(self, action):
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(0.04)
        return super().step(action)


def always_stopped(env):
    os.kill(os.getpid(), signal.SIGUSR2)
    return env
"""

# Stands for python: a rank that starts at once.
INSTANT = """\
#!/bin/bash
[[ $1 != -c && -z ${SLURM_RESTART_COUNT:-} ]] || exit 0
mkdir -p "${@: -1}" # the run directory
trap 'echo "{\\"stopped_by\\": \\"signal\\"}" >"${@: -1}/summary.json"; exit 75' USR2 TERM
echo training
while true; do sleep 0.1; done
"""
STOPPABLE = [*WORKLOAD, "--wrapper", "environments:SlowAtFirst", "--total-env-steps", str(TOTAL)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(f"{reason}: the batch scripts in slurm/ are NOT tested")
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository with a site.env, in a folder whose name contains a space."""
    clone = tmp_path_factory.mktemp("slurm") / "my clones" / "hvdqn"
    shutil.copytree(REPOSITORY / "slurm", clone / "slurm", ignore=shutil.ignore_patterns("site.env"))
    (clone / "hvdqn").symlink_to(REPOSITORY / "hvdqn")
    (clone / "slurm" / "site.env").write_text(
        f"HVDQN_VENV={shlex.quote(str(Path(sys.executable).parents[1]))}\n"
        f"HVDQN_RUNS={clone.parents[1]}/scratch\n"
        f"HVDQN_MAX_RESTARTS=${{HVDQN_MAX_RESTARTS:-3}}\n"
        "export OMPI_MCA_mpi_yield_when_idle=1 # there are fewer cores than ranks\n"
        "false # a last line that fails, as `[[ ... ]] && ...` may, must not end the job\n"
    )
    return clone


@pytest.fixture(scope="module")
def folder(clone: Path) -> Path:
    """Return the folder in which the user calls sbatch."""
    folder = clone.parents[1] / "experiments"
    folder.mkdir()
    (folder / "environments.py").write_text(ENVIRONMENTS)
    (folder / "instant" / "bin").mkdir(parents=True)
    (folder / "instant" / "bin" / "python").write_text(INSTANT)
    (folder / "instant" / "bin" / "python").chmod(0o755)
    (folder / "instant.env").write_text(f"HVDQN_VENV={folder}/instant\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, clone: Path, folder: Path) -> Job:
    """Submit a job that reaches its time limit. It comes first, because Slurm checks limits only twice a minute."""
    limits = ["--time=2", "--signal=USR2@20"]
    return cluster.sbatch(*TWO_NODES, *limits, f"{clone}/slurm/train.sbatch", *STOPPABLE, cwd=folder)


@pytest.fixture(scope="module", autouse=True)
def too_short(cluster: Cluster, clone: Path, folder: Path, limited: Job) -> Job:
    """Submit a job that Slurm stops when it next checks limits."""
    return instant(cluster, clone, folder, "--time=5")


def instant(cluster: Cluster, clone: Path, folder: Path, *limits: str) -> Job:
    env = {"HVDQN_SITE_ENV": "./instant.env", "HVDQN_MPI": "none"}
    return cluster.sbatch(*ONE_NODE, *limits, f"{clone}/slurm/train.sbatch", cwd=folder, env=env)


def run_dir(clone: Path, job: Job) -> Path:
    return clone.parents[1] / "scratch" / job.id


def summary(path: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((path / "summary.json").read_text())
    return loaded


def wait_for_records(path: Path, job: Job, timeout: float) -> None:
    """Wait until the job has written metrics; its first line of progress comes before the first env step."""
    file = path / "metrics.jsonl"
    job.wait_until(lambda: file.exists() and file.stat().st_size > 0, "write metrics", timeout)


def check_resumed(clone: Path, job: Job, info: dict[str, str]) -> None:
    """Assert that the job was stopped once after a checkpoint, requeued, and finished from that checkpoint."""
    output = job.output()
    assert info["JobState"] == "COMPLETED", output
    assert info["Restarts"] == "1", output
    assert "stopped by a signal; requeued, restart 1 of at most 3" in output
    resumed = re.search(r"resumed from (.*) at env step ([\d,]+)", output)
    assert resumed is not None, output
    checkpoint, env_steps = Path(resumed[1]), int(resumed[2].replace(",", ""))
    assert checkpoint.parent == run_dir(clone, job) / "checkpoints"
    assert 0 < env_steps == int(checkpoint.name) < TOTAL
    recorded = [json.loads(line) for line in (run_dir(clone, job) / "metrics.jsonl").read_text().splitlines()]
    steps = [record["env_steps"] for record in recorded if "epsilon" in record]
    assert steps == sorted(set(steps))
    assert steps[0] < env_steps < steps[-1]
    assert summary(run_dir(clone, job)) | {
        "env_steps": TOTAL,
        "world_size": 2,
        "stopped_by": "finished",
    } == (summary(run_dir(clone, job)))


def test_ten_lines_of_readme(cluster: Cluster, tmp_path: Path) -> None:
    """From a clone of the last commit to a running job, without set-up and modules."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone: README's way from `git clone` to a job is NOT tested")
    editor = tmp_path / "editor"
    editor.write_text(
        f"#!/bin/sh\nprintf 'HVDQN_VENV=%s\\n' {shlex.quote(shlex.quote(sys.prefix))} >>\"$1\"\n"
    )
    editor.chmod(0o755)
    lines = [
        command(
            "git clone <this repository> hvdqn && cd hvdqn",
            {"<this repository>": f"--quiet {shlex.quote(str(REPOSITORY))}"},
        ),
        command("cp slurm/site.env.example slurm/site.env"),
        f"EDITOR={shlex.quote(str(editor))}",
        command("$EDITOR slurm/site.env"),
        command("source slurm/site.env"),
        command(
            "sbatch --ntasks=8 slurm/train.sbatch --preset minatar",
            {"--ntasks=8": shlex.join(ONE_NODE), "--preset minatar": shlex.join(WORKLOAD)},
        ),
        command("squeue --me"),
    ]
    trust = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    said = cluster.run("bash", "-ec", "\n".join(lines), cwd=tmp_path, env=trust)
    submitted = re.match(r"Submitted batch job (\d+)\n", said)
    assert submitted is not None, said
    job = Job(cluster, submitted[1])
    assert re.search(rf"^ +{job.id} +main +hvdqn ", said, re.MULTILINE), said
    assert job.wait(timeout=180)["JobState"] == "COMPLETED", job.output()
    assert summary(tmp_path / "hvdqn" / "runs" / job.id)["world_size"] == 2
    tail = cluster.run("bash", "-c", command("tail -f hvdqn-*.out", {"-f": "-n 100"}), cwd=tmp_path / "hvdqn")
    assert tail == job.output()


def test_two_nodes_train_and_arguments_are_unchanged(cluster: Cluster, clone: Path, folder: Path) -> None:
    named = f"""{clone.parents[1]}/runs of 'me' & "you"; $HOME *  \\"""
    kwargs = '{"sutton_barto_reward": true}'
    arguments = [*WORKLOAD, "--run-dir", named, "--env-kwargs", kwargs]
    job = cluster.sbatch(*TWO_NODES, f"{clone}/slurm/train.sbatch", *arguments, cwd=folder)
    info = job.wait(timeout=180)
    assert info["JobState"] == "COMPLETED", job.output()
    assert info["NodeList"] == "n[1-2]"
    assert info["StdOut"] == f"{folder}/hvdqn-{job.id}.out"
    done = summary(Path(named))
    assert done["world_size"] == 2
    assert done["comm"] == "horovod"
    assert done["env_steps"] == 2000
    config = yaml.safe_load((Path(named) / "config.yaml").read_text())
    assert config["env_kwargs"] == kwargs
    assert config["threads_per_rank"] == 1
    assert f"run directory: {named}; restarts: 0\n" in job.output()
    assert "\x1b" not in job.output(), "srun's terminal is none that somebody sees"
    assert job.output().count("\nenv steps 0/2,000 (0%)") == 1
    assert job.output().count("\nenv steps 2,000/2,000 (100%)") == 1
    assert not run_dir(clone, job).exists()


@pytest.mark.parametrize("whom", [[], ["--batch"]], ids=["ranks", "script"])
def test_usr2_checkpoints_requeues_and_resumes(
    cluster: Cluster, clone: Path, folder: Path, whom: list[str]
) -> None:
    job = cluster.sbatch(*ONE_NODE, f"{clone}/slurm/train.sbatch", *STOPPABLE, cwd=folder)
    wait_for_records(run_dir(clone, job), job, timeout=120)
    line = command("scancel --signal=USR2 JOB", {"JOB": job.id})
    cluster.run(*line.split(), *whom)
    check_resumed(clone, job, job.wait(timeout=180))


def test_preempted_job_is_requeued_and_resumes(cluster: Cluster, clone: Path, folder: Path) -> None:
    exclusive = ["--nodelist=n2", "--exclusive"]  # Slurm preempts with SIGTERM, then waits for GraceTime
    job = cluster.sbatch(*ONE_NODE, *exclusive, f"{clone}/slurm/train.sbatch", *STOPPABLE, cwd=folder)
    wait_for_records(run_dir(clone, job), job, timeout=180)
    urgent = cluster.sbatch("--partition=urgent", *exclusive, "--wrap=sleep 1", cwd=folder)
    check_resumed(clone, job, job.wait(timeout=180))
    assert urgent.wait(timeout=1)["JobState"] == "COMPLETED"


def test_a_short_job_that_is_preempted_at_once_is_requeued(
    cluster: Cluster, clone: Path, folder: Path
) -> None:
    """Its time limit is short enough for --signal, but that is not what stopped it."""
    limits = ["--nodelist=n2", "--exclusive", "--time=5", "--signal=USR2@10"]
    job = instant(cluster, clone, folder, *limits)
    job.wait_for("training", timeout=180)
    urgent = cluster.sbatch("--partition=urgent", *limits[:2], "--wrap=sleep 1", cwd=folder)
    info = job.wait(timeout=180)
    assert (info["JobState"], info["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert "stopped by a signal; requeued, restart 1 of at most 20" in job.output()
    assert urgent.wait(timeout=1)["JobState"] == "COMPLETED"


def test_cancelled_job_stays_cancelled(cluster: Cluster, clone: Path, folder: Path) -> None:
    job = cluster.sbatch(*ONE_NODE, f"{clone}/slurm/train.sbatch", *WORKLOAD, *ENDLESS, cwd=folder)
    wait_for_records(run_dir(clone, job), job, timeout=120)
    cluster.run(*command("scancel JOB", {"JOB": job.id}).split())
    info = job.wait(timeout=60)
    assert info["JobState"] == "CANCELLED", job.output()
    assert info["Restarts"] == "0"
    assert "Slurm ends this job" in job.output()
    assert summary(run_dir(clone, job))["stopped_by"] == "signal"


def test_killed_rank_fails_the_job(cluster: Cluster, clone: Path, folder: Path) -> None:
    job = cluster.sbatch(*TWO_NODES, f"{clone}/slurm/train.sbatch", *WORKLOAD, *ENDLESS, cwd=folder)
    wait_for_records(run_dir(clone, job), job, timeout=120)
    ranks = job.ranks()
    assert sorted(ranks) == [0, 1]
    killed = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    info = job.wait(timeout=60)
    seconds = time.monotonic() - killed
    print(f"srun, kill -9 to end: {seconds:.1f} s")
    assert seconds < 30  # the other rank stops by itself; Slurm would kill it later
    assert info["JobState"] == "FAILED", job.output()
    assert info["Restarts"] == "0"
    assert not any(process.is_running() for process in ranks.values())


def test_a_job_that_is_always_stopped_ends_at_the_bound(cluster: Cluster, clone: Path, folder: Path) -> None:
    job = cluster.sbatch(
        "--ntasks=1",
        "--cpus-per-task=1",
        f"{clone}/slurm/train.sbatch",
        *WORKLOAD,
        "--wrapper",
        "environments:always_stopped",
        cwd=folder,
        env={"HVDQN_MAX_RESTARTS": "1"},
    )
    info = job.wait(timeout=180)
    assert info["JobState"] == "FAILED", job.output()
    assert info["Restarts"] == "1"
    assert info["ExitCode"] == "75:0"
    assert "not requeued after 1 restarts (HVDQN_MAX_RESTARTS=1)" in job.output()


def test_wrong_input_ends_at_once_with_its_exit_code(cluster: Cluster, clone: Path, folder: Path) -> None:
    gpus = "--gpus-per-node=1"  # counted before anything is started
    job = cluster.sbatch(*ONE_NODE, gpus, f"{clone}/slurm/train.sbatch", "--preset", "smok", cwd=folder)
    info = job.wait(timeout=120)
    assert info["JobState"] == "FAILED"
    assert info["Restarts"] == "0"
    assert info["ExitCode"] == "2:0", job.output()
    assert "warning: 2 ranks and 1 GPUs; for one rank per GPU use --ntasks-per-node=1" in job.output()
    assert job.output().count("unknown preset 'smok'; did you mean 'smoke'?") == 1


def test_the_wrong_mpi_of_srun_ends_each_rank(cluster: Cluster, clone: Path, folder: Path) -> None:
    train = [f"{clone}/slurm/train.sbatch", *WORKLOAD]
    job = cluster.sbatch(*ONE_NODE, *train, cwd=folder, env={"HVDQN_MPI": "none"})
    info = job.wait(timeout=120)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "1:0", "0"), job.output()
    assert "was not built with SLURM's PMI support" in job.output()


def test_sweep_gives_each_line_a_run_directory(cluster: Cluster, clone: Path, folder: Path) -> None:
    (folder / "seeds.txt").write_text(
        "# Three seeds, two environments.\n"
        "--env CartPole-v1 --seed 1\n"
        """--env CartPole-v1 --seed 2 --env-kwargs '{"sutton_barto_reward": true}'\n"""
        "\n"
        "--env Acrobot-v1 --seed 3 --eval-episodes 1\n"
    )
    line = command(
        "sbatch --array=1-6 slurm/sweep.sbatch slurm/sweep.example.txt --preset minatar",
        {
            "1-6": "1-3 --cpus-per-task=1",
            "slurm/sweep.sbatch": shlex.quote(f"{clone}/slurm/sweep.sbatch"),
            "slurm/sweep.example.txt": "seeds.txt",
            "--preset minatar": shlex.join(WORKLOAD),
        },
    )
    array = cluster.sbatch(*shlex.split(line)[1:], cwd=folder)
    runs = []
    for task in (1, 2, 3):
        job = Job(cluster, f"{array.id}_{task}")
        assert job.wait(timeout=180)["JobState"] == "COMPLETED", job.output()
        runs.append(summary(run_dir(clone, job)))
    assert [run["seed"] for run in runs] == [1, 2, 3]
    assert [run["env"] for run in runs] == ["CartPole-v1", "CartPole-v1", "Acrobot-v1"]
    second = yaml.safe_load((run_dir(clone, Job(cluster, f"{array.id}_2")) / "config.yaml").read_text())
    assert second["env_kwargs"] == '{"sutton_barto_reward": true}'


def test_scaling_ends_in_a_table(cluster: Cluster, clone: Path, folder: Path) -> None:
    line = command(
        "sbatch --ntasks=8 slurm/scaling.sbatch --seconds 60 --preset atari",
        {
            "--ntasks=8": shlex.join(TWO_NODES),
            "slurm/": shlex.quote(f"{clone}/slurm/"),
            "--seconds 60 --preset atari": shlex.join(["--seconds", "1", *WORKLOAD]),
        },
    )
    job = cluster.sbatch(*shlex.split(line)[1:], cwd=folder)
    assert job.wait(timeout=240)["JobState"] == "COMPLETED", job.output()
    for ranks in (1, 2):
        loop = json.loads((run_dir(clone, job) / f"{ranks}-ranks.json").read_text())
        assert loop["world_size"] == ranks
    table = (run_dir(clone, job) / "scaling.txt").read_text()
    assert job.output().endswith(table)
    rows = re.findall(r"^\W*(\d+)\W.*?(\d+%)", table, re.MULTILINE)
    assert [ranks for ranks, _ in rows] == ["1", "2"]
    assert rows[0] == ("1", "100%")


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["train.sbatch"], {"HVDQN_SITE_ENV": "/absent/site.env"}, "HVDQN_SITE_ENV names /absent/site.env"),
        (["scaling.sbatch"], {}, "one task leaves nothing to compare"),
        (["sweep.sbatch"], {}, "no list of runs"),
        (["sweep.sbatch", "absent.txt"], {}, "cannot read the list 'absent.txt'"),
        (["--array=2", "sweep.sbatch", "one.txt"], {}, "'one.txt' has 1 runs and this is task 2"),
        (["--array=1", "sweep.sbatch", "quote.txt"], {}, "has an open quote"),
        (
            ["train.sbatch"],
            {"HVDQN_SITE_ENV": "./absent-venv.env"},
            "HVDQN_VENV names /absent, which has no bin/python",
        ),
        (["train.sbatch"], {"HVDQN_SITE_ENV": "./no-torch.env"}, " has no torch; run launch/setup.sh"),
        (["train_container.sbatch"], {}, "HVDQN_IMAGE is not set"),
        (["train_container.sbatch"], {"HVDQN_IMAGE": "absent.sif"}, "cannot read HVDQN_IMAGE absent.sif"),
        (
            ["train_container.sbatch"],
            {"HVDQN_IMAGE": "image.sif"},
            "no apptainer in PATH on n1; load its module",
        ),
        (["train_container.sbatch"], {"HVDQN_IMAGE": "image.sqsh"}, "this Slurm is without pyxis"),
    ],
)
def test_wrong_input_is_refused_with_a_remedy(
    cluster: Cluster, clone: Path, folder: Path, words: list[str], env: dict[str, str], message: str
) -> None:
    (folder / "one.txt").write_text("--seed 1\n")
    (folder / "quote.txt").write_text("--env-kwargs '{}\n")
    (folder / "absent-venv.env").write_text("HVDQN_VENV=/absent\n")
    for name in ("no-torch.env", "image.sif", "image.sqsh"):
        (folder / name).touch()
    words = [f"{clone}/slurm/{word}" if word.endswith(".sbatch") else word for word in words]
    job = cluster.sbatch("--cpus-per-task=1", *words, cwd=folder, env=env)
    info = job.wait(timeout=60)
    assert info["ExitCode"] == "2:0", job.output()
    assert message in job.output()


def test_a_script_from_stdin_asks_for_its_repository(cluster: Cluster, clone: Path, folder: Path) -> None:
    script = f"sbatch --parsable --ntasks=1 --cpus-per-task=1 <'{clone}/slurm/train.sbatch'"
    job = Job(cluster, cluster.run("bash", "-c", script, cwd=folder).strip())
    assert job.wait(timeout=60)["ExitCode"] == "2:0"
    assert "export HVDQN_HOME" in job.output()


def test_time_limit_checkpoints_requeues_and_resumes(limited: Job, clone: Path) -> None:
    check_resumed(clone, limited, limited.wait(timeout=180))


def test_a_time_limit_within_reach_of_the_signal_is_named(too_short: Job) -> None:
    info = too_short.wait(timeout=180)
    assert (info["JobState"], info["Restarts"]) == ("FAILED", "0"), too_short.output()
    assert info["ExitCode"] == "75:0"
    assert (
        "not requeued: --time must be well above the 300 s of --signal; give --time=0:30:00"
        in too_short.output()
    )
