"""A Slurm cluster of two nodes on this machine, with real munged, slurmctld and slurmd. All processes end with it.

    with Cluster() as cluster:
        job = cluster.sbatch("--ntasks=2", "slurm/train.sbatch", "--preset", "smoke", cwd=tmp_path)
        assert job.wait(timeout=60)["JobState"] == "COMPLETED"

The cluster runs in namespaces of its own. Its first process is the init of a PID namespace. When that is killed (at the
end of the `with` block, or by the kernel when this process dies), all daemons, tasks and the network end too. Each node
has its own host name and network interface. The nodes share the file system, as on a cluster.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

# slurmd looks for libpmix.so, which only libpmix-dev has.
PACKAGES = "slurm-wlm munge libpmix-dev"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "nsenter", "unshare", "setpriv", "ip")
NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# cred_expire: a requeued job starts only after its old credentials have expired, by default after 120 s. TmpFS: PMIx
# uses the same file names on both nodes, which share the file system. The GPUs are counted and allocated, but not used.
# Timeouts: on a busy machine a daemon may need more than Slurm's 10 s; srun would then start only some of the ranks.
CONFIGURATION = """\
ClusterName=hvdqn
SlurmctldHost=n1({address})
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
TmpFS={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
MessageTimeout=60
TCPTimeout=30
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES GraceTime=60 PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=8 Gres=gpu:2"
GPUS = "NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n"


def why_not() -> str:
    """Return why no cluster can be started on this machine, with the remedy; "" if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "the daemons need root"
    probe = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount-proc", "--net", "--uts", "true"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else ""


@dataclass(frozen=True)
class Job:
    """A submitted job: Slurm's record, its output and the processes of its ranks."""

    cluster: Cluster
    id: str

    def info(self) -> dict[str, str]:
        """Return Slurm's record: JobState, Restarts, ExitCode, Reason, NodeList, StdOut, ..."""
        fields = re.split(
            r"\s+(?=[A-Z][\w/:]*=)", self.cluster.run("scontrol", "show", "job", self.id).strip()
        )
        return dict(field.split("=", 1) for field in fields)

    def output(self) -> str:
        """Return the output of the batch script and all ranks, over all starts."""
        path = Path(self.info()["StdOut"])
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for(self, text: str, timeout: float) -> None:
        """Wait until the output contains `text`."""
        self.wait_until(lambda: text in self.output(), f"print {text!r}", timeout)

    def wait(self, timeout: float) -> dict[str, str]:
        """Wait until the job has ended and is not requeued; return Slurm's record."""
        self.wait_until(lambda: self.info()["JobState"] in FINAL_STATES, "end", timeout)
        return self.info()

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that run `hvdqn.train`, by rank."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                if environment.get("SLURM_JOB_ID") == self.id and "hvdqn.train" in process.cmdline()[1:3]:
                    found[int(environment["SLURM_PROCID"])] = process
        return found

    def wait_until(self, done: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait until `done` returns True. `what` is what the job should do by then, or "end"."""
        deadline = time.monotonic() + timeout
        while not done():
            info = self.info()
            over = what != "end" and info["JobState"] in FINAL_STATES
            if over or time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.id} did not {what} within {timeout:g} s\n{info}\n"
                    f"--- output\n{self.output()[-6000:]}\n--- daemons\n{self.cluster.logs()}"
                )
            time.sleep(0.2)


class Cluster:
    """A running cluster; use it as a context manager."""

    def __init__(self) -> None:
        self._folder = Path(
            tempfile.mkdtemp(prefix="slurm-")
        )  # short: a socket's path has at most 107 characters
        self._processes: list[subprocess.Popen[bytes]] = []
        self._hosts: dict[str, int] = {}  # host -> pid of a process in its namespaces
        self._environment = {
            "PATH": os.defpath + ":/usr/sbin:/sbin",  # a login shell's: no virtual environment
            "HOME": str(Path.home()),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self._folder / "slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes and remove the folder; fail if a process is left."""
        for process in self._processes[:1]:  # init: the kernel then kills the others
            process.kill()
        for process in self._processes:
            process.wait(timeout=30)
        deadline = time.monotonic() + 10
        while left := [process for process in psutil.process_iter() if self._is_ours(process)]:
            if time.monotonic() > deadline:  # the kernel may take some time
                break
            time.sleep(0.1)
        shutil.rmtree(self._folder)
        assert not left, f"left behind by the cluster: {left}"

    def run(self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run a command on the first node, as from a login shell; return its output."""
        done = subprocess.run(
            [*self._enter("n1"), "env", "-C", str(cwd or self._folder), *words],
            env=self._environment | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Job:
        """Submit a batch script."""
        return Job(self, self.run("sbatch", "--parsable", *words, cwd=cwd, env=env).strip())

    def logs(self) -> str:
        """Return the last lines of the logs of all daemons."""
        return "\n".join(
            f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-20:])
            for path in sorted(self._folder.glob("*.log"))
        )

    def _configure(self) -> None:
        for name in ("state", *NODES):
            (self._folder / name).mkdir()
        key = self._folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        nodes = "\n".join(NODE.format(name=name, address=address) for name, address in NODES.items())
        settings = CONFIGURATION.format(folder=self._folder, address=NODES["n1"], nodes=nodes)
        (self._folder / "slurm.conf").write_text(settings)
        (self._folder / "gres.conf").write_text(GPUS)

    def _start(self) -> None:
        isolate = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net", "--uts", "--ipc"]
        # A /dev/shm of its own, because killed ranks leave their shared memory there.
        self._add_host("n1", ["setpriv", "--pdeathsig", "KILL", *isolate], "mount -t tmpfs tmpfs /dev/shm")
        self._add_host("n2", [*self._enter("n1"), "unshare", "--net", "--uts"], "true")
        self._connect_hosts()
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
        }
        flags = [f"--{flag}={self._folder / name}" for flag, name in files.items()]
        idle = {f"{name} idle" for name in NODES}
        # --force: munged refuses folders below /tmp, which everybody may write to. Its output says more than its log.
        munged = ["munged", "--foreground", "--force", "--log-file=/dev/null", *flags]
        self._spawn("munged", [*self._enter("n1"), *munged])
        self._spawn("slurmctld", [*self._enter("n1"), "slurmctld", "-D"])
        for name in NODES:
            self._spawn(f"slurmd-{name}", [*self._enter(name), "slurmd", "-D", "-N", name])
        self._until(lambda: set(self._try("sinfo", "-hNo", "%N %T").splitlines()) == idle, "idle nodes")
        assert "can not load PMIx" not in self.logs(), f"slurmd finds no PMIx; apt-get install {PACKAGES}"

    def _add_host(self, name: str, isolate: list[str], prepare: str) -> None:
        """Start a process whose namespaces are one host."""
        ready = self._folder / f"{name}.ready"
        # The first shell is init. It waits, so it reaps the orphans of daemons.
        script = (
            f"hostname {name} && ip link set lo up && {prepare} && touch {ready} && sleep infinity & wait"
        )
        process = self._spawn(f"host-{name}", [*isolate, "bash", "-c", script])
        self._until(ready.exists, f"the namespaces of {name}")
        self._hosts[name] = psutil.Process(process.pid).children()[0].pid

    def _connect_hosts(self) -> None:
        n1, n2 = (["nsenter", "--target", str(pid), "--net", "ip"] for pid in self._hosts.values())
        peer = ["peer", "name", "eth0", "netns", str(self._hosts["n2"])]
        commands = [[*n1, "link", "add", "eth0", "type", "veth", *peer]]
        for host, address in zip((n1, n2), NODES.values(), strict=True):
            commands.append([*host, "addr", "add", f"{address}/24", "dev", "eth0"])
            commands.append([*host, "link", "set", "eth0", "up"])
        for command in commands:
            subprocess.run(command, check=True, timeout=30)

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", "--target", str(self._hosts[name]), "--all"]

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        self._processes.append(process)
        return process

    def _until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, f"waited 60 s for {what}\n{self.logs()}"
            time.sleep(0.1)

    def _try(self, *words: str) -> str:
        with contextlib.suppress(AssertionError):
            return self.run(*words)
        return ""

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            return process.environ().get("SLURM_CONF") == self._environment["SLURM_CONF"]
        return False
