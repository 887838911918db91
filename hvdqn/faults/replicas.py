"""Raise errors on all ranks together, so that no rank waits for one that has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from hvdqn.comm import Comm
from hvdqn.errors import DriftError, UserError
from hvdqn.metrics import PhaseTimer

T = TypeVar("T")


def check_replicas(differing_ranks: list[int], env_steps: int) -> None:
    """Raise an error if replicas differ.

    Args:
        differing_ranks: the ranks whose weights are not those of rank 0.
        env_steps: global env steps, for the message.

    Raises:
        DriftError: some ranks differ.
    """
    if differing_ranks:
        ranks = ", ".join(map(str, differing_ranks))
        raise DriftError(
            f"at env step {env_steps} the weights of rank {ranks} differ from the other ranks'. Either its host runs "
            "other libraries or has a CPU with other instructions, which round differently (give all ranks the same "
            "ATEN_CPU_CAPABILITY, such as default), or its memory is faulty. Start again to resume from the last "
            "checkpoint"
        )


def raise_on_all_ranks(comm: Comm, build: Callable[[], T], timer: PhaseTimer | None = None) -> T:
    """Call `build` on every rank and return its result; if it raises UserError on one rank, raise on all.

    Args:
        comm: the ranks.
        build: what each rank calls.
        timer: of this rank; shows the watchdog which ranks still build and which wait for others.

    Raises:
        UserError: that of the lowest rank that raised one.
    """
    error = None
    try:
        result = build()
    except UserError as raised:
        error = str(raised)
    with timer.during("comm") if timer else contextlib.nullcontext():
        errors = [text for text in comm.all_gather_object(error) if text is not None]
    if errors:
        raise UserError(errors[0])
    return result
