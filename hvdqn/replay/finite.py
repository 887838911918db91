"""Find transitions whose reward or observations are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hvdqn.step import Bools, Observation, Step


class FiniteCheck:
    """Checks each step for numbers that are not finite. Costs next to nothing as long as there are none.

    Args:
        envs: environments of this rank.
        frame_stack: consecutive frames that make one network input.
        observation_dtype: of one observation; only floats can be bad.
    """

    def __init__(self, envs: int, frame_stack: int, observation_dtype: npt.DTypeLike) -> None:
        self.frame_stack = frame_stack
        self.observes_floats = np.dtype(observation_dtype).kind == "f"
        self.bad_stacks: npt.NDArray[np.int64] = np.zeros(envs, np.int64)
        """How many observations, from the current one on, have a frame in their stack that is not finite [envs]."""
        self._any_bad_stack = False

    def start(self, observation: Observation) -> None:
        """Begin an episode in every environment. `observation`: reset observations [envs, *shape]."""
        self.load(np.where(_finite_rows(observation), 0, self.frame_stack))

    def bad_transitions(self, step: Step) -> Bools | None:
        """Return True for the transitions of this step that nothing can be learned from; None if there are none."""
        if not self._any_bad_stack and self._is_finite(step):
            return None
        finite = _finite_rows(step.next_observation)
        bad: Bools = step.valid & ~(finite & np.isfinite(step.reward) & (self.bad_stacks == 0))
        # The next observations of an episode still have the bad frame in their stacks.
        left = np.where(finite, np.maximum(self.bad_stacks - 1, 0), self.frame_stack)
        first = np.where(_finite_rows(step.observation), 0, self.frame_stack)
        self.load(np.where(step.fresh, first, np.where(step.valid, left, self.bad_stacks)))
        return bad

    def load(self, bad_stacks: npt.NDArray[np.int64]) -> None:
        """Set `bad_stacks` [envs]."""
        self.bad_stacks[:] = bad_stacks
        self._any_bad_stack = bool(self.bad_stacks.any())

    def _is_finite(self, step: Step) -> bool:
        if not _all_finite(step.reward):
            return False
        if not self.observes_floats:
            return True
        same = step.observation is step.next_observation
        return _all_finite(step.next_observation) and (same or _all_finite(step.observation))


def _all_finite(numbers: npt.NDArray[Any]) -> bool:
    return int(np.count_nonzero(np.isfinite(numbers))) == numbers.size


def _finite_rows(observation: Observation) -> Bools:
    """Return True where all numbers of an observation are finite. [envs, *shape] -> [envs]."""
    return np.array([_all_finite(row) for row in observation])
