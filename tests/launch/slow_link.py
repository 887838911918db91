"""A switch that holds every frame back: `slow_link.py DELAY_SECONDS BITS_PER_SECOND PID...`.

Gives the network namespace of each PID an interface eth0. What a host sends reaches all the others after the time that
its bits take at the given rate, plus the delay: what `tc netem delay ... rate ...` on each host's interface does, for
kernels that were built without it.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import selectors
import struct
import subprocess
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_FRAME_BYTES = 65536


def open_port(number: int, pid: int) -> int:
    """Make an interface whose frames come out of, and go into, the returned descriptor; move it to `pid`'s host."""
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"slow{number}"
    fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "netns", str(pid), "name", "eth0"], check=True)
    return port


def relay(ports: list[int], delay_seconds: float, bits_per_second: float) -> None:
    """Pass frames on for ever."""
    selector = selectors.DefaultSelector()
    for port in ports:
        selector.register(port, selectors.EVENT_READ)
    free = dict.fromkeys(ports, 0.0)  # when a host's link has sent all that was given to it
    travelling: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, travelling[0][0] - time.monotonic()) if travelling else None
        for key, _ in selector.select(wait):
            source = key.fd
            frame = os.read(source, _FRAME_BYTES)
            free[source] = max(time.monotonic(), free[source]) + 8 * len(frame) / bits_per_second
            count += 1
            heapq.heappush(travelling, (free[source] + delay_seconds, count, source, frame))
        while travelling and travelling[0][0] <= time.monotonic():
            _, _, source, frame = heapq.heappop(travelling)
            for port in ports:
                if port != source:
                    deliver(port, frame)


def deliver(port: int, frame: bytes) -> None:
    """Hand a frame to a host; a switch drops what a host does not take, or what comes before its link is up."""
    try:
        os.write(port, frame)
    except OSError:
        return


def main() -> None:
    delay_seconds, bits_per_second, *pids = sys.argv[1:]
    ports = [open_port(number, int(pid)) for number, pid in enumerate(pids, start=1)]
    relay(ports, float(delay_seconds), float(bits_per_second))


if __name__ == "__main__":
    main()
