"""Which transitions a rank learns from, and the minibatch built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hvdqn.replay.frames import Rows, Stacks
from hvdqn.replay.storage import BOUNDARY, TERMINATED, Ring, State, reached
from hvdqn.replay.sum_tree import Mass, SumTree

Floats = npt.NDArray[np.float32]

# Draws that hit no start are thrown away. After this many rounds the starts are listed instead.
_ROUNDS = 64
_NOTHING = "replay holds no transition to learn from yet: learning must start after n_step steps of every env"


@dataclass(slots=True)
class Batch:
    """A minibatch of n-step transitions. Overwritten by the second next sample."""

    observation: Stacks
    """[batch, *shape], or [batch, frame_stack, *shape], oldest frame first; on a device if its frames are there."""
    action: npt.NDArray[np.int64]
    """[batch]."""
    reward: Floats
    """Discounted sum of the rewards up to `next_observation` [batch]."""
    next_observation: Stacks
    """n_step steps later, or where the episode ended if that came first; as `observation`."""
    discount: Floats
    """What the value of `next_observation` counts: gamma ** steps, 0 where terminated [batch]."""
    weight: Floats
    """Importance weights, not normalised [batch]: the learner divides by the largest of all ranks."""
    rows: Rows
    """What `update` wants back [batch]."""

    @classmethod
    def empty(cls, ring: Ring, batch_size: int) -> Batch:
        """Buffers for `batch_size` transitions of this ring, with weights of one."""
        frames, batch = ring.observation, (batch_size,)
        stacks = (batch_size, ring.frame_stack) if ring.frame_stack > 1 else batch
        made = cls(
            observation=frames.stacks(stacks),
            action=frames.empty(batch, np.int64),
            reward=frames.empty(batch, np.float32),
            next_observation=frames.stacks(stacks),
            discount=frames.empty(batch, np.float32),
            weight=frames.empty(batch, np.float32),
            rows=np.empty(batch_size, np.int64),
        )
        made.weight.fill(1.0)
        return made


@dataclass(frozen=True, slots=True)
class Importance:
    """What corrects non-uniform draws. The same on every rank, or the job's gradient is biased.

    Args:
        beta: strength of the correction; 1 corrects fully, 0 not at all.
        n_global: transitions that the whole job can draw.
        size: shards they are spread over, each of which draws the same number.
    """

    beta: float = 0.0
    n_global: int = 1
    size: int = 1


UNCORRECTED = Importance()


class Sampler(Protocol):
    """Draws minibatches from a ring that someone else fills."""

    uses_td_errors: ClassVar[bool]
    """Whether the next draw depends on the TD errors of the one before."""

    def follow(self) -> None:
        """Take notice of one `start` or `add` of the ring. To be called after each."""

    def sample(self, batch_size: int, importance: Importance = UNCORRECTED) -> Batch:
        """Draw `batch_size` transitions, with replacement."""

    def update(self, rows: Rows, td_errors: npt.NDArray[np.floating[Any]]) -> None:
        """Learn the absolute TD errors [batch] of the sampled `rows` [batch]."""

    def state(self) -> State:
        """What a resume needs beyond the ring."""

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `state` gave, after the ring did."""


