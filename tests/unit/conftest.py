from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from hvdqn import logs


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that training in this process replaces."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _keep_denormals() -> None:
    """Undo what training in this process sets: Hypothesis draws no floats while denormals are flushed to zero."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _logging_of_one_rank() -> None:
    """Show log messages as a process without a launcher does, not through the progress display of an earlier test."""
    logs.setup_logging(rank=0, size=1)
    logs._output_handler.display = None
