"""Several hosts on one machine: each with its own network, hostname and processes, and an ssh server.

    with Cluster(3, folder) as cluster:
        job = cluster.start(["launch/mpirun.sh", "--hosts", "h1:1,h2:1"], env, timeout=60)  # on h1

The hosts h1, h2, ... share the file system, like those of a cluster. They are namespaces of processes that end with
this one. The machine's own network, /etc and ~/.ssh do not change, even if the tests are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from tests.launchers import Job

_PROGRAMS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter")
_NETWORK = "10.77.0"
_SETTLE_SECONDS = 60  # the machine may be busy


def require_namespaces() -> None:
    """Skip the test, with the reason, if namespaces cannot be made."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed (apt install iproute2 openssh-server): NOT TESTED on hosts"
        )
    if os.geteuid() != 0:
        pytest.skip("not root, so no network namespaces: NOT TESTED on several hosts")
    if subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], check=False
    ).returncode:
        pytest.skip("namespaces are not permitted here (a container?): NOT TESTED on several hosts")
    if " " in sys.prefix:
        pytest.skip(
            f"Open MPI does not quote {sys.prefix} when it starts ranks through ssh: NOT TESTED on several hosts"
        )


class Host:
    """One host; its processes are children of `init`."""

    def __init__(self, name: str, address: str, init: int) -> None:
        self.name, self.address, self.init = name, address, init

    def command(self, words: Sequence[str], cwd: str | Path = "/") -> list[str]:
        """Return the command that runs `words` on this host."""
        return [
            "nsenter",
            f"--target={self.init}",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            f"--wd={cwd}",
            "--",
            *words,
        ]

    def run(self, *words: str) -> str:
        """Run a command on this host; return its output."""
        return subprocess.run(
            self.command(words), check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def command_lines(self) -> list[str]:
        """Return the command line of every process on this host, as `ps` shows them."""
        lines = []
        for file in Path(f"/proc/{self.init}/root/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
        return [line for line in lines if line]

    def busy(self) -> list[str]:
        """Return the command lines of all processes but the ssh server."""
        return [
            line
            for line in self.command_lines()
            if not Path(line.split()[0].rstrip(":")).name.startswith("sshd")
        ]


class Cluster:
    """Hosts h1, h2, ... on one switch. root can log in from each to every other one by ssh.

    Args:
        hosts: number of hosts.
        folder: where to write keys and logs.
        delay_ms: delay of each host's link, in each direction.
        mbit: rate of each host's link in Mbit/s, in each direction; used if there is a delay.
    """

    def __init__(self, hosts: int, folder: Path, delay_ms: float = 0, mbit: float = 0) -> None:
        self.folder, self.delay_ms, self.mbit = folder, delay_ms, mbit
        self._names = [f"h{number}" for number in range(1, hosts + 1)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.hosts: list[Host] = []
        self.slowed_by = ""

    def __enter__(self) -> Cluster:
        try:
            self._write_ssh_files()
            self._switch = self._spawn(["unshare", "--net", "sleep", "infinity"])
            self.hosts = [self._boot(number, name) for number, name in enumerate(self._names, start=1)]
            self._connect()
            for host in self.hosts:
                _until(lambda host=host: self._answers(host), f"sshd of {host.name}")  # type: ignore[misc]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # When the first process of a PID namespace dies, the kernel kills the others and removes the network.
        for host in self.hosts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.init, signal.SIGKILL)
        for process in self._processes:
            process.kill()
            process.wait()

    def start(self, words: Sequence[str], env: Mapping[str, str], timeout: float, cwd: Path) -> Job:
        """Start a command on h1; see `tests.launchers.Job`."""
        return Job(self.hosts[0].command(words, cwd), 0, timeout, env, cwd)

    def left_behind(self) -> list[str]:
        """Return what still runs on any host; wait some seconds for it to end."""
        deadline = time.monotonic() + 10
        while (busy := [f"{host.name}: {line}" for host in self.hosts for line in host.busy()]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        return busy

    def _write_ssh_files(self) -> None:
        for key in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True
            )
        names = ",".join(self._names)
        (self.folder / "known_hosts").write_text(f"{names} {(self.folder / 'host_key.pub').read_text()}")
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/user_key\nUserKnownHostsFile {self.folder}/known_hosts\n"
        )
        # h9 has an address, but no such host is running.
        addresses = [(number, name) for number, name in enumerate(self._names, start=1)] + [(9, "h9")]
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{_NETWORK}.{number} {name}\n" for number, name in addresses)
        )
        (self.folder / "sshd_config").write_text(
            textwrap.dedent(f"""\
                HostKey {self.folder}/host_key
                AuthorizedKeysFile {self.folder}/user_key.pub
                PidFile none
                StrictModes no
                PasswordAuthentication no
                PermitRootLogin yes
                """)
        )

    def _spawn(self, words: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        with (self.folder / "namespaces.log").open("ab") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        self._processes.append(process)
        return process

    def _boot(self, number: int, name: str) -> Host:
        script = textwrap.dedent(f"""\
            set -e
            echo {name} >/proc/sys/kernel/hostname
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config
            mount -t tmpfs none /run
            mkdir /run/sshd
            ip link set lo up
            exec "$(command -v sshd)" -D -f {self.folder}/sshd_config -E {self.folder}/sshd-{name}.log
            """)
        flags = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        parent = psutil.Process(self._spawn(["unshare", *flags, "bash", "-c", script]).pid)
        _until(lambda: len(parent.children()) == 1, f"first process of {name}")
        return Host(name, f"{_NETWORK}.{number}", parent.children()[0].pid)

    def _connect(self) -> None:
        relayed = bool(self.delay_ms) and not _kernel_has_netem(self._switch.pid)
        if relayed:
            self._relay()
        else:
            self._on_switch("ip", "link", "add", "switch", "type", "bridge")
            self._on_switch("ip", "link", "set", "switch", "up")
        for host in self.hosts:
            if not relayed:
                port = f"port-{host.name}"
                peer = ["peer", "name", "eth0", "netns", str(host.init)]
                self._on_switch("ip", "link", "add", port, "type", "veth", *peer)
                self._on_switch("ip", "link", "set", port, "master", "switch", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            if self.delay_ms and not relayed:
                limits = ["delay", f"{self.delay_ms}ms", "rate", f"{self.mbit}mbit"]
                host.run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", *limits)
                self.slowed_by = "tc netem"

    def _relay(self) -> None:
        """Connect the hosts by a program that delays every frame, for kernels without netem."""
        relay = Path(__file__).with_name("slow_link.py")
        inits = [str(host.init) for host in self.hosts]
        switch = ["nsenter", f"--target={self._switch.pid}", "--net"]
        self._spawn([*switch, sys.executable, relay, str(self.delay_ms / 1e3), str(self.mbit * 1e6), *inits])
        for host in self.hosts:
            _until(lambda host=host: "eth0" in host.run("ip", "-brief", "link"), f"link of {host.name}")  # type: ignore[misc]
        self.slowed_by = "tests/launch/slow_link.py"

    def _on_switch(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--target={self._switch.pid}", "--net", *words], check=True, timeout=60)

    def _answers(self, host: Host) -> bool:
        words = host.command(["ssh", "-o", "BatchMode=yes", host.name, "true"])
        return subprocess.run(words, check=False, capture_output=True, timeout=60).returncode == 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kernel_has_netem(switch: int) -> bool:
    words = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms"]
    on_switch = ["nsenter", f"--target={switch}", "--net", *words]
    return subprocess.run(on_switch, check=False, capture_output=True, timeout=60).returncode == 0


def _until(condition: object, what: str) -> None:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not come up within {_SETTLE_SECONDS} s"
        time.sleep(0.02)
