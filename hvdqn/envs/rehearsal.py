"""Test, on two small copies of the environments, whether a restored state continues exactly as the original would."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from hvdqn.envs.actions import draw_legal
from hvdqn.envs.global_random import global_generators_kept
from hvdqn.envs.vector import Environments
from hvdqn.step import Step

log = logging.getLogger(__name__)

_CHECKED_STEPS = 100
# The longest time for the test. A rank that received a stop signal has less than a minute to write its checkpoint.
_CHECK_SECONDS = 15.0


def continues_exactly(make_copy: Callable[[int], Environments]) -> bool:
    """Return True if restoring a saved state reproduces the next steps and episodes exactly.

    Return False if the environments are too slow to test it within `_CHECK_SECONDS`, or cannot be made again.

    Args:
        make_copy: builds a few environments of the same kind; called with their seed.
    """
    try:
        with global_generators_kept():
            return _repeats_steps(make_copy)
    except (Exception, SystemExit) as error:
        log.debug(f"the environments cannot be resumed exactly: {error!r}")
        return False


def _repeats_steps(make_copy: Callable[[int], Environments]) -> bool:
    """Return True if a copy with the original's state takes the same next steps as the original."""
    with closing(make_copy(1)) as original, closing(make_copy(2)) as restored:
        deadline = time.monotonic() + _CHECK_SECONDS
        rng = np.random.default_rng(0)
        original.reset()
        for _ in range(_CHECKED_STEPS):
            original.step(_draw(rng, original))
            if time.monotonic() > deadline:
                return False
        state = original._save()
        if state is None:
            return False
        try:
            restored.load_state(state)
        except ValueError:  # the copy has other attributes than the original
            return False
        for _ in range(_CHECKED_STEPS):
            action = _draw(rng, original)
            if not _equal(original.step(action), restored.step(action)) or time.monotonic() > deadline:
                return False
        # A reset may draw from another random generator, and perhaps no episode ended in these steps.
        return np.array_equal(original.reset(), restored.reset(), equal_nan=True)


def _draw(rng: np.random.Generator, envs: Environments) -> NDArray[np.int64]:
    """Return random legal actions `[envs, *action_shape]`."""
    if envs.action_mask is not None:
        return draw_legal(rng, envs.action_mask)
    return rng.integers(envs.num_actions, size=(envs.num_envs, *envs.action_shape))


def _equal(one: Step, other: Step) -> bool:
    for field in fields(Step):
        mine, others = getattr(one, field.name), getattr(other, field.name)
        same = mine is others if mine is None else np.array_equal(mine, others, equal_nan=True)
        if not same:
            return False
    return True
