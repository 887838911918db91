"""When things happen: integer arithmetic on global env steps, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass
class Clock:
    """Counts global env steps and updates, and decides what they make due.

    Ranks whose clocks are equal do the same thing at the same time without asking each other. So nothing else (one
    rank's episodes, wall time, replay content) may decide what all ranks do together.

    Args:
        envs: environments in the whole job, that is, global env steps of one iteration.
        global_batch: transitions of one update, over all ranks.
        replay_ratio: transitions learned from per env step.
        learning_starts: global env steps before the first update.
    """

    envs: int
    global_batch: int
    replay_ratio: float
    learning_starts: int
    env_steps: int = 0
    updates: int = 0
    origin_env_steps: int = 0
    origin_updates: int = 0
    last_tick: int = 0  # env steps of the last tick: `envs`, unless the world has changed since

    def __post_init__(self) -> None:
        # A float ratio would make "how many updates are owed" depend on rounding.
        self._ratio = Fraction(self.replay_ratio).limit_denominator(1_000_000)

    def updates_owed(self, env_steps: int) -> int:
        """Return how many updates must have been taken after this many global env steps."""
        since = max(env_steps - max(self.learning_starts, self.origin_env_steps), 0)
        learned_from = since * self._ratio.numerator
        return self.origin_updates + learned_from // (self._ratio.denominator * self.global_batch)

    def updates_due(self) -> int:
        """Return how many updates are owed now."""
        return self.updates_owed(self.env_steps) - self.updates

    def tick(self) -> None:
        """Count one step of every environment of the job."""
        self.advance(self.envs)

    def advance(self, env_steps: int) -> None:
        """Count env steps of the job."""
        self.env_steps += env_steps
        self.last_tick = env_steps

    def count_update(self) -> None:
        """Count an update that begins."""
        self.updates += 1

    def poll_due(self, iterations: int) -> bool:
        """Return True once every so many iterations."""
        return self.due(iterations * self.envs)

    def own_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this rank alone; nothing where all ranks step together."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what `own_state` returned."""

    def due(self, every: int) -> bool:
        """Return whether the last tick reached or passed a multiple of `every` env steps; never for 0."""
        return every > 0 and self.env_steps // every > (self.env_steps - self.last_tick) // every

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {
            "env_steps": self.env_steps,
            "updates": self.updates,
            "origin_env_steps": self.origin_env_steps,
            "origin_updates": self.origin_updates,
            "last_tick": self.last_tick,
            "owed_updates": self.updates_owed(self.env_steps),
            **self._rate(),
        }

    def _rate(self) -> dict[str, float]:
        """Return what decides how many updates are owed, besides the counters."""
        return {
            "global_batch": self.global_batch,
            "replay_ratio": self.replay_ratio,
            "learning_starts": self.learning_starts,
        }

    def resume(self, state: Mapping[str, Any], refill: bool = False) -> None:
        """Continue from a checkpoint.

        If updates are owed at another rate than before, the new rate counts from here on: a smaller batch must not
        catch up on updates that the larger one never owed.

        Args:
            state: what `state` returned.
            refill: whether replay is empty: it fills for `learning_starts` env steps before the next update.
        """
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.last_tick = state["last_tick"]
        if refill:
            self.refill()
        elif all(state[name] == value for name, value in self._rate().items()):
            self.origin_env_steps, self.origin_updates = state["origin_env_steps"], state["origin_updates"]
        else:
            # Replay may still be refilling, and the last updates owed may still have to be taken.
            self.origin_env_steps = max(self.env_steps, state["origin_env_steps"])
            self.origin_updates = state["owed_updates"]

    def refill(self) -> None:
        """Let the empty replay fill for `learning_starts` env steps before the next update."""
        self.origin_env_steps = self.env_steps + self.learning_starts
        self.origin_updates = self.updates


@dataclass
class WorkerClock(Clock):
    """The clock of a worker of `--sync server`, which learns from replies how far the job is.

    Its own updates are due by its own env steps, which keeps the whole job at the replay ratio. `envs` and
    `global_batch` are this rank's alone. What all ranks do together is due only right after they have synchronized.

    Args:
        own_earliest: own env steps before the first update, so that this rank's replay is not empty.
    """

    own_earliest: int = 0
    own_env_steps: int = 0
    own_updates: int = 0
    reported_env_steps: int = 0  # how many of its own it has reported
    learning_since: int | None = None  # own env steps
    synchronized: bool = False

    def updates_due(self) -> int:
        """Return how many updates this rank owes now."""
        if self.learning_since is None:
            filled = self.env_steps >= max(self.learning_starts, self.origin_env_steps)
            if not filled or self.own_env_steps < self.own_earliest:
                return 0
            self.learning_since = self.own_env_steps
        learned_from = (self.own_env_steps - self.learning_since) * self._ratio.numerator
        return learned_from // (self._ratio.denominator * self.global_batch) - self.own_updates

    def tick(self) -> None:
        """Count one step of every environment of this rank."""
        self.own_env_steps += self.envs
        if self.synchronized:  # what was due then is done
            self.last_tick, self.synchronized = 0, False

    def count_update(self) -> None:
        """Count an update of this rank; `set_job` sets those of the job."""
        self.own_updates += 1

    def set_job(self, env_steps: int, updates: int, last_tick: int) -> None:
        """Set how far the job is, and the env steps within which something came due (0: nothing)."""
        self.env_steps, self.updates, self.last_tick = env_steps, updates, last_tick

    def pop_unreported(self) -> int:
        """Return this rank's env steps since the last call."""
        env_steps = self.own_env_steps - self.reported_env_steps
        self.reported_env_steps = self.own_env_steps
        return env_steps

    def poll_due(self, iterations: int) -> bool:
        """Return True once every so many iterations, and always before learning starts, so as not to start late."""
        return self.learning_since is None or self.own_env_steps // self.envs % iterations == 0

    def own_state(self) -> dict[str, Any]:
        """Return what is this rank's alone, and the rate at which it was counted."""
        own = {name: getattr(self, name) for name in ("own_env_steps", "own_updates", "learning_since")}
        return {**own, **self._rate()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what `own_state` returned; all of it was reported. A new rate counts from here on."""
        rate = self._rate()
        for name in state.keys() - rate.keys():
            setattr(self, name, state[name])
        self.reported_env_steps = self.own_env_steps
        same_rate = all(state.get(name, value) == value for name, value in rate.items())
        if self.learning_since is not None and not same_rate:
            self.learning_since, self.own_updates = self.own_env_steps, 0

    def resume(self, state: Mapping[str, Any], refill: bool = False) -> None:
        """Continue from a checkpoint, which all ranks wrote together."""
        super().resume(state, refill)
        self.synchronized = True
