"""Where transitions live: one ring of single observations per environment.

A row is one moment of one environment: observation, action, reward, kind, and how many earlier frames of its
episode a frame stack reaches back to. The row under the cursor is *open*: it holds the observation that the
agent is about to act on; action, reward and kind come with the next `add`. An episode of T transitions takes
T + 1 rows: the last holds the final observation and is never the start of a transition.

No stack, n-step return or next observation is stored. `sampling` builds them, so an 84x84 Atari frame is kept
once (about 7.1 kB a transition, where a buffer of stacked pairs takes 56).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hvdqn.replay.frames import HostFrames, MakeFrames, Rows, Stacks

Observations: TypeAlias = npt.NDArray[Any]  # uint8, bool or float32, as the environment gives them
Mask: TypeAlias = npt.NDArray[np.bool_]
State: TypeAlias = dict[str, npt.NDArray[Any]]

# What the row's action led to. A boundary is never a start: a final observation, the open row, or unwritten.
RUNNING, TERMINATED, TRUNCATED, BOUNDARY = range(4)

_ALL = slice(None)


class Step(Protocol):
    """What one call of `step` did to every env of this rank: `hvdqn.envs.Step`. Arrays are [envs, ...]."""

    @property
    def reward(self) -> npt.NDArray[np.float32]:
        """As the learner sees it. [envs]."""

    @property
    def terminated(self) -> Mask:
        """The episode ended in a terminal state. [envs]."""

    @property
    def truncated(self) -> Mask:
        """The episode was cut short. [envs]."""

    @property
    def next_observation(self) -> Observations:
        """Where the action led. [envs, *shape]."""

    @property
    def observation(self) -> Observations:
        """What to act on next. [envs, *shape]."""

    @property
    def fresh(self) -> Mask:
        """`observation` begins a new episode. [envs]."""

    @property
    def valid(self) -> Mask:
        """False where this call only reset the env. [envs]."""


class Ring:
    """The transitions of one rank: `envs` rings of equal size, each with its own cursor.

    Rows are numbered flat: row `env * rows_per_env + slot`. Memory is reserved once and touched as it fills.

    Args:
        envs: environments of this rank.
        capacity: transitions this rank holds, all envs together. Boundary rows take their place among them.
        observation_shape: shape of one observation, without stack.
        observation_dtype: its dtype.
        frame_stack: consecutive frames that make one network input; 1: the observation itself.
        n_step: rewards summed before bootstrapping.
        gamma: discount of one step.
        frames: makes what keeps the observations, given rows, shape and dtype.

    Raises:
        ValueError: a ring would be too short to hold one frame stack and one n-step path.
    """

    FIELDS = ("observation", "action", "reward", "kind", "reach")

    def __init__(
        self,
        envs: int,
        capacity: int,
        observation_shape: tuple[int, ...],
        observation_dtype: npt.DTypeLike,
        frame_stack: int = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        frames: MakeFrames = HostFrames,
    ) -> None:
        shortest = frame_stack + n_step - 1
        if min(envs, frame_stack, n_step) < 1 or frame_stack > 255:
            raise ValueError(
                f"envs {envs}, frame stack {frame_stack} and n_step {n_step} must be positive, "
                f"and the stack at most 255"
            )
        if capacity // envs < shortest:
            raise ValueError(
                f"replay capacity {capacity} over {envs} envs is too small for frame stack {frame_stack} "
                f"and n_step {n_step}: at least {envs * shortest} transitions per rank"
            )
        self.envs = envs
        self.rows_per_env = capacity // envs + 1
        self.frame_stack = frame_stack
        self.n_step = n_step
        self.gamma = gamma
        rows = envs * self.rows_per_env
        self.observation = frames(rows, observation_shape, observation_dtype)
        self.action: npt.NDArray[np.int64] = np.empty(rows, np.int64)
        self.reward: npt.NDArray[np.float32] = np.empty(rows, np.float32)
        self.kind: npt.NDArray[np.uint8] = np.full(rows, BOUNDARY, np.uint8)
        self.reach: npt.NDArray[np.uint8] = np.zeros(rows, np.uint8)
        # Every row a ring ever opened has a serial 0, 1, 2... and lies in slot serial % rows_per_env.
        self._base: Rows = np.arange(envs, dtype=np.int64) * self.rows_per_env
        self._serial: Rows = np.full(envs, -1, np.int64)
        self.open: Rows = self._base.copy()
        self._look_back: Rows = np.arange(frame_stack, dtype=np.int64)[::-1].copy()
        self._look_ahead: Rows = np.arange(n_step, dtype=np.int64)[:, None]

    def __len__(self) -> int:
        """Transitions held. Scans the kinds: for logs, not for the loop."""
        return int(np.count_nonzero(self.kind != BOUNDARY))

    @property
    def nbytes(self) -> int:
        """Bytes reserved for rows, all of them in use once the rings are full."""
        return sum(int(getattr(self, field).nbytes) for field in self.FIELDS)

    @property
    def longest(self) -> int:
        """Rows in use in the ring that has most."""
        return min(int(max(self._serial.tolist())) + 1, self.rows_per_env)

    def start(self, observation: Observations) -> None:
        """Begin an episode in every env: at the start of a run, or after a resume that had to reset the envs.

        Args:
            observation: reset observations [envs, *shape].
        """
        self._advance(_ALL, observation, first=True)

    def add(self, action: npt.NDArray[np.integer[Any]], step: Step) -> None:
        """Store what `action` [envs] led to in every env."""
        assert self._serial[0] >= 0, "start() comes before add()"
        # NEXT_STEP autoreset: where the call only reset an env, nothing was done in it.
        envs = _ALL if np.count_nonzero(step.valid) == self.envs else np.flatnonzero(step.valid)
        rows = self.open[envs]
        self.action[rows] = action[envs]
        self.reward[rows] = step.reward[envs]
        # Terminated wins over truncated: beyond a terminal state the value is zero, time limit or not.
        ended = np.where(step.terminated, TERMINATED, step.truncated * np.uint8(TRUNCATED))
        self.kind[rows] = ended[envs]
        self._advance(envs, step.next_observation[envs], first=False)
        if np.count_nonzero(step.fresh):
            fresh = np.flatnonzero(step.fresh)
            self._advance(fresh, step.observation[fresh], first=True)

    def _advance(self, envs: slice | Rows, observation: Observations, *, first: bool) -> None:
        """Open the next row of each env; the one left behind keeps its kind."""
        self._serial[envs] += 1
        rows = self._base[envs] + self._serial[envs] % self.rows_per_env
        if self.frame_stack > 1:
            reach = self.reach[self.open[envs]] + 1
            self.reach[rows] = 0 if first else np.minimum(reach, self.frame_stack - 1)
        self.kind[rows] = BOUNDARY
        self.observation[rows] = observation
        self.open[envs] = rows

    def shift(self, rows: Rows, by: int | Rows) -> Rows:
        """Rows `by` steps later (earlier where negative) in the ring of each; broadcasts."""
        slots = rows % self.rows_per_env
        shifted: Rows = rows - slots + (slots + by) % self.rows_per_env
        return shifted

    def paths(self, rows: Rows) -> Rows:
        """The `n_step` rows that an n-step return may run through. [batch] -> [n_step, batch]."""
        return self.shift(rows, self._look_ahead)

    def frames(self, rows: Rows, out: Stacks) -> None:
        """Read network inputs into `out`; the first frame of an episode is repeated where the stack is short.

        Args:
            rows: [batch].
            out: [batch, *shape], or [batch, frame_stack, *shape], oldest frame first.
        """
        if self.frame_stack > 1:
            back = np.minimum(self._look_back, self.reach.take(rows)[:, None])
            rows = self.shift(rows[:, None], -back)
        self.observation.read(rows, out)

    def is_start(self, rows: Rows) -> Mask:
        """Which rows a transition can be built from. [batch] -> [batch].

        The n-step path must not run into the open row before its end, and the frame stack must not reach over
        the seam, where the row under the cursor replaced older frames of the same episode.
        """
        if self.n_step == 1:
            ok: Mask = self.kind.take(rows) != BOUNDARY
        else:
            kinds = self.kind.take(self.paths(rows))
            ok = ~(reached(kinds) & (kinds == BOUNDARY)).any(axis=0)
        if self.frame_stack > 1:
            since_open = (rows - self.open.take(rows // self.rows_per_env)) % self.rows_per_env
            ok &= since_open > self.reach.take(rows)
        return ok

    def starts(self) -> Rows:
        """Every row a transition can be built from. Scans the ring: not for the loop."""
        rows: Rows = np.flatnonzero(self.kind != BOUNDARY)
        return rows[self.is_start(rows)]

    def row_ids(self, rows: Rows) -> Rows:
        """Names of what `rows` hold now, good for the whole run: see `rows_of`. [batch] -> [batch]."""
        env, slot = np.divmod(rows, self.rows_per_env)
        last = self._serial.take(env)
        serial = last - (last - slot) % self.rows_per_env
        named: Rows = serial * self.envs + env
        return named

    def rows_of(self, tickets: Rows) -> tuple[Rows, Mask]:
        """Rows that `tickets` named, and whether they still hold the same: False where overwritten since."""
        serial, env = np.divmod(tickets, self.envs)
        held: Mask = serial > self._serial.take(env) - self.rows_per_env
        return self._base.take(env) + serial % self.rows_per_env, held

    def state(self) -> State:
        """All that is held: `serial` [envs], and `{env}/{field}` for each, as views of what the host has."""
        state: State = {"serial": self._serial}
        for env, rows in self.in_use():
            state.update({f"{env}/{field}": getattr(self, field)[rows] for field in self.FIELDS})
        return state

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `state` gave: from then on this ring is the same, bit for bit.

        Raises:
            ValueError: the state is of another number of envs, capacity, observation or frame stack.
        """
        if state["serial"].shape != (self.envs,):
            raise ValueError(f"replay state of {state['serial'].size} envs cannot fill {self.envs}")
        self._serial[:] = state["serial"]
        self.open[:] = self._base + np.maximum(self._serial, 0) % self.rows_per_env
        self.kind[:] = BOUNDARY
        for env, rows in self.in_use():
            for field in self.FIELDS:
                mine, theirs = getattr(self, field), state[f"{env}/{field}"]
                shape = (rows.stop - rows.start, *mine.shape[1:])
                if theirs.shape != shape or theirs.dtype != mine.dtype:
                    raise ValueError(
                        f"replay state {env}/{field} is {theirs.dtype}{list(theirs.shape)}, "
                        f"this ring holds {mine.dtype}{list(shape)}"
                    )
                mine[rows] = theirs

    def in_use(self) -> Iterator[tuple[int, slice]]:
        """Each env with the flat rows of its ring that were ever written."""
        for env in range(self.envs):
            first = env * self.rows_per_env
            yield env, slice(first, first + min(int(self._serial[env]) + 1, self.rows_per_env))


def reached(kinds: npt.NDArray[np.uint8]) -> Mask:
    """Which rows of n-step paths belong to them: all before are running. [n_step, batch] -> the same."""
    belongs = np.ones(kinds.shape, np.bool_)
    np.logical_and.accumulate(kinds[:-1] == RUNNING, axis=0, out=belongs[1:])
    return belongs
