"""The training loop of an elastic job: a `Trainer` that stops at any point and continues with other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdqn.checkpoint import load_shared_state, shared_state
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.elastic.world import ElasticWorld
from hvdqn.faults import StopSignal
from hvdqn.rank import Parts
from hvdqn.recorder import Recorder
from hvdqn.replay import Batch
from hvdqn.trainer import Trainer

# Iterations between checks whether hosts came or went.
CHECK_ITERATIONS = 128


class HostsChangedError(Exception):
    """The launcher has a new plan of who belongs to the job. Raised on all ranks at once, between iterations."""


class ElasticTrainer(Trainer):
    """Train in one world, that is, with one set of connected ranks: until a rank is lost or another one joins.

    Args:
        world: the job, through all its worlds.
        config: settings of a world of this size.
        comm: the ranks of this world.
        stop: whether this rank was asked to stop.
        parts: of this rank.
        recorder: of the run.
    """

    def __init__(
        self,
        world: ElasticWorld,
        config: Config,
        comm: Comm,
        stop: StopSignal,
        parts: Parts,
        recorder: Recorder,
    ) -> None:
        super().__init__(config, comm, stop, parts, recorder)
        self.world = world
        self.filling_env_steps = 0  # global env steps left until this rank's replay counts as filled

    def position(self) -> tuple[int, ...]:
        """Return a tuple that says how far this rank has trained; of two ranks, the one with the larger tuple is ahead.

        Ranks with equal tuples hold the same state, bit for bit.
        """
        recorder = self.recorder
        done = (
            recorder.progress.evaluated_at_env_steps,
            recorder.saved_at_env_steps,
            recorder.logged_at_env_steps,
        )
        return (self.clock.env_steps, self.clock.updates, *done)

    def leave(self) -> None:
        """Stop training in this world; an update that has begun is discarded."""
        if self.updating:
            self.updating = False
            self.clock.updates -= 1
        self.recorder.metrics.close()

    def shared_state(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks; ranks that are behind or new load it."""
        recorder = self.recorder
        return {
            **shared_state(self.parts, recorder.totals, recorder.progress),
            "run_dir": str(recorder.run_dir),
            "stopped_by": self.stopped_by,
            "saved_at_env_steps": recorder.saved_at_env_steps,
            "logged_at_env_steps": recorder.logged_at_env_steps,
            "seconds": self.timer.seconds(),
        }

    def load_shared_state(self, state: Mapping[str, Any]) -> None:
        """Load the state that another rank's `shared_state` returned."""
        recorder = self.recorder
        recorder.progress = load_shared_state(state, self.parts, recorder.totals)
        recorder.progress.world_changes += 1
        self.stopped_by = state["stopped_by"]
        recorder.saved_at_env_steps = state["saved_at_env_steps"]
        recorder.logged_at_env_steps = state["logged_at_env_steps"]
        recorder.resume()

    def agree_on_filling(self, filled: bool) -> None:
        """Exchange whether each rank's replay is filled. If none is, all ranks start to learn at the same time."""
        if not any(self.comm.all_gather_object(filled)):
            self.clock.refill()
        elif not filled:
            self.filling_env_steps = self.clock.learning_starts

    def iterate(self) -> None:
        """Take the updates that are due, and one step in every environment."""
        super().iterate()
        self.filling_env_steps -= self.clock.envs

    def sample(self) -> Batch | None:
        """Return this rank's next minibatch; None while its replay fills."""
        return super().sample() if self.filling_env_steps <= 0 else None

    def run_due_events(self) -> None:
        """Run the due events, and check from time to time whether hosts came or went.

        Raises:
            HostsChangedError: it is time for a new world.
        """
        super().run_due_events()
        if self.clock.due(CHECK_ITERATIONS * self.clock.envs):
            with self.timer.during("comm"):
                changed = self.comm.broadcast_object(self.comm.rank == 0 and self.world.changed())
            if changed and self.clock.env_steps < self.config.run.total_env_steps:
                raise HostsChangedError
