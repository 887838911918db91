"""Print which of the given hosts are other machines: `python -m hvdqn.launchers.remote_hosts HOST...`."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable


def remote_hosts(hosts: Iterable[str]) -> list[str]:
    """Return the hosts whose address cannot be bound to here, in the same order."""
    return [host for host in hosts if not _is_local(host)]


def _is_local(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:  # also if the name does not resolve
        return False
    return True


if __name__ == "__main__":
    for remote in remote_hosts(sys.argv[1:]):
        print(remote)
