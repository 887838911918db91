"""Absolute paths. An environment may change the current folder, and the user's paths are relative to the first one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_started_in: list[Path] = []


@contextmanager
def folder_remembered() -> Iterator[None]:
    """Make `absolute` return paths in the folder in which the body, or the decorated function, started."""
    try:
        folder = Path.cwd()
    except OSError:  # it was removed
        folder = Path()
    _started_in.append(folder)
    try:
        yield
    finally:
        _started_in.pop()


def absolute(path: str | Path) -> Path:
    """Return an absolute path: `~` is the home folder, anything else relative is in the folder of the start."""
    return Path(_started_in[-1] if _started_in else Path.cwd(), expanded(path))


def expanded(path: str | Path) -> Path:
    """Return the path with the home folder in place of `~`. Shells leave that to programs after `=`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises an error for an unknown user
