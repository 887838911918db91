"""Decide when updates, evaluations and checkpoints are due, by integer arithmetic on global env steps.

Every rank computes the same, so ranks need not ask each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass
class Clock:
    """Counts global env steps and updates, and says which updates and events are due.

    Ranks whose clocks are equal do the same thing at the same time without asking each other. So nothing else (one
    rank's episodes, wall time, replay content) may decide what all ranks do together.

    Args:
        envs: number of environments in the whole job, which is the number of global env steps per iteration.
        global_batch: number of transitions in the minibatches of one update, all ranks together.
        replay_ratio: number of transitions to learn from for each env step.
        learning_starts: number of global env steps before the first update.
        rollout_steps: iterations after which updates become due, all at once; 0: each becomes due on its own.
        env_steps: global env steps so far.
        updates: updates so far.
        origin_env_steps, origin_updates: counts from which updates are owed anew, after a resume at another rate.
        last_tick: env steps of the last `tick`.
    """

    envs: int
    global_batch: int
    replay_ratio: float
    learning_starts: int
    rollout_steps: int = 0
    env_steps: int = 0
    updates: int = 0
    origin_env_steps: int = 0
    origin_updates: int = 0
    last_tick: int = 0  # `envs`, unless the number of ranks has changed since

    def __post_init__(self) -> None:
        # An exact fraction, because with a float the number of updates owed would depend on rounding.
        self._ratio = Fraction(self.replay_ratio).limit_denominator(1_000_000)

    def updates_owed(self, env_steps: int) -> int:
        """Return how many updates must have been taken after this many global env steps."""
        since = max(env_steps - max(self.learning_starts, self.origin_env_steps), 0)
        return self.origin_updates + self._updates_after(since)

    def _updates_after(self, env_steps: int) -> int:
        """Return how many updates this many env steps make due."""
        if self.rollout_steps:
            env_steps -= env_steps % (self.rollout_steps * self.envs)
        return env_steps * self._ratio.numerator // (self._ratio.denominator * self.global_batch)

    def updates_due(self) -> int:
        """Return how many updates are to be taken now: those owed so far minus those taken."""
        return self.updates_owed(self.env_steps) - self.updates

    def tick(self) -> None:
        """Count one env step in every environment of the job."""
        self.advance(self.envs)

    def advance(self, env_steps: int) -> None:
        """Add this many env steps to those of the job."""
        self.env_steps += env_steps
        self.last_tick = env_steps

    def count_update(self) -> None:
        """Count one update; the trainer calls it when an update begins."""
        self.updates += 1

    def poll_due(self, iterations: int) -> bool:
        """Return True in every `iterations`-th iteration, when ranks exchange statistics without an update."""
        return self.due(iterations * self.envs)

    def own_state(self) -> dict[str, Any]:
        """Return the counts that only this rank has, for its file of a checkpoint: none, but see `WorkerClock`."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the counts that `own_state` returned."""

    def due(self, every: int) -> bool:
        """Return True if the latest env steps reached or passed a multiple of `every` global env steps; 0: never."""
        return every > 0 and self.env_steps // every > (self.env_steps - self.last_tick) // every

    def state(self) -> dict[str, float]:
        """Return the counts and the settings they were counted with, equal on all ranks, for a checkpoint."""
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
        """Return the settings that decide, with the counts, how many updates are owed."""
        return {
            "global_batch": self.global_batch,
            "replay_ratio": self.replay_ratio,
            "learning_starts": self.learning_starts,
            "rollout_steps": self.rollout_steps,
        }

    def resume(self, state: Mapping[str, Any], refill: bool = False) -> None:
        """Continue from the counts of a checkpoint.

        If the settings make updates due more or less often than before, they do so from here on only: a smaller batch
        must not catch up on updates that were never due with the larger one.

        Args:
            state: what `state` returned.
            refill: whether replay is empty, so that it fills for `learning_starts` env steps before the next update.
        """
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.last_tick = state["last_tick"]
        if refill:
            self.refill()
        elif all(state.get(name, value) == value for name, value in self._rate().items()):
            self.origin_env_steps, self.origin_updates = state["origin_env_steps"], state["origin_updates"]
        else:
            # Replay may still be filling after an earlier resume, and updates already owed are still to be taken.
            self.origin_env_steps = max(self.env_steps, state["origin_env_steps"])
            self.origin_updates = state["owed_updates"]

    def refill(self) -> None:
        """Postpone the next update by `learning_starts` env steps, in which the empty replay fills."""
        self.origin_env_steps = self.env_steps + self.learning_starts
        self.origin_updates = self.updates


@dataclass
class WorkerClock(Clock):
    """The clock of a worker under `--sync server`, which gets the counts of the job from the server's replies.

    A worker takes updates after its own env steps, at the replay ratio, so that the whole job keeps to that ratio.
    `envs` and `global_batch` count this rank alone. Evaluations and checkpoints are due only right after all ranks have
    synchronized.

    Args:
        own_earliest: number of its own env steps before the first update, so that its replay is not empty.
        own_env_steps, own_updates: this rank's own counts.
        reported_env_steps: how many of its own env steps it has sent to the server.
        learning_since: its own env steps when learning began; None before.
        synchronized: whether all ranks have synchronized since the last `tick`.
    """

    own_earliest: int = 0
    own_env_steps: int = 0
    own_updates: int = 0
    reported_env_steps: int = 0
    learning_since: int | None = None
    synchronized: bool = False

    def updates_due(self) -> int:
        """Return how many updates this rank has to take now."""
        if self.learning_since is None:
            filled = self.env_steps >= max(self.learning_starts, self.origin_env_steps)
            if not filled or self.own_env_steps < self.own_earliest:
                return 0
            self.learning_since = self.own_env_steps
        return self._updates_after(self.own_env_steps - self.learning_since) - self.own_updates

    def tick(self) -> None:
        """Count one env step in every environment of this rank."""
        self.own_env_steps += self.envs
        if self.synchronized:  # the events that were due at the synchronization have been run
            self.last_tick, self.synchronized = 0, False

    def count_update(self) -> None:
        """Count one update of this rank; `set_job` sets the number of the job's updates."""
        self.own_updates += 1

    def set_job(self, env_steps: int, updates: int, last_tick: int) -> None:
        """Set the counts of the job that the server sent.

        Args:
            env_steps: env steps of the whole job.
            updates: updates of the whole job.
            last_tick: number of the latest env steps in which an event became due; 0: none is due.
        """
        self.env_steps, self.updates, self.last_tick = env_steps, updates, last_tick

    def pop_unreported(self) -> int:
        """Return this rank's env steps since the last call, to be sent to the server."""
        env_steps = self.own_env_steps - self.reported_env_steps
        self.reported_env_steps = self.own_env_steps
        return env_steps

    def poll_due(self, iterations: int) -> bool:
        """Return True in every `iterations`-th iteration, and in each before learning starts.

        Only an exchange tells a worker how many env steps the job has, so rarer ones would delay its first update.
        """
        return self.learning_since is None or self.own_env_steps // self.envs % iterations == 0

    def own_state(self) -> dict[str, Any]:
        """Return this rank's own counts, and the settings they were counted with, for its file of a checkpoint."""
        own = {name: getattr(self, name) for name in ("own_env_steps", "own_updates", "learning_since")}
        return {**own, **self._rate()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the counts that `own_state` returned.

        If the settings now make updates due more or less often, they do so from here on.
        """
        rate = self._rate()
        for name in state.keys() - rate.keys():
            setattr(self, name, state[name])
        self.reported_env_steps = self.own_env_steps
        same_rate = all(state.get(name, value) == value for name, value in rate.items())
        if self.learning_since is not None and not same_rate:
            self.learning_since, self.own_updates = self.own_env_steps, 0

    def resume(self, state: Mapping[str, Any], refill: bool = False) -> None:
        """Continue from the counts of a checkpoint, at which all ranks had synchronized; see `Clock.resume`."""
        super().resume(state, refill)
        self.synchronized = True