class UniformSampler:
    """Every transition that the rank holds is equally likely.

    Args:
        ring: what to draw from.
        rng: the only source of chance.
    """

    uses_td_errors: ClassVar[bool] = False

    def __init__(self, ring: Ring, rng: np.random.Generator) -> None:
        self._ring = ring
        self._rng = rng
        self._assembler = Assembler(ring)

    def follow(self) -> None:
        """Nothing to keep."""

    def sample(self, batch_size: int, importance: Importance = UNCORRECTED) -> Batch:
        """Draw `batch_size` transitions with weights of one: uniform draws need no correction.

        Raises:
            ValueError: the ring holds no transition yet.
        """
        return self._assembler.build(self._starts(batch_size))

    def update(self, rows: Rows, td_errors: npt.NDArray[np.floating[Any]]) -> None:
        """Nothing to keep: TD errors do not change the odds."""

    def state(self) -> State:
        """The random state."""
        return {"rng": pack_rng(self._rng)}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put the random state back; a dealt state has none."""
        if "rng" in state:
            unpack_rng(state["rng"], self._rng)

    def _starts(self, count: int) -> Rows:
        """Starts, each equally likely: draw rows and keep those that are [count]."""
        starts = self._round(count)
        for _ in range(_ROUNDS):
            if starts.size >= count:
                return starts[:count]
            starts = np.concatenate([starts, self._round(count)])
        every = self._ring.starts()
        if not every.size:
            raise ValueError(_NOTHING)
        return every[self._rng.integers(every.size, size=count)]

    def _round(self, count: int) -> Rows:
        # One row in five may be refused before a second round is needed.
        ring, longest = self._ring, max(self._ring.longest, 1)
        rows = self._rng.integers(ring.envs * longest, size=count + count // 4 + 8)
        if longest < ring.rows_per_env:
            rows += rows // longest * (ring.rows_per_env - longest)
        return rows[ring.is_start(rows)]


class PrioritizedSampler:
    """Draws i with probability p_i / sum(p), p = (|td error| + eps) ** alpha (Schaul et al. 2016).

    Proportional, stratified. New transitions enter with the largest priority seen. Only starts have mass.

    Args:
        ring: what to draw from.
        rng: the only source of chance.
        alpha: 0: uniform; 1: in proportion to the TD error.
        eps: TD error that every transition has at least.
    """

    uses_td_errors: ClassVar[bool] = True

    def __init__(self, ring: Ring, rng: np.random.Generator, alpha: float = 0.6, eps: float = 1e-6) -> None:
        self._ring = ring
        self._rng = rng
        self._alpha = alpha
        self._eps = eps
        self._largest = 1.0
        self._tree = SumTree(ring.envs * ring.rows_per_env)
        self._assembler = Assembler(ring)
        # Around an open row `add` changes what is a start: at most two rows were opened, n_step rows before
        # them gained a whole path, and frame_stack - 1 rows after it lost frames.
        self._touched = np.arange(-ring.n_step - 1, ring.frame_stack, dtype=np.int64)

    def follow(self) -> None:
        """Give new starts the largest priority and take its mass from what is no start any more."""
        rows = self._ring.shift(self._ring.open[:, None], self._touched).ravel()
        had = self._tree.mass.take(rows)
        due = self._due(rows, had)
        changed = due != had
        self._tree.set(rows[changed], due[changed])

    def sample(self, batch_size: int, importance: Importance = UNCORRECTED) -> Batch:
        """Draw `batch_size` transitions, one from each of as many equal parts of the mass.

        A shard draws i with P_r(i) = p_i / sum_r, so the job draws it with P(i) = P_r(i) / size, and its
        weight is (n_global * P(i)) ** -beta, to be divided by the largest of all ranks.

        Raises:
            ValueError: the ring holds no transition yet.
        """
        total = self._tree.total
        if total <= 0.0:
            raise ValueError(_NOTHING)
        targets = (np.arange(batch_size) + self._rng.random(batch_size)) * (total / batch_size)
        rows = self._tree.find(np.minimum(targets, np.nextafter(total, 0.0)))
        batch = self._assembler.build(rows)
        chance = self._tree.mass.take(rows) / (total * importance.size)
        batch.weight[:] = (importance.n_global * chance) ** -importance.beta
        batch.rows = self._ring.row_ids(rows)
        return batch

    def update(self, rows: Rows, td_errors: npt.NDArray[np.floating[Any]]) -> None:
        """Give sampled transitions new priorities.

        What was overwritten since is left alone, and so is what has a TD error that is not finite.

        Args:
            rows: `Batch.rows` [batch].
            td_errors: absolute TD errors [batch].
        """
        at, held = self._ring.rows_of(rows)
        keep = held & (self._tree.mass.take(at) > 0.0) & np.isfinite(td_errors)
        if not keep.any():
            return
        mass = (np.abs(td_errors[keep], dtype=np.float64) + self._eps) ** self._alpha
        self._largest = max(self._largest, float(mass.max()))
        self._tree.set(at[keep], mass)

    def state(self) -> State:
        """Random state, largest priority, and per env the masses of its rows: `{env}/mass`."""
        masses = {f"{env}/mass": self._tree.mass[rows] for env, rows in self._ring.in_use()}
        return {"rng": pack_rng(self._rng), "largest": np.array([self._largest]), **masses}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `state` gave, after the ring did.

        Raises:
            ValueError: the masses do not fit the ring, or are no masses.
        """
        mass = np.zeros_like(self._tree.mass)
        for env, rows in self._ring.in_use():
            mass[rows] = state[f"{env}/mass"]
        if not (np.isfinite(mass).all() and (mass >= 0.0).all()):
            raise ValueError("replay state holds priorities that are negative or not finite")
        self._largest = float(state["largest"][0])
        self._tree.fill(self._due(np.arange(mass.size), mass))
        if "rng" in state:
            unpack_rng(state["rng"], self._rng)

    def _due(self, rows: Rows, had: Mass) -> Mass:
        """The masses that `rows` must have, given those they had. [batch]."""
        return np.where(self._ring.is_start(rows), np.where(had > 0.0, had, self._largest), 0.0)


