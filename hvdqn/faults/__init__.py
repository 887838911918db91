"""What goes wrong on shared machines: signals, ranks that hang, errors of one rank, replicas that differ."""

from hvdqn.faults.replicas import check_replicas, raise_on_all_ranks
from hvdqn.faults.signals import StopSignal
from hvdqn.faults.watchdog import Heartbeat, Watchdog, silent_ranks, why_stalled

__all__ = [
    "Heartbeat",
    "StopSignal",
    "Watchdog",
    "check_replicas",
    "raise_on_all_ranks",
    "silent_ranks",
    "why_stalled",
]
