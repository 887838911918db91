"""When things happen: integer arithmetic on global env steps, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass
class Clock:
    """Counts global env steps and updates, and says what they make due.

    Ranks that hold equal clocks do the same thing at the same time without asking each other, so nothing
    else (one rank's episodes, wall time, replay content) may decide what all ranks do together.

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
    last_tick: int = 0  # env steps of it: `envs`, but where the world has changed since

    def __post_init__(self) -> None:
        # A float ratio would make "how many updates are owed" depend on rounding.
        self._ratio = Fraction(self.replay_ratio).limit_denominator(1_000_000)

    def updates_owed(self, env_steps: int) -> int:
        """Updates that must have been taken once there were this many global env steps."""
        since = max(env_steps - max(self.learning_starts, self.origin_env_steps), 0)
        learned_from = since * self._ratio.numerator
        return self.origin_updates + learned_from // (self._ratio.denominator * self.global_batch)

    def update_due(self) -> bool:
        """Whether an update is owed now."""
        return self.updates < self.updates_owed(self.env_steps)

    def tick(self) -> None:
        """Every environment of the job took one step."""
        self.advance(self.envs)

    def advance(self, env_steps: int) -> None:
        """The job took so many env steps more."""
        self.env_steps += env_steps
        self.last_tick = env_steps

    def count_update(self) -> None:
        """An update that was due is under way."""
        self.updates += 1

    def poll_due(self, iterations: int) -> bool:
        """Whether so many iterations have passed since this was last so."""
        return self.due(iterations * self.envs)

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps for each rank: ranks that step together have nothing of their own."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `own_state` gave."""

    def due(self, every: int) -> bool:
        """Whether the last tick reached or passed a multiple of `every` env steps; never for 0."""
        return every > 0 and self.env_steps // every > (self.env_steps - self.last_tick) // every

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
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
        """What decides how many updates are owed, the counters aside."""
        return {
            "global_batch": self.global_batch,
            "replay_ratio": self.replay_ratio,
            "learning_starts": self.learning_starts,
        }

    def resume(self, state: Mapping[str, Any], refill: bool = False) -> None:
        """Go on from a checkpoint.

        Where updates are owed at another rate than before, they are owed from here on only: a smaller batch
        must not be made to catch up on updates that the larger one never owed.

        Args:
            state: what `state` gave.
            refill: replay was not kept: it fills for `learning_starts` env steps before the next update.
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
        """Replay is empty: it fills for `learning_starts` env steps before the next update."""
        self.origin_env_steps = self.env_steps + self.learning_starts
        self.origin_updates = self.updates


@dataclass
class ReportedClock(Clock):
    """The clock of a rank that steps by itself: what it knows of the job it is told, now and then.

    When its own next update is due it counts by its own env steps, which keeps the whole job at the replay ratio.
    `envs` and `global_batch` are this rank's alone. What all ranks do together is due only when they have met.

    Args:
        own_earliest: own env steps before the first update: replay must hold something of this rank's.
    """

    own_earliest: int = 0
    own_env_steps: int = 0
    own_updates: int = 0
    told_env_steps: int = 0  # how many of its own it has reported
    learning_since: int | None = None  # own env steps
    met: bool = False

    def update_due(self) -> bool:
        """Whether this rank owes an update now."""
        if self.learning_since is None:
            filled = self.env_steps >= max(self.learning_starts, self.origin_env_steps)
            if not filled or self.own_env_steps < self.own_earliest:
                return False
            self.learning_since = self.own_env_steps
        learned_from = (self.own_env_steps - self.learning_since) * self._ratio.numerator
        return self.own_updates < learned_from // (self._ratio.denominator * self.global_batch)

    def tick(self) -> None:
        """Every environment of this rank took one step."""
        self.own_env_steps += self.envs
        if self.met:  # what was due then is done
            self.last_tick, self.met = 0, False

    def count_update(self) -> None:
        """An update of this rank's is under way; those of the job it is told."""
        self.own_updates += 1

    def hear(self, env_steps: int, updates: int, last_tick: int) -> None:
        """Take over how far the job is, and the env steps within which something came due: 0 is nothing."""
        self.env_steps, self.updates, self.last_tick = env_steps, updates, last_tick

    def unreported(self) -> int:
        """Own env steps since the last call."""
        env_steps = self.own_env_steps - self.told_env_steps
        self.told_env_steps = self.own_env_steps
        return env_steps

    def poll_due(self, iterations: int) -> bool:
        """Whether so many iterations have passed since this was last so; before learning always, not to be late."""
        return self.learning_since is None or self.own_env_steps // self.envs % iterations == 0

    def own_state(self) -> dict[str, Any]:
        """What is this rank's alone, and at which rate it was counted."""
        own = {name: getattr(self, name) for name in ("own_env_steps", "own_updates", "learning_since")}
        return {**own, **self._rate()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `own_state` gave, all of it reported. At another rate, updates are owed from here on only."""
        rate = self._rate()
        for name in state.keys() - rate.keys():
            setattr(self, name, state[name])
        self.told_env_steps = self.own_env_steps
        same_rate = all(state.get(name, value) == value for name, value in rate.items())
        if self.learning_since is not None and not same_rate:
            self.learning_since, self.own_updates = self.own_env_steps, 0

    def resume(self, state: Mapping[str, Any], refill: bool = False) -> None:
        """Go on from a checkpoint, which all ranks wrote together."""
        super().resume(state, refill)
        self.met = True
