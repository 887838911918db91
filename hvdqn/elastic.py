"""Train on hosts that come and go: Horovod elastic over Gloo.

    launch/elastic.sh --hosts h1:4,h2:4,h3:4 --min-np 4 -- --preset atari --run-dir /shared/runs/pong

Every worker runs this file; flags are those of `hvdqn.train`, and the two of `elastic_options`. When a rank dies, the
others form a new world and go on; when a host comes, its ranks join. Ranks are replicas: after an update each of them
holds the same weights, moments and clock. So every finished update is committed by all ranks, at no cost, and after a
loss the rank that got furthest hands its state to all. Replay and environments stay where they are; who is new takes
part in the averages without a gradient until its replay has filled as it does at the start of a run.

Exit codes: 0, 2 and 75 as of `hvdqn.train`, and 70 where all ranks failed: these speak for the job, which
launch/elastic.sh then ends. Any other is that of a worker that is lost, and may be replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hvdqn.checkpoint import Checkpoints
from hvdqn.comm import Comm, launcher_rank, launcher_size
from hvdqn.comm.horovod import ElasticWorld
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, check_world, parse
from hvdqn.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_REQUEUE,
    DriftError,
    LaunchError,
    NonFiniteError,
    UserError,
)
from hvdqn.faults import StopSignal, Watchdog
from hvdqn.learner import Learned
from hvdqn.logs import setup_logging
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import Parts, build_parts, make_clock, make_epsilons, make_learner
from hvdqn.process import tune_process
from hvdqn.replay import Batch
from hvdqn.resume import Progress, begin
from hvdqn.run_directory import open_run_dir, record_config, sole_job
from hvdqn.sync.gradients import Gradients
from hvdqn.train import (
    Rest,
    Training,
    check_same_config,
    refuse,
    refuse_unconnected,
    start,
)

T = TypeVar("T")

EXIT_JOB_FAILED = 70
# Iterations between looks whether hosts came or went.
LOOK_ITERATIONS = 128


class HostsChangedError(Exception):
    """The launcher has another plan of who belongs to the job; raised on all ranks at once, between iterations."""


class ElasticTraining(Training):
    """Training in one world: from when its ranks connect until one of them is lost or another is to join.

    Args:
        world: the job, through all its worlds.
        config: the settings of a world of this size.
        comm: the ranks of this world.
        run_dir: where the run is recorded.
        stop: whether this rank was told to stop.
        parts: of this rank.
        checkpoints: of this run.

    Raises:
        UserError: ranks are no replicas under this `--sync`.
    """

    def __init__(
        self,
        world: ElasticWorld,
        config: Config,
        comm: Comm,
        run_dir: Path,
        stop: StopSignal,
        parts: Parts,
        checkpoints: Checkpoints,
    ) -> None:
        super().__init__(config, comm, run_dir, stop, parts, checkpoints)
        self.world = world
        assert isinstance(self.learner.sync, Gradients), "elastic_config refuses all others"
        self.sync = self.learner.sync
        self.filling_env_steps = 0  # left until this rank's replay counts as filled
        self.logged_at_env_steps = -1

    def position(self) -> tuple[int, ...]:
        """How far this rank got: larger is further, equal is the same bit for bit."""
        done = (self.progress.evaluated_at_env_steps, self.saved_at_env_steps, self.logged_at_env_steps)
        return (self.clock.env_steps, self.clock.updates, *done)

    def leave(self) -> None:
        """Come to rest when the world has ended: an update that was under way never was."""
        if self.sync.handle is not None:
            self.sync.handle = None
            self.clock.updates -= 1
        self.metrics.close()

    def memento(self) -> dict[str, Any]:
        """All that ranks have in common, for those that are behind."""
        return {
            "run_dir": str(self.run_dir),
            "learner": self.learner.state(),
            "counters": self.learner.counters(),
            "stop_voted": self.learner.stop_voted,
            "clock": self.clock.state(),
            "progress": asdict(self.progress),
            "saved_at_env_steps": self.saved_at_env_steps,
            "logged_at_env_steps": self.logged_at_env_steps,
            "seconds": self.timer.seconds(),
        }

    def take_over(self, memento: Mapping[str, Any]) -> None:
        """Go on where the rank was that `memento` is of."""
        self.learner.load_state(memento["learner"])
        self.learner.load_counters(memento["counters"])
        self.learner.stop_voted = memento["stop_voted"]
        self.clock.resume(memento["clock"])
        self.progress = Progress(**memento["progress"])
        self.progress.world_changes += 1
        self.saved_at_env_steps = memento["saved_at_env_steps"]
        self.logged_at_env_steps = memento["logged_at_env_steps"]
        self.metrics.resume(self.clock.env_steps, self.clock.updates)

    def agree_on_filling(self, filled: bool) -> None:
        """Say whether this rank's replay is filled. Where no rank's is, all begin to learn at the same time."""
        if not any(self.comm.all_gather_object(filled)):
            self.clock.refill()
        elif not filled:
            self.filling_env_steps = self.clock.learning_starts

    def begin_update(self, batch: Batch | None) -> Rest:
        """Begin an update as far as is good before the environments step; what is left to do of it."""
        updates = self.clock.updates
        try:
            return super().begin_update(batch)
        except self.world.peer_lost:  # the exchange could not be launched: it is no update under way
            self.clock.updates = updates
            raise

    def draw(self) -> Batch | None:
        """This rank's next minibatch; None while its replay fills."""
        return super().draw() if self.filling_env_steps <= 0 else None

    def act(self, meanwhile: Rest | None = None) -> Learned | None:
        """One env step in every environment, into replay."""
        learned = super().act(meanwhile)
        self.filling_env_steps -= self.clock.envs
        return learned

    def attend(self) -> None:
        """Do what the last env step made due besides updates.

        Raises:
            HostsChangedError: it is time for a new world.
        """
        super().attend()
        if self.clock.due(LOOK_ITERATIONS * self.clock.envs):
            with self.timer.during("comm"):
                changed = self.comm.broadcast_object(self.comm.rank == 0 and self.world.changed())
            if changed and self.clock.env_steps < self.config.run.total_env_steps:
                raise HostsChangedError

    def log(self) -> None:
        """One line of metrics, once."""
        if self.logged_at_env_steps != self.clock.env_steps:
            super().log()
            self.logged_at_env_steps = self.clock.env_steps

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        return {**super().summary(), "world_changes": self.progress.world_changes}


