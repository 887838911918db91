"""What a strategy gives to the network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Messages and payload bytes of one rank, counted as they are sent, and the updates that they served.

    What an allreduce of p ranks puts on the wire is up to 2 (p - 1) / p times its payload, as in a ring.
    """

    updates: int = 0
    messages: int = 0
    bytes: int = 0

    def count(self, sent_bytes: int) -> None:
        """One message more."""
        self.messages += 1
        self.bytes += sent_bytes
