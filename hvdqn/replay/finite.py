"""Find transitions whose reward or observations contain NaN or infinity."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hvdqn.step import Bools, Observation, Step


class FiniteCheck:
    """Checks each step for NaN and infinity. Costs next to nothing as long as there are none.

    Args:
        envs: number of this rank's environments.
        frame_stack: number of consecutive frames that make one network input.
        observation_dtype: dtype of the observations; only floats are checked.
    """

    def __init__(self, envs: int, frame_stack: int, observation_dtype: npt.DTypeLike) -> None:
        self.frame_stack = frame_stack
        self.observes_floats = np.dtype(observation_dtype).kind == "f"
        self.bad_stacks: npt.NDArray[np.int64] = np.zeros(envs, np.int64)
        """For each environment, the number of coming frame stacks that still contain a bad frame [envs].

        The stack that ends with the current observation is the first of them; 0: none has a NaN or infinity.
        """
        self._any_bad_stack = False

    def start(self, observation: Observation) -> None:
        """Note that all environments begin an episode. `observation`: what their reset returned [envs, *shape]."""
        self.load(np.where(_finite_rows(observation), 0, self.frame_stack))

    def bad_transitions(self, step: Step) -> Bools | None:
        """Return True for environments whose transition holds NaN or infinity [envs]; None if all are finite."""
        checked: list[npt.NDArray[Any]] = [step.reward]
        if self.observes_floats:
            checked.append(step.next_observation)
            if step.observation is not step.next_observation:
                checked.append(step.observation)
        good = not self._any_bad_stack
        for numbers in checked:
            good = good and b"\0" not in np.isfinite(numbers).tobytes()  # faster than `all` for a few numbers
        if good:
            return None
        finite = _finite_rows(step.next_observation)
        bad: Bools = step.valid & ~(finite & np.isfinite(step.reward) & (self.bad_stacks == 0))
        # The next observations of an episode still have the bad frame in their stacks.
        left = np.where(finite, np.maximum(self.bad_stacks - 1, 0), self.frame_stack)
        first = np.where(_finite_rows(step.observation), 0, self.frame_stack)
        self.load(np.where(step.fresh, first, np.where(step.valid, left, self.bad_stacks)))
        return bad

    def load(self, bad_stacks: npt.NDArray[np.int64]) -> None:
        """Replace `bad_stacks` by the given values [envs], for example those of a checkpoint."""
        self.bad_stacks[:] = bad_stacks
        self._any_bad_stack = bool(self.bad_stacks.any())


def _finite_rows(observation: Observation) -> Bools:
    """Return, for each environment, True if all numbers of its observation are finite. [envs, *shape] -> [envs]."""
    return np.array([np.isfinite(row).all() for row in observation])
