"""Run one process of an elastic job; it trains in one world (set of connected ranks) after the other."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hvdqn.acting import Epsilons
from hvdqn.checkpoint import Checkpoints, reset_environments
from hvdqn.comm import Comm, kill_descendants
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, check_world
from hvdqn.elastic.trainer import ElasticTrainer, HostsChangedError
from hvdqn.elastic.world import ElasticWorld
from hvdqn.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_JOB_FAILED, EXIT_REQUEUE, UserError
from hvdqn.faults import StopSignal, Watchdog
from hvdqn.logs import setup_logging
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts, make_clock, make_learner
from hvdqn.rank import Parts
from hvdqn.recorder import Recorder
from hvdqn.role import assign_role
from hvdqn.run_directory import open_run_dir, record_config, sole_job
from hvdqn.startup import check_same_config, start_run
from hvdqn.sync import make_strategy

log = logging.getLogger(__name__)

T = TypeVar("T")


class SoloComm(LocalComm):
    """Stand in for the other ranks with this rank's own data, to build what does not depend on theirs."""

    def __init__(self, comm: Comm) -> None:
        Comm.__init__(self, comm.rank, comm.size, comm.local_rank, comm.local_size)

    def all_gather_object(self, obj: T) -> list[T]:
        """Return `obj` for every rank."""
        return [obj] * self.size

    def cores_of_host(self) -> list[set[int]]:
        """Return this rank's cores for every rank of the host."""
        return [os.sched_getaffinity(0)] * self.local_size


