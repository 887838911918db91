"""Make the user's paths absolute, relative to the folder of the start: an environment may change the current one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_started_in: list[Path] = []


@contextmanager
def folder_remembered() -> Iterator[None]:
    """Make `absolute` use the current folder as it was at the start of the `with` block or decorated function."""
    try:
        folder = Path.cwd()
    except OSError:  # the current folder was removed
        folder = Path()
    _started_in.append(folder)
    try:
        yield
    finally:
        _started_in.pop()


def absolute(path: str | Path) -> Path:
    """Return the absolute path, with the home folder for `~`; other relative paths are in the folder of the start."""
    return Path(_started_in[-1] if _started_in else Path.cwd(), expanded(path))


def expanded(path: str | Path) -> Path:
    """Return the path with the home folder in place of `~`, which shells do not replace after `=` (--run-dir=~/x)."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises an error for an unknown user
