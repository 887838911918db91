"""Seed and restore the random generators that all code of a process shares; many environments draw from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_global_generators(seed: int, own_process: bool) -> None:
    """Seed `random` and `np.random`, and also torch's generator if this process runs one environment only.

    In a rank's process, training draws from torch's generator, so it is left alone there.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that environments share
    if own_process:
        torch.default_generator.manual_seed(seed)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Restore, after the `with` block, the states that `random` and `np.random` had before it."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
