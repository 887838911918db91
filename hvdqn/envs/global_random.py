"""The random generators that all code of a process shares. Many environments draw from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_global_generators(seed: int, own_process: bool) -> None:
    """Seed `random` and `np.random`, and torch's generator too where the process belongs to one environment.

    In a rank's process torch's generator belongs to training.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that environments share
    if own_process:
        torch.default_generator.manual_seed(seed)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Give `random` and `np.random` the states back that they had before the body."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
