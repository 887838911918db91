"""A switch that delays every frame: `slow_link.py DELAY_SECONDS BITS_PER_SECOND PID...`.

It adds an interface eth0 to the network namespace of each PID. A frame reaches all other hosts after the time that its
bits take at the given rate, plus the delay. This replaces `tc netem delay ... rate ...` on each host's interface, for
kernels without netem.
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
    """Add an interface to the network namespace of `pid`; return the descriptor that reads and writes its frames."""
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"slow{number}"
    fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "netns", str(pid), "name", "eth0"], check=True)
    return port


def relay(ports: list[int], delay_seconds: float, bits_per_second: float) -> None:
    """Forward frames forever."""
    selector = selectors.DefaultSelector()
    for port in ports:
        selector.register(port, selectors.EVENT_READ)
    free = dict.fromkeys(ports, 0.0)  # when each host's link has sent all its frames
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
    """Write a frame to a host's interface. It is dropped if the link is not up or its buffer is full."""
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
