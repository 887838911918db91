"""Store the transitions of one rank in a ring of single observations per environment, and sample them uniformly.

A row of a ring is one moment of one environment: the observation, the action taken there, the reward, and whether the
episode went on (`outcome`). The row of the current observation gets its action, reward and outcome from the next call
of `add`, so an episode of T transitions takes T + 1 rows: the last one holds the final observation.

Frame stacks, n-step returns and next observations are built when a minibatch is sampled. So each frame is stored only
once: an Atari transition takes 7.1 kB, where a buffer that stores pairs of frame stacks takes 56 kB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from hvdqn.replay.batch import NO_CORRECTION, Batch, Importance, ObservationBatch, Rows
from hvdqn.replay.bits import BitRows
from hvdqn.replay.finite import FiniteCheck
from hvdqn.replay.memory import HOST_MEMORY, Array, Memory, ObservationArray, check_sizes
from hvdqn.replay.streamed import StreamedArray, pieces, view_rows
from hvdqn.step import Bools, Observation, Step

State: TypeAlias = dict[str, Array | StreamedArray]

# The outcome of a row: whether the episode went on after its action, or how it ended. NO_TRANSITION: the row has no
# action, because it holds the current or the final observation of an episode, or nothing yet.
RUNNING, TERMINATED, TRUNCATED, NO_TRANSITION = range(4)

# A row whose reward, observation or TD error is not finite has NO_TRANSITION too, so that no minibatch contains it.

EMPTY_MESSAGE = (
    "replay holds no transition to learn from yet: learning must start after n_step steps of every env"
)
# `_draw_rows` draws row numbers at random until enough of them can be sampled. After this many draws it lists all rows
# that can be sampled and draws from the list.
_MAX_DRAWS = 64
_ALL = slice(None)


class Replay:
    """Holds the transitions of one rank, in one ring of rows per environment, and samples them with equal probability.

    Rows are numbered over all rings: place `slot` of environment `env`'s ring is row `env * rows_per_env + slot`.
    Memory is reserved at once but only used as the rings fill.

    Args:
        envs: number of this rank's environments.
        capacity: number of rows for all environments together. Final observations take rows too.
        observation_shape: shape of one observation, without frame stack.
        observation_dtype: dtype of one observation.
        rng: generator of all random draws.
        frame_stack: number of consecutive frames that make one network input; 1: the observation itself.
        mask_shape: shape of the mask of one observation: (actions,), or (dimensions, actions).
        n_step: number of rewards that are summed before bootstrapping.
        gamma: discount of one step.
        memory: allocates the arrays, in host memory or on a GPU.

    Attributes:
        discarded: number of transitions never sampled because a reward, observation or TD error is not finite.

    Raises:
        ValueError: a ring would be too short for one frame stack and one n-step return.
    """

    uses_td_errors: ClassVar[bool] = False
    """Whether TD errors change which transitions are sampled next."""

    def __init__(
        self,
        envs: int,
        capacity: int,
        observation_shape: tuple[int, ...],
        observation_dtype: npt.DTypeLike,
        rng: np.random.Generator,
        frame_stack: int = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        memory: Memory = HOST_MEMORY,
        mask_shape: tuple[int, ...] = (0,),
    ) -> None:
        check_sizes(envs, capacity, frame_stack, n_step)
        self.envs, self.rows_per_env = envs, capacity // envs + 1
        self.frame_stack, self.n_step, self.gamma = frame_stack, n_step, gamma
        self.memory, self._rng = memory, rng
        rows = envs * self.rows_per_env
        self.observation = memory.observations((rows, *observation_shape), observation_dtype)
        self.action: npt.NDArray[np.int64] = np.empty((rows, *mask_shape[:-1]), np.int64)
        self.reward: npt.NDArray[np.float32] = np.empty(rows, np.float32)
        self.outcome: npt.NDArray[np.uint8] = np.full(rows, NO_TRANSITION, np.uint8)
        # How many frames before a row's own belong to the same episode, counted up to frame_stack - 1.
        self.previous_frames: npt.NDArray[np.uint8] = np.zeros(rows, np.uint8)
        # The arrays of all rows, by their names in a saved state. Two names are older than the attributes, and stay so
        # that old checkpoints load.
        self._fields: dict[str, ObservationArray] = {
            "observation": self.observation,
            "action": self.action,
            "reward": self.reward,
            "kind": self.outcome,
            "reach": self.previous_frames,
        }
        self.illegal: BitRows | None = None  # the illegal actions of each row, if environments give masks
        self._mask_shape = mask_shape
        # An environment's rows have serial numbers 0, 1, 2... in the order written. Number s is at s % rows_per_env.
        self._newest_serial: Rows = np.full(envs, -1, np.int64)
        self._first_row: Rows = np.arange(envs, dtype=np.int64) * self.rows_per_env
        self.current_row: Rows = self._first_row.copy()  # of each environment's current observation
        self._stack_offsets: Rows = np.arange(frame_stack, dtype=np.int64)[::-1].copy()
        self._n_step_offsets: Rows = np.arange(n_step, dtype=np.int64)[:, None]
        self._discounts = (gamma ** np.arange(n_step + 1)).astype(np.float32)
        self._discount_of_outcome = np.full(NO_TRANSITION + 1, gamma, np.float32)
        self._discount_of_outcome[TERMINATED] = 0.0
        self.discarded = 0
        self._finite = FiniteCheck(envs, frame_stack, observation_dtype)
        self._buffers: list[Batch] = []

    def __len__(self) -> int:
        """Return the number of stored transitions. Reads all rows, so the training loop must not call it."""
        return int(np.count_nonzero(self.outcome != NO_TRANSITION))

    @property
    def nbytes(self) -> int:
        """The number of bytes that are reserved for rows; all are in use once the rings are full."""
        return sum(field.nbytes for field in self._fields.values())

    @property
    def description(self) -> str:
        """One line for the log: how much memory the replay takes when full, and where it lies."""
        return f"replay {self.nbytes / 1e6:,.3g} MB when full{self.memory.note}"

    def start(self, observation: Observation, action_mask: Bools | None = None) -> None:
        """Store the first observation of every environment, after the reset of a new or a resumed run.

        Args:
            observation: the observations that reset returned [envs, *shape].
            action_mask: their legal actions [envs, *action_shape, actions]; None if all are legal everywhere.
        """
        if action_mask is not None:
            self._store_masks()
        self._append(_ALL, observation, action_mask, first=True)
        self._finite.start(observation)

    def add(self, action: npt.NDArray[np.integer[Any]], step: Step) -> None:
        """Store every environment's transition. `action`: the actions that led to `step` [envs, *action_shape]."""
        assert self._newest_serial[0] >= 0, "start() comes before add()"
        # With NEXT_STEP autoreset, a step that only reset an environment is no transition.
        envs = _ALL if np.count_nonzero(step.valid) == self.envs else np.flatnonzero(step.valid)
        rows = self.current_row[envs]
        self.action[rows] = action[envs]
        self.reward[rows] = step.reward[envs]
        # A terminal state has no value, so a step both terminated and truncated counts as terminated.
        outcome = np.where(step.terminated, TERMINATED, step.truncated * np.uint8(TRUNCATED))
        bad = self._finite.bad_transitions(step)
        if bad is not None:
            outcome[bad] = NO_TRANSITION
            self.discarded += int(np.count_nonzero(bad))
        self.outcome[rows] = outcome[envs]
        self._append(envs, step.next_observation[envs], step.next_action_mask, first=False)
        if np.count_nonzero(step.fresh):
            fresh = np.flatnonzero(step.fresh)
            self._append(fresh, step.observation[fresh], step.action_mask, first=True)

    def _append(
        self, envs: slice | Rows, observation: Observation, action_mask: Bools | None, *, first: bool
    ) -> None:
        """Write the current observations of these environments to their next rows.

        `action_mask` is that of all environments. `first`: the observations are the first of an episode.
        """
        self._newest_serial[envs] += 1
        rows = self._first_row[envs] + self._newest_serial[envs] % self.rows_per_env
        if self.frame_stack > 1:
            frames = self.previous_frames[self.current_row[envs]] + 1
            self.previous_frames[rows] = 0 if first else np.minimum(frames, self.frame_stack - 1)
        self.outcome[rows] = NO_TRANSITION
        self.observation[rows] = observation
        if self.illegal is not None and action_mask is not None:
            self.illegal[rows] = ~action_mask[envs]
        self.current_row[envs] = rows

    def _store_masks(self) -> None:
        """Reserve memory for masks, unless that is done. All actions are legal in rows without one."""
        if self.illegal is None:
            self.illegal = BitRows(len(self.action), self._mask_shape)
            self._fields["illegal"] = self.illegal.packed

    def sample(self, batch_size: int, importance: Importance = NO_CORRECTION) -> Batch:
        """Return a minibatch drawn with replacement. All weights are 1: uniform sampling needs no correction.

        Calls use two sets of arrays in turn, so the learner can still read one batch while the next is built.

        If every transition was discarded, all rewards of the minibatch are NaN. All ranks then skip the update and
        count it, which ends the run after `--max-skipped-updates` in a row.

        Raises:
            ValueError: there is no transition to sample yet.
        """
        rows = self._draw_rows(batch_size)
        return self.build_batch(rows) if rows.size else self._nan_batch(batch_size)

    def update_priorities(self, row_ids: Rows, td_errors: npt.NDArray[np.floating[Any]]) -> None:
        """Do nothing: uniform sampling has no priorities."""

    def _draw_rows(self, count: int) -> Rows:
        """Draw `count` rows at which transitions begin, all equally likely: [count], or [0] if all were discarded."""
        written = max(self._newest_serial.tolist()) + 1
        used = min(max(written, 1), self.rows_per_env)  # rows in use of the fullest ring
        found = np.empty(0, np.int64)
        for _ in range(_MAX_DRAWS):
            # Draw more than needed: usually some hit a final observation.
            rows = self._rng.integers(self.envs * used, size=count + count // 4 + 8)
            if used < self.rows_per_env:
                rows += rows // used * (self.rows_per_env - used)
            rows = rows[self.is_sampleable(rows)]
            found = np.concatenate([found, rows]) if found.size else rows
            if found.size >= count:
                return found[:count]
        rows = self.sampleable_rows()
        if not rows.size:
            return rows
        return rows[self._rng.integers(rows.size, size=count)]

    def _nan_batch(self, batch_size: int) -> Batch:
        """Return a minibatch of NaN rewards if every transition was discarded: all ranks then skip the update.

        Raises:
            ValueError: replay is empty, and nothing was discarded.
        """
        if not self.discarded:
            raise ValueError(EMPTY_MESSAGE)
        batch = self.build_batch(np.resize(self.current_row, batch_size))
        batch.reward[:] = np.nan
        batch.weight[:] = 1.0
        batch.action[:] = 0  # those of current rows were never written
        return batch

    def is_sampleable(self, rows: Rows) -> Bools:
        """Return True for each of `rows` at which a complete transition begins. [batch] -> [batch].

        The n-step return must end before the current observation, unless the episode ends first. The frame stack must
        not need frames that were overwritten.
        """
        if self.n_step == 1:
            sampleable: Bools = self.outcome.take(rows) != NO_TRANSITION
        else:
            outcomes = self.outcome.take(self.n_step_rows(rows))
            sampleable = ~(_is_in_return(outcomes) & (outcomes == NO_TRANSITION)).any(axis=0)
        if self.frame_stack > 1:
            # Rows are counted round the ring from the current row, number 0, so the oldest row is number 1.
            number = (rows - self.current_row.take(rows // self.rows_per_env)) % self.rows_per_env
            sampleable &= number > self.previous_frames.take(rows)
        return sampleable

    def sampleable_rows(self) -> Rows:
        """Return the numbers of all rows that can be sampled. Reads all rows, so it is slow."""
        rows: Rows = np.flatnonzero(self.outcome != NO_TRANSITION)
        return rows[self.is_sampleable(rows)]

    def build_batch(self, rows: Rows) -> Batch:
        """Return the transitions that begin at `rows` [batch], for which `is_sampleable` must be True; weights: 1."""
        if not self._buffers or self._buffers[0].reward.size != rows.size:
            self._buffers = [self._allocate_batch(rows.size) for _ in range(2)]
        self._buffers.reverse()
        batch = self._buffers[0]
        batch.row_ids = rows
        self.action.take(rows, axis=0, out=batch.action, mode="clip")
        if self.n_step == 1:
            self.reward.take(rows, out=batch.reward, mode="clip")
            self._discount_of_outcome.take(self.outcome.take(rows), out=batch.discount, mode="clip")
            next_rows = self.shift(rows, 1)
        else:
            next_rows = self._n_step_returns(rows, batch)
        self._read_observations(rows, batch.observation)
        self._read_observations(next_rows, batch.next_observation)
        if self.illegal is not None:
            batch.action_mask, batch.next_action_mask = ~self.illegal[rows], ~self.illegal[next_rows]
        return batch

    def _n_step_returns(self, rows: Rows, batch: Batch) -> Rows:
        """Set the batch's rewards and discounts, and return the rows of its next observations. [batch] -> [batch].

        R = sum_{m<k} gamma^m r_m over k = n_step steps, or fewer where the episode ends (Sutton 1988).
        """
        path = self.n_step_rows(rows)
        outcomes = self.outcome.take(path)
        in_return = _is_in_return(outcomes)
        # Rewards after an episode's end belong to another episode or were never written, so they may be NaN.
        rewards = np.where(in_return, self.reward.take(path), np.float32(0.0))
        (rewards * self._discounts[:-1, None]).sum(axis=0, out=batch.reward)
        steps = in_return.sum(axis=0)
        last = outcomes[steps - 1, np.arange(rows.size)]
        np.multiply(self._discounts.take(steps), last != TERMINATED, out=batch.discount)
        return self.shift(rows, steps)

    def _read_observations(self, rows: Rows, out: ObservationBatch) -> None:
        """Copy the network inputs of `rows` [batch] to `out`: [batch, *shape] or [batch, frame_stack, *shape]."""
        if self.frame_stack > 1:
            # A stack longer than the episode so far repeats the episode's first frame.
            back = np.minimum(self._stack_offsets, self.previous_frames.take(rows)[:, None])
            rows = self.shift(rows[:, None], -back)
        # "clip" never clips here, since all rows are in range. Without it, NumPy copies through a temporary array.
        self.observation.take(rows, axis=0, out=out, mode="clip")

    def shift(self, rows: Rows, steps: int | Rows) -> Rows:
        """Return the rows of the same environments `steps` later, or earlier where negative. Both are broadcast."""
        slots = rows % self.rows_per_env
        shifted: Rows = rows - slots + (slots + steps) % self.rows_per_env
        return shifted

    def n_step_rows(self, rows: Rows) -> Rows:
        """Return `rows` and the n_step - 1 rows after each. [batch] -> [n_step, batch]."""
        return self.shift(rows, self._n_step_offsets)

    def _allocate_batch(self, size: int) -> Batch:
        stack = (self.frame_stack,) if self.frame_stack > 1 else ()
        observation = (size, *stack, *self.observation.shape[1:]), self.observation.dtype
        batch = Batch(
            observation=self.memory.batch_observations(*observation),
            action=self.memory.batch_array((size, *self.action.shape[1:]), np.int64),
            reward=self.memory.batch_array((size,), np.float32),
            next_observation=self.memory.batch_observations(*observation),
            discount=self.memory.batch_array((size,), np.float32),
            weight=self.memory.batch_array((size,), np.float32),
            row_ids=np.empty(size, np.int64),
        )
        batch.weight.fill(1.0)
        return batch

    def state(self) -> State:
        """Return all that an exact resume needs, as views of host memory and, for a GPU, `StreamedArray`s: no copies.

        Keys: `serial` and `bad_stacks` [envs], `discarded` [1], `rng`, and for the rows ever written `{env}/{field}`.
        """
        state: State = {"serial": self._newest_serial, "discarded": np.array([self.discarded])}
        state["bad_stacks"] = self._finite.bad_stacks
        for env, rows in self.rows_in_use():
            state.update({f"{env}/{name}": view_rows(field, rows) for name, field in self._fields.items()})
        return {**state, "rng": _pack_rng(self._rng)}

    def load_state(self, state: Mapping[str, Array | StreamedArray]) -> None:
        """Restore what `state` returned; this replay then samples the same as the saved one, bit for bit.

        A state from `reshard` has no random state and no count of discarded transitions; both then stay as they are.

        Raises:
            ValueError: the state has another number of environments, capacity, observation or frame stack.
        """
        serial = np.asarray(state["serial"])
        if serial.shape != (self.envs,):
            raise ValueError(f"replay state of {serial.size} envs cannot fill {self.envs}")
        self._newest_serial[:] = serial
        self.current_row[:] = self._first_row + np.maximum(self._newest_serial, 0) % self.rows_per_env
        self.outcome[:] = NO_TRANSITION
        if "0/illegal" in state:
            self._store_masks()
        for env, rows in self.rows_in_use():
            for name, field in self._fields.items():
                saved, shape = state[f"{env}/{name}"], (rows.stop - rows.start, *field.shape[1:])
                if saved.shape != shape or saved.dtype != field.dtype:
                    raise ValueError(
                        f"replay state {env}/{name} is {saved.dtype}{list(saved.shape)}, "
                        f"this ring holds {field.dtype}{list(shape)}"
                    )
                for first, piece in pieces(saved):
                    begin = rows.start + first
                    field[begin : begin + len(piece)] = piece
        if "discarded" in state:
            self.discarded = int(np.asarray(state["discarded"])[0])
            self._finite.load(np.asarray(state["bad_stacks"]))
        if "rng" in state:
            self._rng.bit_generator.state = json.loads(np.asarray(state["rng"]).tobytes())

    def rows_in_use(self) -> Iterator[tuple[int, slice]]:
        """Yield, for each environment, its number and the slice of the rows that were ever written."""
        for env, first in enumerate(self._first_row.tolist()):
            yield env, slice(first, first + min(int(self._newest_serial[env]) + 1, self.rows_per_env))


def _is_in_return(outcomes: npt.NDArray[np.uint8]) -> Bools:
    """Return True for rows up to the episode's end, whose rewards count. [n_step, batch] -> [n_step, batch]."""
    in_return = np.ones(outcomes.shape, np.bool_)
    np.logical_and.accumulate(outcomes[:-1] == RUNNING, axis=0, out=in_return[1:])
    return in_return


def _pack_rng(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return the generator's state as JSON in bytes [n]: its integers are wider than any NumPy dtype."""
    return np.frombuffer(json.dumps(rng.bit_generator.state).encode(), np.uint8)
