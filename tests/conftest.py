from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdqn.faults import signals

# Assertions in this helper show the output of the job that failed.
pytest.register_assert_rewrite("tests.launchers")

# Files that take minutes. launch/test.sh runs files in parallel; these start first, so that the last worker does not
# start a long file when the others have finished.
LONGEST = (
    "test_container.py",
    "test_chaos.py",
    "test_slurm.py",
    "test_elastic.py",
    "test_faults.py",
    "test_resume.py",
)

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    """Undo what a training that has this process for itself leaves behind, in a test or in a fixture of a module."""
    yield
    signals._active = None  # else the next training would install its handlers again
    signal.set_wakeup_fd(-1)
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.path).name, len(order)))