class ElasticWorker:
    """Run one process of an elastic job.

    Args:
        config: the checked settings, the same for every process.
        max_np: number of ranks of the largest world.
        world: the job.
        stop: whether this process was asked to stop.
    """

    def __init__(self, config: Config, max_np: int, world: ElasticWorld, stop: StopSignal) -> None:
        self.config, self.max_np, self.world, self.stop = config, max_np, world, stop
        self.timer = PhaseTimer()
        self.trainer: ElasticTrainer | None = None  # of the last world that this rank has trained in
        self.comm: Comm = LocalComm()

    def run(self) -> int:
        """Train in one world after the other; return the exit code.

        Raises:
            UserError: the input is wrong, on all ranks.
        """
        while True:
            with self.timer.during("comm"):
                comm = self.world.connect()
            if comm is None:
                exit_worker(f"host {os.environ['HOROVOD_HOSTNAME']} was taken from the job")
            self.comm = comm
            setup_logging(comm.rank, comm.size)
            try:
                return self.train()
            except HostsChangedError:
                continue
            except self.world.peer_lost:
                self.world.cut()

    def train(self) -> int:
        """Train in this world to the end; return the exit code."""
        comm, before = self.comm, self.trainer
        with self.timer.during("comm"):
            positions = comm.all_gather_object(before.position() if before else None)
            first = positions.index(max((p for p in positions if p), default=None))
            mine = before.shared_state() if before and comm.rank == first else None
            state = comm.broadcast_object(mine, first)
        run_dir = Path(state["run_dir"]) if state else self.open()
        stall_timeout = self.config.parallel.stall_timeout
        watchdog = Watchdog(run_dir / "heartbeats", comm, self.timer, stall_timeout, EXIT_JOB_FAILED)
        with closing(watchdog), sole_job(run_dir, comm):
            trainer = self.join(run_dir, state) if state else self.begin(run_dir)
            self.trainer = trainer
            try:
                if state:
                    log.info(_describe_change(positions, trainer))
                    trainer.run_due_events()  # events that were due when the last world ended may not have run
                trainer.complete()
            except BaseException:
                trainer.leave()
                raise
        with contextlib.suppress(self.world.peer_lost):  # all is done and recorded
            comm.close()
        return EXIT_REQUEUE if trainer.stopped_by == "signal" else EXIT_FINISHED

    def open(self) -> Path:
        """Create the run directory, or open that of a run to resume; return its path."""
        check_same_config(self.config, self.comm)
        return open_run_dir(self.config, self.comm)

    def begin(self, run_dir: Path) -> ElasticTrainer:
        """Begin the run in the first world, or resume it from its newest checkpoint."""
        comm, config = self.comm, self.sized(self.comm.size)
        check_world(config, comm.size)
        make = partial(ElasticTrainer, self.world)
        trainer = start_run(config, comm, run_dir, self.stop, self.timer, make)
        record_config(self.config, comm, run_dir)  # not that of a world
        replay = trainer.acting.replay
        trainer.agree_on_filling(len(replay) * comm.size >= trainer.clock.learning_starts)
        return trainer

    def join(self, run_dir: Path, state: Mapping[str, Any]) -> ElasticTrainer:
        """Continue in a later world: keep (or build) environments and replay, and load the shared state."""
        comm, config, before = self.comm, self.sized(self.comm.size), self.trainer
        kept = before.parts if before else self.build_alone(state["clock"]["env_steps"])
        parts = self.adapt(kept, config)
        checkpoints = Checkpoints(run_dir / "checkpoints", comm, config.run.checkpoint_keep, self.timer)
        if before is None:
            self.timer.load(state["seconds"])
        recorder = Recorder(config, comm, run_dir, parts, checkpoints)
        trainer = ElasticTrainer(self.world, config, comm, self.stop, parts, recorder)
        trainer.load_shared_state(state)
        if before is None:
            reset_environments(parts)
        else:
            recorder.hint = before.recorder.hint  # given once in a run
        trainer.agree_on_filling(before is not None and before.filling_env_steps <= 0)
        if before is not None and before.filling_env_steps > 0:
            trainer.filling_env_steps = min(trainer.filling_env_steps, before.filling_env_steps)
        return trainer

    def adapt(self, parts: Parts, config: Config) -> Parts:
        """Return the parts with a clock, learner and strategy for the ranks that are connected now.

        Network, environments and replay stay.
        """
        comm = self.comm
        role = assign_role(config.parallel.sync, comm.rank, comm.size)
        clock = make_clock(config, role, comm.size)
        network = parts.learner.online
        learner = make_learner(config, comm, network, parts.device)
        assert parts.acting is not None, "all ranks of an elastic job act"
        parts.acting.actor.set_network(network)
        return replace(
            parts,
            role=role,
            clock=clock,
            learner=learner,
            strategy=make_strategy(config, learner, comm, self.timer, clock),
            epsilons=Epsilons(config.exploration, config.environment.envs_per_rank, role.index, role.of),
        )

    def build_alone(self, env_steps: int) -> Parts:
        """Build the parts of a new rank. If that fails, its host cannot join, and the job goes on without it."""
        try:
            return build_parts(self.sized(self.comm.size), SoloComm(self.comm), self.timer, env_steps)
        except UserError as error:
            exit_worker(f"host {os.environ['HOROVOD_HOSTNAME']} cannot join: {error}")

    def sized(self, size: int) -> Config:
        """Return the settings of a world: each rank holds as much replay as in the largest world."""
        return self.config.replace(replay_capacity=self.config.replay.replay_capacity * size // self.max_np)


def _describe_change(positions: Sequence[tuple[int, ...] | None], trainer: ElasticTrainer) -> str:
    """Return one line about a new world: its ranks, its env steps, and which ranks are new."""
    new = [str(rank) for rank, position in enumerate(positions) if position is None]
    ranks = "1 rank" if len(positions) == 1 else f"{len(positions)} ranks"
    line = f"{ranks} from env step {trainer.clock.env_steps:,} on"
    if new:
        line += (
            f"; rank {', '.join(new)} is new and fills its replay for {trainer.clock.learning_starts:,} "
            f"env steps before it contributes"
        )
    return line


def exit_worker(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """End this worker, not the job; skip the exit hooks, which wait for other ranks."""
    log.error(message)
    sys.stdout.flush()
    kill_descendants()
    os._exit(code)