class Assembler:
    """Builds minibatches from start rows, in two sets of buffers that take turns.

    The learner may still be reading one batch while the next is built.

    Args:
        ring: where the rows are.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._buffers: list[Batch] = []
        self._powers = (ring.gamma ** np.arange(ring.n_step + 1)).astype(np.float32)
        self._discount_by_kind = np.full(BOUNDARY + 1, ring.gamma, np.float32)
        self._discount_by_kind[TERMINATED] = 0.0

    def build(self, rows: Rows) -> Batch:
        """The transitions that begin at `rows` [batch], all of them starts."""
        if not self._buffers or self._buffers[0].reward.size != rows.size:
            self._buffers = [Batch.empty(self._ring, rows.size) for _ in range(2)]
        self._buffers.reverse()
        batch, ring = self._buffers[0], self._ring
        batch.rows = rows
        ring.action.take(rows, out=batch.action, mode="clip")
        next_rows = self._one_step(rows, batch) if ring.n_step == 1 else self._n_steps(rows, batch)
        ring.frames(rows, out=batch.observation)
        ring.frames(next_rows, out=batch.next_observation)
        return batch

    def _one_step(self, rows: Rows, batch: Batch) -> Rows:
        ring = self._ring
        ring.reward.take(rows, out=batch.reward, mode="clip")
        self._discount_by_kind.take(ring.kind.take(rows), out=batch.discount, mode="clip")
        return ring.shift(rows, 1)

    def _n_steps(self, rows: Rows, batch: Batch) -> Rows:
        """R = sum_{m<k} gamma^m r_m over k = n_step steps, or fewer where the episode ends (Sutton 1988)."""
        ring = self._ring
        paths = ring.paths(rows)
        kinds = ring.kind.take(paths)
        belongs = reached(kinds)
        # Rewards past the end are of another episode, or were never written: they may be anything, even NaN.
        rewards = np.where(belongs, ring.reward.take(paths), np.float32(0.0))
        (rewards * self._powers[:-1, None]).sum(axis=0, out=batch.reward)
        steps = belongs.sum(axis=0)
        last = kinds[steps - 1, np.arange(rows.size)]
        np.multiply(self._powers.take(steps), last != TERMINATED, out=batch.discount)
        return ring.shift(rows, steps)


def pack_rng(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A generator's state as bytes of JSON, since its integers are wider than any dtype."""
    return np.frombuffer(json.dumps(rng.bit_generator.state).encode(), np.uint8)


def unpack_rng(packed: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Put back what `pack_rng` gave."""
    rng.bit_generator.state = json.loads(packed.tobytes())
