"""Training over several hosts through the launch scripts: each has its own network, hostname and ssh server."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch.hosts import Cluster, require_namespaces
from tests.launchers import REPOSITORY, Result, clean_environment
from tests.readme import command

pytestmark = pytest.mark.launch

# README's command for each launcher, and flags to add.
SCRIPTS = {
    "horovodrun-gloo": (
        "launch/horovodrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "--gloo",
    ),
    "horovodrun-mpi": (
        "launch/horovodrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "",
    ),
    "mpirun": (
        "launch/mpirun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "",
    ),
    "torchrun": (
        "launch/torchrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "",
    ),
    "elastic": (
        "launch/elastic.sh --hosts h1:4,h2:4,h3:4 --interfaces eth0 -- --preset minatar"
        " --run-dir /shared/runs/breakout",
        "",
    ),
}
LAUNCHERS = tuple(name for name in SCRIPTS if name != "elastic")
PROGRAM = str(Path(__file__).with_name("train_and_report.py"))
TRAIN = "--preset smoke --total-env-steps 1000 --target-every 500 --eval-episodes 2"
# One-way delay and rate of each link: a slow office network.
DELAY_MS, MBIT = 5.0, 100.0
# One in the environment of the launching shell, one in the file that --env-file names.
SHELL_SECRET, FILE_SECRET = "shell-5f1b0e7c", "file-93ad44c2"


@dataclass(frozen=True)
class Training:
    """A finished run over several hosts."""

    result: Result
    summary: dict[str, Any]
    ranks: dict[int, tuple[str, str, str]]  # rank -> host, names of its secrets, hash of its parameters
    command_lines: str  # all that `ps` showed on the hosts other than the first during the run


class CommandLines(threading.Thread):
    """Collects the command lines of all processes on the hosts other than the first, until `stop`."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self._cluster, self._stopped, self._found = cluster, threading.Event(), set[str]()

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            for host in self._cluster.hosts[1:]:
                self._found.update(host.command_lines())

    def stop(self) -> str:
        self._stopped.set()
        self.join()
        return "\n".join(self._found)


def environment() -> dict[str, str]:
    return clean_environment() | {"HVDQN_VENV": sys.prefix}


def script(launcher: str, hosts: str, flags: str, training: str, run_dir: Path) -> list[str]:
    """Return README's command for a launcher, with other hosts and training flags."""
    line, added = SCRIPTS[launcher]
    before, after = line.split(" -- ")
    replaced = {
        "launch/": shlex.quote(f"{REPOSITORY}/launch/"),
        before.split()[2]: f"{hosts} {added} {flags}",
        after: f"{training} --run-dir {shlex.quote(str(run_dir))}",
    }
    return ["bash", "-c", f"exec {command(line, replaced)}"]


