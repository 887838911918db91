"""Settings of the whole process that code of environments may change, although training depends on them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from hvdqn.envs.contract import warn_once
from hvdqn.faults import reinstall_handlers
from hvdqn.logs import replace_closed_streams


def _umask() -> int:
    """Return the mask of new files' permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _set_default_device(device: torch.device) -> None:
    # Any device but None makes each call into torch slower.
    torch.set_default_device(None if device == torch.device("cpu") else device)


# The recursion limit comes first: the rest needs it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "sys.stdout": (lambda: sys.stdout, partial(setattr, sys, "stdout")),
    "sys.stderr": (lambda: sys.stderr, partial(setattr, sys, "stderr")),
    "the umask": (_umask, os.umask),
    "NumPy's handling of floating-point errors": (np.geterr, lambda before: np.seterr(**before)),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_default_device),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's deterministic mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
}


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Put settings of the process back that code of an environment changes in the body; warn about it once.

    That includes signal handlers, and standard streams that it closed.
    """
    before = {name: read() for name, (read, _) in _SETTINGS.items()}
    try:
        yield
    finally:
        changed = []
        for name, (read, write) in _SETTINGS.items():
            if read() != before[name]:
                write(before[name])
                changed.append(name)
        if closed := replace_closed_streams():
            warn_once(f"the environment has closed {' and '.join(closed)}, which is opened again")
        if changed:
            warn_once(
                f"the environment has changed {', '.join(changed)}: changed back, because training depends on it. "
                "--vectorization async gives environments processes of their own"
            )
        reinstall_handlers()
