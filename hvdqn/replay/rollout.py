"""Hold the last few steps of every environment and learn from them at once, in place of a replay: PQN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from hvdqn.losses import lambda_returns
from hvdqn.replay.batch import NO_CORRECTION, Batch, Floats, Importance, ObservationBatch, Rows
from hvdqn.replay.memory import Array
from hvdqn.replay.replay import Replay, State
from hvdqn.replay.streamed import StreamedArray
from hvdqn.step import Bools

Values: TypeAlias = Callable[[ObservationBatch, Bools | None], Floats]
"""Returns the value of each observation, `[batch]`, given the legal actions there."""


def rollout_rows(envs: int, steps: int, frame_stack: int) -> int:
    """Return the capacity that a `Rollout` needs: two rows for each step, in case it ends an episode, and a stack."""
    return envs * (2 * steps + frame_stack)


class Rollout(Replay):
    """Holds the transitions since the last updates, and hands each out once per epoch, with its lambda-return.

    This is PQN (Gallici et al. 2025, "Simplifying Deep Temporal Difference Learning"). The network does not change
    during a rollout. So the first call of `sample` after it evaluates the network for all next observations, and
    computes all lambda-returns. Every minibatch has these returns as its rewards, discounts of 0 and no next
    observations, so that the learner needs no target network. By then the next rollout has begun.

    Args:
        steps: number of env steps of each environment in a rollout, 2 or more: with NEXT_STEP autoreset one of them
            may only reset.
        td_lambda: lambda of the lambda-returns.
        epochs: number of times that each transition is learned from.
        values: by the online network: `Actor.values`.
        arguments: those of `Replay`, with n_step of 1; `rollout_rows` returns the capacity.
    """

    def __init__(
        self,
        steps: int,
        td_lambda: float,
        epochs: int,
        values: Values,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.steps, self.td_lambda, self.epochs, self.values = steps, td_lambda, epochs, values
        self._first_serial: Rows = np.zeros(
            self.envs, np.int64
        )  # of each environment's row that begins the rollout
        self._returns: Floats = np.zeros(len(self.reward), np.float32)  # of each row
        self._minibatches: list[Rows] = []  # rows of the minibatches still to be handed out

    @property
    def description(self) -> str:
        """One line for the log: how long a rollout is, and where it lies."""
        return f"no replay, rollouts of {self.steps} steps, {self.nbytes / 1e6:,.3g} MB{self.memory.note}"

    def sample(self, batch_size: int, importance: Importance = NO_CORRECTION) -> Batch:
        """Return the next minibatch of the rollout; the first call after a rollout computes its lambda-returns.

        Minibatches of an epoch are a random division of the rollout. Where it has fewer transitions than steps
        (NEXT_STEP autoreset, values that are not finite), some transitions are in an epoch twice.

        If every transition was discarded, all rewards of the minibatch are NaN: see `Replay.sample`.
        """
        if not self._minibatches:
            self._finish_rollout(batch_size)
        rows = self._minibatches.pop()
        return self.build_batch(rows) if rows.size else self._nan_batch(batch_size)

    def build_batch(self, rows: Rows) -> Batch:
        """Return the transitions at `rows` `[batch]`, with lambda-returns as rewards."""
        batch = super().build_batch(rows)
        self._returns.take(rows, out=batch.reward, mode="clip")
        batch.discount.fill(0.0)
        return replace(batch, next_observation=batch.observation[:0])

    def _finish_rollout(self, batch_size: int) -> None:
        """Compute the lambda-returns of the rollout, divide it into minibatches, and begin the next rollout."""
        lengths = np.minimum(self._newest_serial - self._first_serial, self.rows_per_env - 1)
        longest = int(lengths.max())
        # The rows of the rollout in order of time `[longest, envs]`; shorter ones have other rows before their first.
        path = self.shift(self.current_row, np.arange(-longest, 0)[:, None])
        begun = np.arange(longest)[:, None] >= longest - lengths
        is_transition = begun & self.is_sampleable(path.reshape(-1)).reshape(path.shape)
        rows, count = path[is_transition], self.envs * self.steps // batch_size
        if rows.size:
            everyone = np.resize(rows, count * batch_size)  # as many on every rank
            self._returns[path] = self._lambda_returns(path, is_transition, everyone, batch_size)
            for _ in range(self.epochs):
                self._minibatches += np.split(self._rng.permutation(everyone), count)
        else:
            self._minibatches = [rows] * (self.epochs * count)
        self._first_serial[:] = self._newest_serial

    def _lambda_returns(self, path: Rows, is_transition: Bools, rows: Rows, batch_size: int) -> Floats:
        """Return the lambda-return of every transition in `path` `[steps, envs]`.

        Args:
            path: rows of all environments in order of time `[steps, envs]`.
            is_transition: whether a transition of the rollout begins there, shaped as `path`.
            rows: the rows of all transitions, some perhaps twice, so that they fill minibatches.
            batch_size: how many next observations the network evaluates at once.
        """
        next_value = np.zeros(len(self.reward), np.float32)
        for some in np.split(rows, len(rows) // batch_size):
            batch = super().build_batch(some)
            next_value[some] = self.values(batch.next_observation, batch.next_action_mask)
        continues = np.zeros(path.shape, np.bool_)
        continues[:-1] = is_transition[1:]
        of_path = (
            np.where(is_transition, self.reward[path], np.float32(0.0)),  # never written elsewhere
            self._discount_of_outcome[self.outcome[path]],
            next_value[path],
            continues * np.float32(self.td_lambda),
        )
        returns: Floats = lambda_returns(*map(torch.from_numpy, of_path)).numpy()
        return returns

    def state(self) -> State:
        """Return what `Replay.state` does, and where the rollout began; all minibatches must have been handed out."""
        assert not self._minibatches, "the updates of a rollout are taken without a checkpoint in between"
        return {**super().state(), "first_serial": self._first_serial}

    def load_state(self, state: Mapping[str, Array | StreamedArray]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self._first_serial[:] = np.asarray(state["first_serial"])