def train(cluster: Cluster, launcher: str, hosts: str, folder: Path) -> Training:
    """Train over some hosts, with one secret in the environment and one in a file."""
    run_dir, secrets = folder / "run", folder / "secrets.env"
    secrets.touch(mode=0o600)
    secrets.write_text(f"SERVICE_TOKEN={FILE_SECRET}\n")
    program = f"{shlex.join([sys.executable, PROGRAM])} {TRAIN}"
    words = script(launcher, hosts, f"--env-file {shlex.quote(str(secrets))}", program, run_dir)
    command_lines = CommandLines(cluster)
    command_lines.start()
    with cluster.start(words, environment() | {"WANDB_API_KEY": SHELL_SECRET}, 120, folder) as job:
        result = job.wait()
    seen = command_lines.stop()
    assert result.returncode == 0, result
    assert cluster.left_behind() == []
    ranks = re.findall(r"rank (\d+) on (\S+) has (.+), parameters (\w{64})", result.stdout)
    return Training(
        result,
        json.loads((run_dir / "summary.json").read_text()),
        {int(rank): (host, secrets, digest) for rank, host, secrets, digest in ranks},
        seen,
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_namespaces()
    with Cluster(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def slow_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_namespaces()
    with Cluster(2, tmp_path_factory.mktemp("slow"), DELAY_MS, MBIT) as made:
        print(f"links are slowed by {made.slowed_by}")
        yield made


@pytest.fixture(scope="module")
def trainings(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train over h1 and h2 with a launcher, once."""
    return functools.cache(
        lambda launcher: train(cluster, launcher, "h1:1,h2:1", tmp_path_factory.mktemp(launcher))
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_end_with_the_same_parameters(launcher: str, trainings: Any) -> None:
    training = trainings(launcher)
    assert [host for _, (host, _, _) in sorted(training.ranks.items())] == ["h1", "h2"], training.result
    assert training.summary["world_size"] == 2
    assert training.summary["env_steps"] >= 1000
    digests = {digest for _, _, digest in training.ranks.values()}
    assert digests == {training.summary["param_sha256"]}, training.result


def test_launchers_agree_to_the_last_bit(trainings: Any) -> None:
    """The sum of two floats does not depend on their order, so all engines and networks give the same parameters."""
    digests = {launcher: trainings(launcher).summary["param_sha256"] for launcher in LAUNCHERS}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize(
    ("launcher", "comm", "engine"),
    [
        ("horovodrun-gloo", "auto", "Horovod"),
        ("mpirun", "auto", "Horovod"),
        ("mpirun", "mpi", "MPI"),
        ("torchrun", "auto", "torch.distributed"),
    ],
)
def test_two_ranks_on_each_of_two_hosts(
    launcher: str, comm: str, engine: str, cluster: Cluster, tmp_path: Path
) -> None:
    worker = REPOSITORY / "tests" / "distributed" / "comm_worker.py"
    program = shlex.join([sys.executable, str(worker), "conformance", comm, "on"])
    with cluster.start(
        script(launcher, "h1:2,h2:2", "", program, tmp_path), environment(), 120, tmp_path
    ) as job:
        result = job.wait()
    assert result.returncode == 0, result
    for rank in range(4):
        line = f"rank {rank} of 4 passed over .*, {engine} between hosts, shared memory within, bits"
        assert re.search(line, result.stdout), result
    assert cluster.left_behind() == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_secret_shows_in_ps_on_the_other_host(launcher: str, trainings: Any) -> None:
    training = trainings(launcher)
    assert PROGRAM in training.command_lines, "the ranks of h2 were not seen, so this test proves nothing"
    if launcher in ("horovodrun-gloo", "torchrun"):
        assert "HVDQN_TEST_ID=" in training.command_lines, "these launchers put variables on command lines"
    assert SHELL_SECRET not in training.command_lines
    assert FILE_SECRET not in training.command_lines
    # Ranks get the secret of the file, not that of the launching shell.
    assert {secrets for _, secrets, _ in training.ranks.values()} == {"SERVICE_TOKEN"}, training.result


def test_three_hosts(cluster: Cluster, tmp_path: Path) -> None:
    training = train(cluster, "horovodrun-gloo", "h1:1,h2:1,h3:1", tmp_path)
    assert {host for host, _, _ in training.ranks.values()} == {"h1", "h2", "h3"}, training.result
    assert len({digest for _, _, digest in training.ranks.values()}) == 1, training.result
    assert training.summary["world_size"] == 3


@pytest.mark.parametrize(
    ("hosts", "ranks"),
    [("h1:1,h2:2,h3:1", "0 of 1 on h1, 0 of 1 on h2"), ("h2:2,h3:1", "0 of 2 on h2, 1 of 2 on h2")],
)
def test_torchrun_does_not_wait_for_hosts_without_ranks(
    hosts: str, ranks: str, cluster: Cluster, tmp_path: Path
) -> None:
    # One write, because the ranks share the output.
    program = (
        "import os, sys; import torch.distributed as group; group.init_process_group('gloo'); "
        "place = (os.environ['LOCAL_RANK'], os.environ['LOCAL_WORLD_SIZE'], os.uname().nodename); "
        "sys.stdout.write('%s of %s on %s\\n' % place)"
    )
    words = [f"{REPOSITORY}/launch/torchrun.sh", "--hosts", hosts, "--interfaces", "eth0", "-np", "2"]
    with cluster.start([*words, "--", sys.executable, "-c", program], environment(), 60, tmp_path) as job:
        result = job.wait()
    assert result.returncode == 0, result
    assert ", ".join(sorted(result.stdout.splitlines())) == ranks, result
    assert cluster.left_behind() == []


def test_the_slow_network_is_slow(slow_cluster: Cluster) -> None:
    """Checked by itself, because the next test depends on it."""
    here = slow_cluster.hosts[0]
    program = (
        "import socket, time; t = time.time(); socket.create_connection(('h2', 22)); print(time.time() - t)"
    )
    assert float(here.run(sys.executable, "-c", program)) >= 2 * DELAY_MS / 1000
    began = time.monotonic()
    here.run("bash", "-c", "head -c 2500000 /dev/zero | ssh h2 'cat >/dev/null'")
    assert time.monotonic() - began > 2_500_000 * 8 / (MBIT * 1e6)


@pytest.mark.parametrize(
    "launcher", ["horovodrun-gloo", "mpirun", "torchrun"]
)  # mpirun stands for horovodrun-mpi
def test_a_slow_network_changes_only_the_time(
    launcher: str, slow_cluster: Cluster, trainings: Any, tmp_path: Path
) -> None:
    fast, slow = trainings(launcher), train(slow_cluster, launcher, "h1:1,h2:1", tmp_path)
    assert slow.summary["param_sha256"] == fast.summary["param_sha256"]
    assert {digest for _, _, digest in slow.ranks.values()} == {fast.summary["param_sha256"]}
    # Each update waits for the message of the other host.
    seconds, updates = slow.summary["seconds"], slow.summary["updates"]
    assert seconds["comm"] > updates * DELAY_MS / 1000
    assert seconds["comm"] == max(seconds[phase] for phase in ("act", "env", "sample", "comm")), seconds


def test_elastic_over_three_hosts(cluster: Cluster, tmp_path: Path) -> None:
    words = script("elastic", "h1:1,h2:1,h3:1", "", TRAIN, tmp_path / "run")
    with cluster.start(words, environment(), 120, tmp_path) as job:
        result = job.wait()
    assert result.returncode == 0, result
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 3
    assert cluster.left_behind() == []


@pytest.mark.parametrize("launcher", ["horovodrun-gloo", "torchrun"])
def test_a_stop_reaches_all_hosts(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    endless = "--preset smoke --total-env-steps 100000000"
    words = script(launcher, "h1:1,h2:1", "", endless, tmp_path / "run")
    with cluster.start(words, environment(), 120, tmp_path) as job:
        job.wait_for("/s  updates")
        for process in job.launcher.children():  # nsenter's only child is the script
            process.terminate()
        result = job.wait()
    assert result.returncode == 75, result
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_by"] == "signal"
    assert cluster.left_behind() == []


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_a_host_that_is_down_is_named(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    words = script(launcher, "h1:1,h9:1", "", "--preset smoke", tmp_path / "run")
    with cluster.start(words, environment(), 60, tmp_path) as job:
        result = job.wait()
    assert result.returncode == 1, result
    name = Path(SCRIPTS[launcher][0].split()[0]).name
    assert re.fullmatch(rf"{name}: error: cannot reach host h9 by ssh: .+\n", result.stderr), result
    assert not (tmp_path / "run").exists()
    assert cluster.left_behind() == []


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_a_host_without_hvdqn_is_named(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    """The environment is on a file system that h3 does not have."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "venv").symlink_to(sys.prefix)
    cluster.hosts[2].run("mount", "-t", "tmpfs", "none", str(tmp_path / "disk"))
    words = script(launcher, "h1:1,h3:1", "", "--preset smoke", tmp_path / "run")
    env = environment() | {"HVDQN_VENV": str(tmp_path / "disk" / "venv")}
    with cluster.start(words, env, 60, tmp_path) as job:
        result = job.wait()
    assert result.returncode == 2, result
    assert "error: host h3 lacks some of what this host has" in result.stderr, result
    assert str(tmp_path / "disk" / "venv" / "bin" / "python") in result.stderr, result