class Alone(LocalComm):
    """A rank's place in the world without the others, to build what they need not wait for."""

    def __init__(self, comm: Comm) -> None:
        Comm.__init__(self, comm.rank, comm.size, comm.local_rank, comm.local_size)

    def all_gather_object(self, obj: T) -> list[T]:
        """As if the others had said the same."""
        return [obj] * self.size

    def cores_of_host(self) -> list[set[int]]:
        """As if the others of this host were bound as this rank is."""
        return [os.sched_getaffinity(0)] * self.local_size


class Member:
    """One process of an elastic job, through all worlds that it belongs to.

    Args:
        config: checked, the same for every process.
        max_np: ranks of the largest world.
        world: the job.
        stop: whether this process was told to stop.
    """

    def __init__(self, config: Config, max_np: int, world: ElasticWorld, stop: StopSignal) -> None:
        self.config, self.max_np, self.world, self.stop = config, max_np, world, stop
        self.timer = PhaseTimer()
        self.training: ElasticTraining | None = None  # in the last world that this rank was whole in
        self.comm: Comm = LocalComm()

    def serve(self) -> int:
        """Train in one world after the other; return the exit code.

        Raises:
            UserError: the input is wrong, the same on every rank.
        """
        while True:
            with self.timer.during("comm"):
                comm = self.world.connect()
            if comm is None:
                give_up(f"host {os.environ['HOROVOD_HOSTNAME']} was taken from the job")
            self.comm = comm
            setup_logging(comm.rank, comm.size)
            try:
                return self.live()
            except HostsChangedError:
                continue
            except self.world.peer_lost:
                self.world.cut()

    def live(self) -> int:
        """Train in this world to the end; return the exit code."""
        comm, before = self.comm, self.training
        with self.timer.during("comm"):
            positions = comm.all_gather_object(before.position() if before else None)
            first = positions.index(max((p for p in positions if p), default=None))
            memento = comm.broadcast_object(
                before.memento() if before and comm.rank == first else None, first
            )
        run_dir = Path(memento["run_dir"]) if memento else self.open()
        stall_timeout = self.config.parallel.stall_timeout
        heartbeats = run_dir / "heartbeats"
        watchdog = Watchdog(heartbeats, comm, self.timer, stall_timeout, EXIT_JOB_FAILED)
        with closing(watchdog), sole_job(run_dir, comm):
            training = self.join(run_dir, memento) if memento else self.begin(run_dir)
            self.training = training
            try:
                if memento:
                    training.metrics.say(_change(positions, training))
                    training.attend()  # what was due when the last world ended may not have been done
                training.complete()
            except BaseException:
                training.leave()
                raise
        with contextlib.suppress(self.world.peer_lost):  # all is done and recorded
            comm.close()
        return EXIT_REQUEUE if training.learner.stop_voted else EXIT_FINISHED

    def open(self) -> Path:
        """The run directory of a run that has not begun."""
        check_same_config(self.config, self.comm)
        return open_run_dir(self.config, self.comm)

    def begin(self, run_dir: Path) -> ElasticTraining:
        """The first world: begin the run, or go on from its newest checkpoint, as `hvdqn.train` does."""
        comm, config = self.comm, self.sized(self.comm.size)
        check_world(config, comm.size)
        training = start(partial(ElasticTraining, self.world), config, comm, run_dir, self.stop, self.timer)
        record_config(self.config, comm, run_dir)  # not that of a world
        training.agree_on_filling(len(training.replay) * comm.size >= training.clock.learning_starts)
        return training

    def join(self, run_dir: Path, memento: Mapping[str, Any]) -> ElasticTraining:
        """A later world: keep what is this rank's own, or build it, and take over what ranks have in common."""
        comm, config, before = self.comm, self.sized(self.comm.size), self.training
        kept = before.parts if before else self.build_alone(memento["clock"]["env_steps"])
        clock = make_clock(config, comm)
        learner = make_learner(config, comm, kept.learner.online, self.timer, kept.device, clock)
        epsilons = make_epsilons(config, comm)
        parts = replace(kept, clock=clock, learner=learner, epsilons=epsilons)
        checkpoints = Checkpoints(run_dir / "checkpoints", comm, config.run.checkpoint_keep, self.timer)
        if before is None:
            self.timer.load(memento["seconds"])
        training = ElasticTraining(self.world, config, comm, run_dir, self.stop, parts, checkpoints)
        training.take_over(memento)
        if before is None:
            begin(parts)
        else:
            training.hint = before.hint  # given once in a run
        training.agree_on_filling(before is not None and before.filling_env_steps <= 0)
        if before is not None and before.filling_env_steps > 0:
            training.filling_env_steps = min(training.filling_env_steps, before.filling_env_steps)
        return training

    def build_alone(self, env_steps: int) -> Parts:
        """The parts of a rank that is new. What keeps a host from joining is its own trouble, not the job's."""
        try:
            return build_parts(self.sized(self.comm.size), Alone(self.comm), self.timer, env_steps)
        except UserError as error:
            give_up(f"host {os.environ['HOROVOD_HOSTNAME']} cannot join: {error}")

    def sized(self, size: int) -> Config:
        """The settings of a world: its replay is what its ranks hold, and each holds the same in all worlds."""
        return self.config.replace(replay_capacity=self.config.replay.replay_capacity * size // self.max_np)


def _change(positions: Sequence[tuple[int, ...] | None], training: ElasticTraining) -> str:
    """One line on a new world."""
    new = [str(rank) for rank, position in enumerate(positions) if position is None]
    ranks = "1 rank" if len(positions) == 1 else f"{len(positions)} ranks"
    line = f"{ranks} from env step {training.clock.env_steps:,} on"
    if new:
        line += (
            f"; rank {', '.join(new)} is new and fills its replay for {training.clock.learning_starts:,} "
            f"env steps before it contributes"
        )
    return line


def give_up(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """End this worker, by default not the job: without the exit hooks, which wait for other ranks."""
    print(f"hvdqn: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def elastic_options(argv: Sequence[str]) -> tuple[int, float, list[str]]:
    """`--max-np N`, ranks of the largest world; `--join-timeout SECONDS`, patience with workers; the other flags.

    Raises:
        UserError: a value is wrong.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--max-np", type=int, default=0)
    parser.add_argument("--join-timeout", type=float, default=60.0)
    try:
        options, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see launch/elastic.sh --help") from None
    if options.max_np < 1 and "--help" not in argv:
        raise UserError("--max-np N is missing: the ranks of the largest world; launch/elastic.sh gives it")
    if not options.join_timeout > 0:
        raise UserError(f"--join-timeout is {options.join_timeout}; it must be above 0")
    return options.max_np, options.join_timeout, rest


def elastic_config(argv: Sequence[str], max_np: int) -> Config:
    """The run that the flags ask for, as far as it can be elastic.

    Raises:
        UserError: something in it is wrong, or cannot be elastic.
    """
    config = parse(argv, prog="python -m hvdqn.elastic")
    if config.parallel.comm not in ("auto", "horovod"):
        raise UserError(f"--comm {config.parallel.comm} cannot lose ranks; drop it, elastic runs use Horovod")
    if config.parallel.device == "cuda":
        raise UserError(
            "--device cuda: NCCL does not survive the loss of a rank; drop it, elastic runs use CPUs"
        )
    if config.parallel.sync != "gradients":
        raise UserError(f"--sync {config.parallel.sync} cannot lose ranks; use --sync gradients")
    # However the world shrinks: when a rank counts as filled, there must be something to draw in its replay.
    earliest = 2 * (config.replay.n_step + 1) * max_np * config.environment.envs_per_rank
    return config.replace(device="cpu", learning_starts=max(config.replay.learning_starts, earliest))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every worker; returns the exit code."""
    tune_process()
    stop = StopSignal()
    try:
        setup_logging(launcher_rank(), launcher_size())
        max_np, join_timeout, rest = elastic_options(sys.argv[1:] if argv is None else argv)
        config = elastic_config(rest, max_np)
        member = Member(config, max_np, ElasticWorld(join_timeout), stop)
    except (UserError, LaunchError) as error:
        return refuse_unconnected(str(error), stop)
    try:
        return member.serve()
    except UserError as error:
        return refuse(str(error), member.comm.rank)
    except (DriftError, NonFiniteError) as error:  # on all ranks at once
        return refuse(str(error), member.comm.rank, EXIT_JOB_FAILED)
    except LaunchError as error:
        # Who never belonged to a world may only have had to wait too long for one.
        give_up(str(error), EXIT_JOB_FAILED if member.training else EXIT_FAILED)
    except Exception:
        give_up(f"rank {member.comm.rank} of {member.comm.size} failed: {traceback.format_exc()}")


if __name__ == "__main__":
    sys.exit(main())
