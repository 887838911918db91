"""Gymnasium's async vector environment, with its workers' errors reported as those of this process."""

from __future__ import annotations

from collections.abc import Iterable

from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from hvdqn.errors import UserError


class AsyncVector(AsyncVectorEnv):
    """An async vector that raises a worker's `UserError` without printing the worker's traceback."""

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        if all(successes):
            return
        failures = [self.error_queue.get() for _ in range(self.num_envs - sum(successes))]
        errors = [str(error) for _, kind, error, _ in failures if issubclass(kind, UserError)]
        if errors:
            for index, *_ in failures:  # these workers have ended; `close` leaves them out
                self.parent_pipes[index].close()
                self.parent_pipes[index] = None  # type: ignore[call-overload]
            self._state = AsyncState.DEFAULT
            raise UserError(errors[0])
        for failure in failures:
            self.error_queue.put(failure)
        super()._raise_if_errors(successes)
