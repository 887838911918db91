"""Prioritized experience replay (Schaul et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hvdqn.replay.batch import NO_CORRECTION, Batch, Importance, Rows
from hvdqn.replay.memory import Array
from hvdqn.replay.replay import NO_TRANSITION, Replay, State
from hvdqn.replay.streamed import StreamedArray
from hvdqn.replay.sum_tree import Priorities, SumTree
from hvdqn.step import Bools, Observation, Step


class PrioritizedReplay(Replay):
    """A replay that samples row i with probability p_i / sum(p), where p = (|td error| + eps) ** alpha.

    This is the proportional, stratified variant of Schaul et al. 2016. A new transition gets the largest priority so
    far. A row at which no complete transition begins has priority 0.

    Args:
        *args: the positional arguments of `Replay`.
        alpha: the exponent; 0 samples uniformly, 1 in proportion to the TD error.
        eps: added to every TD error, so that each transition can be sampled.
        **kwargs: the keyword arguments of `Replay`.
    """

    uses_td_errors: ClassVar[bool] = True

    def __init__(self, *args: Any, alpha: float = 0.6, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alpha, self._eps = alpha, eps
        self._max_priority = 1.0
        self._tree = SumTree(self.envs * self.rows_per_env)
        # Offsets from the current row to the rows that `add` can make sampleable or not. `add` writes up to two rows.
        # That completes the n-step returns of the n_step rows before them, and overwrites frames that the stacks of
        # the frame_stack - 1 rows after them needed.
        self._affected_offsets = np.arange(-self.n_step - 1, self.frame_stack, dtype=np.int64)
        # Offsets from a row to the rows whose n-step returns contain its reward.
        self._return_offsets = np.arange(1 - self.n_step, 1, dtype=np.int64)

    def start(self, observation: Observation, action_mask: Bools | None = None) -> None:
        """Store the first observation of an episode in every environment; see `Replay.start`."""
        super().start(observation, action_mask)
        self._refresh_priorities(self.current_row, self._affected_offsets)

    def add(self, action: npt.NDArray[np.integer[Any]], step: Step) -> None:
        """Store every environment's transition. `action`: the actions that led to `step` [envs, *action_shape]."""
        super().add(action, step)
        self._refresh_priorities(self.current_row, self._affected_offsets)

    def _refresh_priorities(self, changed_rows: Rows, offsets: Rows) -> None:
        """Set priorities around rows that were written.

        A row at which a transition begins now gets the largest priority so far, one where none does any more gets 0.

        Args:
            changed_rows: numbers of the rows that were written [batch].
            offsets: distances from them to the rows that may have become sampleable or not [offsets].
        """
        rows = self.shift(changed_rows[:, None], offsets).ravel()
        before = self._tree.priorities.take(rows)
        now = self._allowed_priorities(rows, before)
        changed = now != before
        self._tree.set(rows[changed], now[changed])

    def _allowed_priorities(self, rows: Rows, priorities: Priorities) -> Priorities:
        """Correct the priorities of `rows`: 0 for a row that cannot be sampled, the largest so far for a new one.

        Args:
            rows: row numbers [batch].
            priorities: their priorities now [batch]; 0 for a row that could not be sampled until now.
        """
        known = np.where(priorities > 0.0, priorities, self._max_priority)
        return np.where(self.is_sampleable(rows), known, 0.0)

    def sample(self, batch_size: int, importance: Importance = NO_CORRECTION) -> Batch:
        """Return a minibatch: divide the sum of priorities into `batch_size` equal parts, and draw one row from each.

        A rank draws i with probability P_r(i) = p_i / sum_r, so the job draws it with P(i) = P_r(i) / size. Its weight
        is (n_global * P(i)) ** -beta, to be divided by the maximum over all ranks.

        If every transition was discarded, all rewards are NaN, as in `Replay.sample`.

        Raises:
            ValueError: there is no transition to sample yet.
        """
        total = self._tree.total
        if total <= 0.0:
            batch = self._nan_batch(batch_size)
            batch.row_ids = self.row_ids(batch.row_ids)
            return batch
        targets = (np.arange(batch_size) + self._rng.random(batch_size)) * (total / batch_size)
        rows = self._tree.find(np.minimum(targets, np.nextafter(total, 0.0)))
        batch = self.build_batch(rows)
        probability = self._tree.priorities.take(rows) / (total * importance.size)
        batch.weight[:] = (importance.n_global * probability) ** -importance.beta
        batch.row_ids = self.row_ids(rows)
        return batch

    def update_priorities(self, row_ids: Rows, td_errors: npt.NDArray[np.floating[Any]]) -> None:
        """Set the priorities of sampled transitions. Skips transitions that were overwritten since.

        If some TD errors of the minibatch are finite and others are not, the transitions of the latter are never
        sampled again. If none is finite, the network is to blame and not the transitions, and nothing changes.

        Args:
            row_ids: `Batch.row_ids` of the minibatch [batch].
            td_errors: absolute TD errors [batch].
        """
        rows, held = self.rows_of(row_ids)
        finite = np.isfinite(td_errors)
        held &= self._tree.priorities.take(rows) > 0.0
        keep = held & finite
        if keep.any():
            priorities = (np.abs(td_errors[keep], dtype=np.float64) + self._eps) ** self._alpha
            self._max_priority = max(self._max_priority, float(priorities.max()))
            self._tree.set(rows[keep], priorities)
        if 0 < np.count_nonzero(finite) < finite.size:
            self._discard(np.unique(rows[held & ~finite]))

    def _discard(self, rows: Rows) -> None:
        """Never sample the transitions that begin at `rows` [batch], nor n-step returns that contain them."""
        if rows.size:
            self.discarded += rows.size
            self.outcome[rows] = NO_TRANSITION
            self._refresh_priorities(rows, self._return_offsets)

    def row_ids(self, rows: Rows) -> Rows:
        """Return a number for the transition that each of `rows` holds now, unique in the run. [batch] -> [batch].

        A full ring overwrites its oldest rows, so TD errors that arrive late may belong to a transition that is gone.
        `rows_of` uses these numbers to find that out.
        """
        env, slot = np.divmod(rows, self.rows_per_env)
        newest = self._newest_serial.take(env)
        serial = newest - (newest - slot) % self.rows_per_env
        row_ids: Rows = serial * self.envs + env
        return row_ids

    def rows_of(self, row_ids: Rows) -> tuple[Rows, Bools]:
        """Return the row of each id [batch], and whether it still holds that transition, not a newer one [batch]."""
        serial, env = np.divmod(row_ids, self.envs)
        held: Bools = serial > self._newest_serial.take(env) - self.rows_per_env
        return self._first_row.take(env) + serial % self.rows_per_env, held

    def state(self) -> State:
        """Return all that an exact resume needs: `Replay.state`, the priorities per environment, and the largest."""
        priorities = {f"{env}/mass": self._tree.priorities[rows] for env, rows in self.rows_in_use()}
        return {**super().state(), "largest": np.array([self._max_priority]), **priorities}

    def load_state(self, state: Mapping[str, Array | StreamedArray]) -> None:
        """Restore what `state` returned; as in `Replay.load_state`.

        Raises:
            ValueError: the state does not fit this replay, or its priorities are negative or not finite.
        """
        super().load_state(state)
        priorities = np.zeros_like(self._tree.priorities)
        for env, rows in self.rows_in_use():
            priorities[rows] = np.asarray(state[f"{env}/mass"])
        if not (np.isfinite(priorities).all() and (priorities >= 0.0).all()):
            raise ValueError("replay state holds priorities that are negative or not finite")
        self._max_priority = float(np.asarray(state["largest"])[0])
        self._tree.fill(self._allowed_priorities(np.arange(priorities.size), priorities))
