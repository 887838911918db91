"""Handle the faults of shared machines: stop signals, ranks that hang, errors of one rank, replicas that differ."""

from hvdqn.faults.replicas import check_replicas, raise_on_all_ranks
from hvdqn.faults.signals import StopSignal, leave_signals_to_rank, reinstall_handlers
from hvdqn.faults.watchdog import Heartbeat, Watchdog, silent_ranks, why_stalled

__all__ = [
    "Heartbeat",
    "StopSignal",
    "Watchdog",
    "check_replicas",
    "leave_signals_to_rank",
    "raise_on_all_ranks",
    "reinstall_handlers",
    "silent_ranks",
    "why_stalled",
]
