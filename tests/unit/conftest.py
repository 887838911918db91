from __future__ import annotations

import pytest
import torch

from hvdqn import logs


@pytest.fixture(autouse=True)
def _keep_denormals() -> None:
    """Undo what training in this process sets: Hypothesis draws no floats while denormals are flushed to zero."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _logging_of_one_rank() -> None:
    """Show log messages as a process without a launcher does, not through the progress display of an earlier test."""
    logs.setup_logging(rank=0, size=1)
    logs._output_handler.display = None
