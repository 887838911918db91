"""Train one deep Q-network on all ranks of a job.

    python -m hvdqn.train --preset cartpole                        one process
    horovodrun -np 8 python -m hvdqn.train --preset atari          Horovod, over Gloo or MPI
    mpirun -np 8 python -m hvdqn.train --preset atari              Horovod, or --comm mpi
    srun --mpi=pmix python -m hvdqn.train --preset atari           the same inside a Slurm job
    torchrun --nproc-per-node 8 -m hvdqn.train --preset atari      torch.distributed, no Horovod needed

Every rank runs this file. It builds the parts, runs the loop (`Training.run`) and closes. Settings and their
flags: `hvdqn/config.py`, or `--help`. Exit codes: 0 finished, 2 wrong input, 75 stopped by a signal after a
checkpoint (start it again with the same run directory and it goes on), 1 anything else.
"""

from __future__ import annotations

import gc

gc.disable()  # what imports make stays: to look for garbage among it takes a fifth of a rank's start

import ctypes
import os.path
import re
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from hvdqn import __version__
from hvdqn.checkpoint import LEARNER, Checkpoint, Checkpoints
from hvdqn.clock import Clock
from hvdqn.comm import Comm, connect, launcher_rank, launcher_size
from hvdqn.config import Config, as_yaml, check_engine, check_world, parse, unused_settings
from hvdqn.envs import find_spec
from hvdqn.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    DriftError,
    LaunchError,
    NonFiniteError,
    StoppedError,
    UserError,
)
from hvdqn.evaluate import Evaluator
from hvdqn.faults import StopSignal, Watchdog, check_replicas, raise_on_all_ranks, sole_job
from hvdqn.learner import Learned
from hvdqn.metrics import Metrics, PhaseTimer, WaitHint, replace_file, write_summary
from hvdqn.parts import Parts, build_parts, device_kind, importance_at, recording
from hvdqn.replay import Batch
from hvdqn.replay.frames import DeviceFrames
from hvdqn.resume import Progress, begin, best_evaluation, contents, find_checkpoint, restore, set_aside

gc.freeze()  # nor is it looked at again
gc.enable()

# Iterations between exchanges of votes and returns while no update carries them. Few, so that a signal is answered
# within half a minute even where an iteration takes seconds.
POLL_ITERATIONS = 8

T = TypeVar("T", bound="Training")
Rest = Callable[[], Learned]
Work = Callable[[Config, Comm, StopSignal, PhaseTimer], int]


class Training:
    """One rank's part in a run: the loop, and what is due in it. Every method is called by all ranks together.

    Args:
        config: checked, the same on every rank.
        comm: the ranks.
        run_dir: where the run is recorded.
        stop: whether this rank was told to stop.
        parts: of this rank.
        checkpoints: of this run.
    """

    def __init__(
        self,
        config: Config,
        comm: Comm,
        run_dir: Path,
        stop: StopSignal,
        parts: Parts,
        checkpoints: Checkpoints,
    ) -> None:
        self.config, self.comm, self.run_dir, self.stop = config, comm, run_dir, stop
        self.checkpoints = checkpoints
        self.parts, self.timer, self.clock = parts, parts.timer, parts.clock
        self.learner, self.replay, self.actor = parts.learner, parts.replay, parts.actor
        self.evaluator = Evaluator(config, comm, parts.device, self.timer, parts.threads, recording(config))
        self.metrics = Metrics(run_dir if comm.rank == 0 else None, config.run.total_env_steps, self.timer)
        self.hint = WaitHint(self.timer, comm.name, self.learner.parameters.numel())
        self.best_eval_return = comm.broadcast_object(best_evaluation(run_dir) if comm.rank == 0 else 0.0)
        self.progress = Progress()
        self.saved_at_env_steps = -1
        self.target_due = False
        # A GPU learns while environments are busy. On a host both would want the same cores.
        self.learns_beside_envs = parts.device.type == "cuda"
        # Of this rank, since it began or went on.
        self.acted_env_steps = 0
        self.seconds_before = self.timer.seconds()

    def begin(self, checkpoint: Checkpoint | None, said: Sequence[str]) -> None:
        """Begin the run, or go on from a checkpoint; say so, after what was said while looking for one."""
        changed: list[str] = []
        if checkpoint is None:
            begin(self.parts)
        else:
            self.progress, changed = restore(self.parts, checkpoint, self.config, self.comm)
            self.saved_at_env_steps = self.clock.env_steps
        self.seconds_before = self.timer.seconds()
        self.metrics.resume(self.clock.env_steps, self.clock.updates)
        self.introduce()
        for line in (*said, *changed):
            self.metrics.say(line)
        total = self.config.run.total_env_steps
        if self.clock.env_steps >= total:
            self.metrics.say(
                f"this run has had its {total:,} env steps: raise --total-env-steps to go on, or choose another "
                f"--run-dir for another run"
            )
        self.decide_on_replay()
        if self.clock.env_steps and self.clock.due(self.config.run.eval_every):
            self.evaluate()  # where a signal cut it short

    def introduce(self) -> None:
        """Say what is about to run."""
        ranks = f"{self.comm.size} rank" + "s" * (self.comm.size > 1)
        ring = self.replay.ring
        megabytes = ring.nbytes / 1e6
        update_every = self.clock.global_batch / self.config.replay.replay_ratio
        self.metrics.say(f"hvdqn {__version__}: {ranks}, comm {self.comm.name} ({self.comm.why})")
        where = f", observations on {self.parts.device}" if isinstance(ring.observation, DeviceFrames) else ""
        self.metrics.say(
            f"each rank: {self.parts.envs.description}; replay {megabytes:,.3g} MB when full{where}"
        )
        self.metrics.say(
            f"network: {self.learner.parameters.numel():,} parameters; global batch {self.clock.global_batch}, "
            f"an update every {update_every:g} env steps; {self.learner.sync.description}"
        )
        for line in unused_settings(self.config):
            self.metrics.say(f"warning: {line}")

    def complete(self) -> None:
        """Train to the end; save, evaluate, record."""
        self.run()
        self.agree()
        self.stop.agreed = True
        self.save()
        self.evaluate()
        self.close()
        with self.timer.during("comm"):
            self.comm.barrier()

    def run(self, until_env_steps: int | None = None) -> None:
        """Step, remember, learn, until there were this many env steps (the run's) or a rank was told to stop."""
        total = self.config.run.total_env_steps if until_env_steps is None else until_env_steps
        self.learner.exchange(self.report())  # a rank may have been told before the start
        while self.clock.env_steps < total and not self.learner.stop_voted:
            self.learner.sync.turn(self.learner, self.iterate, self.report)
            self.timer.start("other")
            self.attend()

    def iterate(self) -> None:
        """Act once in every environment, and take the updates that are due."""
        rest = self.begin_updates()
        learned = self.act(rest if self.learns_beside_envs else None)  # while the gradients travel
        if rest:
            self.tell_replay(learned or rest())
        elif self.clock.poll_due(POLL_ITERATIONS):
            self.learner.exchange(self.report())

    def attend(self) -> None:
        """Do what the last env step made due besides updates."""
        run, due = self.config.run, self.clock.due
        over = self.clock.env_steps >= run.total_env_steps or self.learner.stop_voted
        if over or due(run.eval_every) or due(run.checkpoint_every):
            self.learner.agree()
        self.target_due |= due(self.config.learning.target_every)
        self.sync_target()
        if due(run.log_every):
            self.log()
        if due(run.eval_every):
            self.evaluate()
        if due(run.checkpoint_every):
            self.save()

    def sync_target(self) -> None:
        """Renew the target network if that is due, as soon as the strategy can."""
        differing_ranks = self.learner.sync_target() if self.target_due else None
        if differing_ranks is not None:
            check_replicas(differing_ranks, self.clock.env_steps)
            self.target_due = False

    def agree(self) -> None:
        """Make all replicas the same, the target network too."""
        self.learner.agree()
        self.sync_target()

    def begin_updates(self) -> Rest | None:
        """Begin every update that is due, and finish all but the last; what is left to do of that."""
        rest: Rest | None = None
        while self.clock.update_due():
            if rest and self.replay.sampler.uses_td_errors:
                self.tell_replay(rest())
                rest = None
            batch = self.draw()  # while a GPU works on the update before, or its gradients travel
            if rest:
                self.tell_replay(rest())
            rest = self.begin_update(batch)
            if not self.config.parallel.overlap:
                self.tell_replay(rest())
                rest = None
        return rest

    def begin_update(self, batch: Batch | None) -> Rest:
        """Begin an update as far as is good before the environments step; what is left to do of it."""
        report, done = self.report(), self.clock.env_steps / self.config.run.total_env_steps
        self.clock.count_update()

        def compute() -> None:
            self.timer.start("compute")
            self.learner.begin_update(batch, report, done)

        def all_of_it() -> Learned:
            compute()
            return self.learner.finish_update()

        if self.learns_beside_envs and not self.clock.update_due():
            return all_of_it
        compute()
        return self.learner.finish_update

    def draw(self) -> Batch | None:
        """This rank's next minibatch."""
        self.timer.start("sample")
        importance = importance_at(self.config, self.comm.size, self.clock.env_steps)
        return self.replay.sample(self.config.replay.batch_per_rank, importance)

    def tell_replay(self, learned: Learned) -> None:
        """Tell replay how wrong a minibatch was."""
        self.timer.start("sample")
        self.replay.update(*learned)

    def act(self, meanwhile: Rest | None = None) -> Learned | None:
        """One env step in every environment, into replay; what `meanwhile` gave, which is done while they are busy."""
        self.timer.start("act")
        actions = self.actor.choose(self.parts.epsilons.at(self.clock.env_steps))
        self.timer.start("env")
        self.actor.send(actions)
        learned = meanwhile() if meanwhile else None
        self.timer.start("env")
        step = self.actor.receive()
        self.timer.start("add")
        self.replay.add(actions, step)
        self.clock.tick()
        self.acted_env_steps += len(actions)
        return learned

    def report(self) -> Sequence[float]:
        """What this rank tells the others since it last did: `learner.REPORTED`."""
        episodes = self.parts.envs.pop_episodes()
        greediest = [e.episode_return for e in episodes if self.parts.epsilons.greediest[e.env]]
        return (
            float(self.stop.received),
            float(len(episodes)),
            sum(e.episode_return for e in episodes),
            float(sum(e.length for e in episodes)),
            float(len(greediest)),
            sum(greediest),
        )

    def log(self) -> None:
        """One line of metrics."""
        totals = self.learner.drain()
        episodes = totals["episodes"]
        values = {
            "loss": totals["loss"],
            "td_error": totals["td_error"],
            "q_mean": totals["q_mean"],
            "epsilon": self.parts.epsilons.mean(self.clock.env_steps),
            "lr": self.learner.lr,
            "grad_norm": self.learner.grad_norm,
            "episodes": episodes,
            "skipped_updates": self.learner.skipped_updates,
            **self.learner.sync.measures(),
        }
        if episodes:
            values["episode_return_mean"] = totals["return_sum"] / episodes
            values["episode_length_mean"] = totals["length_sum"] / episodes
        if totals["greediest_episodes"]:
            values["greediest_return_mean"] = totals["greediest_return_sum"] / totals["greediest_episodes"]
        self.metrics.log(self.clock.env_steps, self.clock.updates, values)
        if hint := self.hint.due():
            self.metrics.say(hint)

    def evaluate(self) -> None:
        """Play greedily, every rank its share, until it is done or a rank was told to stop."""
        if self.progress.evaluated_at_env_steps == self.clock.env_steps or self.learner.stop_voted:
            return
        evaluation = self.evaluator.run(self.learner.online, lambda: self.stop.received)
        if evaluation is None:
            self.learner.stop_voted = True
            return
        self.progress.evaluated_at_env_steps = self.clock.env_steps
        self.progress.evaluation = {
            "eval_return_mean": evaluation.mean,
            "eval_return_std": evaluation.std,
            "eval_episodes": len(evaluation.returns),
        }
        if evaluation.mean > self.best_eval_return and self.save_best(evaluation.mean):
            self.best_eval_return = evaluation.mean
        self.metrics.log(self.clock.env_steps, self.clock.updates, self.progress.evaluation)
        self.metrics.say(f"evaluation at env step {self.clock.env_steps:,}, {evaluation}")

    def save(self) -> None:
        """Write a checkpoint."""
        if self.saved_at_env_steps != self.clock.env_steps:
            self.write_checkpoint(contents(self.parts, self.comm, self.progress))
            self.saved_at_env_steps = self.clock.env_steps

    def save_best(self, eval_return: float) -> bool:
        """Keep the weights of the best evaluation so far, as `checkpoints/best`; whether they were written."""
        weights = {"learner": self.learner.state(), "eval_return_mean": eval_return}
        parts = {LEARNER: weights} if self.comm.rank == 0 else {}
        return self.write_checkpoint(parts, best=True)

    def write_checkpoint(self, parts: Mapping[str, Any], best: bool = False) -> bool:
        """Write one; a disk that fails is said and counted, and does not end the run."""
        with self.timer.during("save"):
            failure = self.checkpoints.save(self.clock.env_steps, parts, self.config.flat(), best)
        if failure:
            self.progress.failed_checkpoints += 1
            self.metrics.say(
                f"warning: the checkpoint at env step {self.clock.env_steps:,} could not be written, "
                f"the one before stands: {failure}"
            )
        return not failure

    def decide_on_replay(self) -> None:
        """Whether checkpoints hold replay: found once in a run, the same on every rank."""
        choice = self.config.run.checkpoint_replay
        if choice != "auto":
            self.progress.keeps_replay = choice == "yes"
        if self.progress.keeps_replay is not None:
            return
        copies = self.config.run.checkpoint_keep + 1
        needed = 2 * copies * self.comm.size * self.replay.ring.nbytes
        fits = self.comm.broadcast_object(shutil.disk_usage(self.run_dir).free > needed)
        self.progress.keeps_replay = fits
        if not fits:
            self.metrics.say(
                f"checkpoints leave replay out: it would take {needed / 2e9:.1f} GB, and as much again is not free. "
                f"A resumed run fills it anew; --checkpoint-replay yes keeps it all the same"
            )

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        seconds = self.timer.seconds()
        wall_seconds = sum(seconds.values())
        return {
            "env": self.config.environment.env,
            "preset": self.config.preset,
            "seed": self.config.run.seed,
            "world_size": self.comm.size,
            "comm": self.comm.name,
            "sync": self.config.parallel.sync,
            "env_steps": self.clock.env_steps,
            "updates": self.clock.updates,
            "skipped_updates": self.learner.skipped_updates,
            "failed_checkpoints": self.progress.failed_checkpoints,
            **self.learner.sync.counters(),
            "traffic": self.traffic(),
            "wall_seconds": wall_seconds,
            "env_steps_per_second": self.clock.env_steps / wall_seconds,
            "updates_per_second": self.clock.updates / wall_seconds,
            **{
                name: self.progress.evaluation.get(name)
                for name in ("eval_return_mean", "eval_return_std", "eval_episodes")
            },
            "param_sha256": self.learner.sha256(),
            "stopped_by": "signal" if self.learner.stop_voted else "finished",
            "seconds": seconds,
            "rank_env_steps_per_second": self.rank_speeds(),
        }

    def traffic(self) -> dict[str, float]:
        """What one rank gave to the network to agree in an update of this attempt, and what it should have been."""
        sent = self.learner.sync.traffic
        messages, sent_bytes = self.learner.sync.expected_traffic(self.learner)
        return {
            "messages_per_update": sent.messages / max(sent.updates, 1),
            "bytes_per_update": sent.bytes / max(sent.updates, 1),
            "expected_messages_per_update": messages,
            "expected_bytes_per_update": sent_bytes,
        }

    def rank_speeds(self) -> list[float]:
        """Env steps per second of each rank's own work, waiting for the others left out; a collective call.

        Of this attempt; 0 of a rank that does not act.
        """
        seconds = self.timer.seconds()
        worked = sum(seconds[phase] - self.seconds_before[phase] for phase in seconds if phase != "comm")
        return self.comm.all_gather_object(self.acted_env_steps / worked)

    def close(self) -> None:
        """Record the end, say where everything lies, and release what the parts hold."""
        summary = self.summary()
        self.say_how_it_ended(summary["rank_env_steps_per_second"])
        if self.comm.rank == 0:
            try:
                write_summary(self.run_dir, summary)
            except OSError as error:
                self.metrics.say(f"warning: summary.json could not be written: {error}")
        self.metrics.close()
        self.parts.envs.close()

    def say_how_it_ended(self, speeds: Sequence[float]) -> None:
        """A few lines for people."""
        acting = [speed for speed in speeds if speed > 0]
        if acting and max(acting) > 2 * min(acting):
            slowest, fastest = min(acting), max(acting)
            others = "go on without it" if len(acting) < len(speeds) else "wait for it"
            self.metrics.say(
                f"rank {speeds.index(slowest)} is the slowest, {slowest:,.4g} env steps/s of its own work, and the "
                f"others {others}; the fastest, rank {speeds.index(fastest)}, makes {fastest:,.4g}"
            )
        if self.learner.stop_voted:
            self.metrics.say(
                f"stopped by a signal at env step {self.clock.env_steps:,}: start it again with "
                f"--run-dir {self.run_dir} to resume"
            )
        self.metrics.say(
            f"run directory: {self.run_dir}   checkpoint: {self.run_dir / 'checkpoints' / 'latest'}"
        )


def open_run_dir(config: Config, comm: Comm) -> Path:
    """The run directory, made by rank 0; where the user names none, one that no other run has.

    Raises:
        UserError: rank 0 cannot write to it, or another rank does not see what it writes.
    """
    named = config.run.run_dir
    words = (
        config.environment.env,
        config.preset,
        f"seed{config.run.seed}",
        time.strftime("%Y%m%d-%H%M%S"),
    )
    path = Path(named or "runs/" + "-".join(re.sub(r"[^\w.]+", "_", word) for word in words if word))

    def make() -> str:
        if comm.rank > 0:
            return ""
        try:
            made = path if named else _new_directory(path)
            made.mkdir(parents=True, exist_ok=True)
            (made / proof).touch()
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory '{path}': {error.strerror}; choose another with --run-dir"
            ) from None
        return str(made)

    proof = comm.broadcast_object(f".proof-{time.time_ns()}")
    run_dir = Path(comm.broadcast_object(raise_on_all_ranks(comm, make)))
    try:
        raise_on_all_ranks(comm, lambda: look_for(run_dir / proof, comm.rank))
    except UserError:
        with suppress(OSError):
            (run_dir / proof).unlink()
            run_dir.rmdir()
        raise
    if comm.rank == 0:
        (run_dir / proof).unlink(missing_ok=True)
    return run_dir


def look_for(proof: Path, rank: int, patience_seconds: float = 10.0) -> None:
    """Wait until this rank sees the file that rank 0 has put into the run directory; some file systems take a moment.

    Raises:
        UserError: it does not see it.
    """
    deadline = time.monotonic() + patience_seconds
    while not os.path.exists(proof):  # noqa: PTH110 - Path's raises where a folder may not be entered
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {rank} on host {socket.gethostname()} does not see what rank 0 writes to the run directory "
                f"'{proof.parent}'; with --run-dir name a folder that all hosts share"
            )
        time.sleep(0.1)


def _new_directory(path: Path) -> Path:
    """Make it, or one beside it where it is that of another run, which began in the same second."""
    made, number = path, 1
    while True:
        try:
            made.mkdir(parents=True)
            return made
        except FileExistsError:
            number += 1
            made = path.with_name(f"{path.name}-{number}")


def check_same_config(config: Config, comm: Comm) -> None:
    """Refuse ranks that were started with different settings.

    Raises:
        UserError: on all ranks, naming the first setting that differs.
    """
    everyone = comm.all_gather_object(config.flat())
    for rank, settings in enumerate(everyone):
        differing = [name for name, value in settings.items() if value != everyone[0][name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"ranks were started with different settings: --{name.replace('_', '-')} is {everyone[0][name]!r} on "
                f"rank 0 and {settings[name]!r} on rank {rank}; start all ranks with one command line"
            )


def train(config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Train, evaluate, record; return the exit code.

    Raises:
        UserError: the input is wrong, the same on every rank.
    """
    check_same_config(config, comm)
    check_engine(config, comm.name, comm.size)
    check_world(config, comm.size)
    run_dir = open_run_dir(config, comm)
    try:
        seconds = config.parallel.stall_timeout
        heartbeats = run_dir / "heartbeats"
        with sole_job(run_dir, comm), closing(Watchdog(heartbeats, comm, timer, seconds, stop=stop)):
            training = start(Training, config, comm, run_dir, stop, timer)
            try:
                training.complete()
            except UserError as error:  # found by this rank alone: the others do not know
                raise RuntimeError(str(error)) from error
            finally:
                training.metrics.close()  # what is said of an error comes after the bar
    except UserError:
        # Where it holds a run, this fails; where it holds another rank's heartbeat, that rank succeeds.
        with suppress(OSError):
            run_dir.rmdir()
        raise
    return EXIT_REQUEUE if training.learner.stop_voted else EXIT_FINISHED


def start(
    kind: Callable[[Config, Comm, Path, StopSignal, Parts, Checkpoints], T],
    config: Config,
    comm: Comm,
    run_dir: Path,
    stop: StopSignal,
    timer: PhaseTimer,
) -> T:
    """Build all parts into this kind of training, and begin the run or go on from its newest checkpoint.

    Raises:
        UserError: the input is wrong, the same on every rank.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", comm, config.run.checkpoint_keep, timer)
    checkpoint, said = find_checkpoint(config, checkpoints, run_dir)
    parts = build_parts(config, comm, timer, checkpoint.env_steps if checkpoint else 0)
    check_that_it_learns(config, parts.clock)
    # By settings that come after the end nothing is trained.
    if checkpoint is None or checkpoint.env_steps < config.run.total_env_steps:
        said += record_config(config, comm, run_dir, anew=checkpoint is None)
    training = kind(config, comm, run_dir, stop, parts, checkpoints)
    training.begin(checkpoint, said)
    return training


def check_that_it_learns(config: Config, clock: Clock) -> None:
    """Whether the run has an update at all.

    Raises:
        UserError: it ends before that.
    """
    if clock.updates_owed(config.run.total_env_steps) == 0:
        raise UserError(
            f"{config.run.total_env_steps:,} env steps end before the first update: with this n-step and these "
            f"environments learning starts at {clock.learning_starts:,}, and an update takes "
            f"{clock.global_batch / config.replay.replay_ratio:,.6g} more; raise --total-env-steps"
        )


def record_config(config: Config, comm: Comm, run_dir: Path, anew: bool = False) -> list[str]:
    """Write `config.yaml`; a disk that fails is said by the line returned, and does not end the run.

    Args:
        config: what to write.
        comm: the ranks, of which rank 0 writes.
        run_dir: where to.
        anew: the run begins, and another file of that name, the user's own perhaps, is set aside.
    """
    path, text = run_dir / "config.yaml", as_yaml(config).encode()
    try:
        if comm.rank == 0:
            if anew and path.is_file() and path.read_bytes() != text:
                set_aside(path)
            replace_file(path, text)
    except OSError as error:
        return [f"warning: config.yaml could not be written: {error}"]
    return []


def tune_process() -> None:
    """Set this process up for training. To be called before it has other threads, which inherit part of it."""
    flush_denormals()
    keep_freed_memory()


def flush_denormals() -> None:
    """Have the processor take numbers below 1e-38 for zero, where it can.

    Adam's moments of weights without a gradient fade to that, and some processors then need a hundred times as long for
    each: a third of the optimizer's time in a small network, measured on an Intel Xeon.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Have the C library keep up to 1 GiB of what is freed, in place of giving it back to the kernel each time.

    An update makes the same large tensors again and again, and pages that come anew from the kernel cost up to a tenth
    of its time. Where the C library has no `mallopt`, nothing is changed.
    """
    trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 25)
        library.mallopt(trim_threshold, 1 << 30)


def main(argv: Sequence[str] | None = None, work: Work = train) -> int:
    """Entry point of every rank; returns the exit code.

    Args:
        argv: the flags; those of this process if None.
        work: what the ranks do together.
    """
    tune_process()
    stop = StopSignal()
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        find_spec(config.environment.env)  # before connecting, which takes seconds
        comm = connect(config.parallel.comm, device_kind(config))
    except (UserError, LaunchError) as error:
        return refuse_unconnected(str(error), stop)
    timer = PhaseTimer()
    try:
        return work_and_leave(work, config, comm, stop, timer)
    except Exception as error:
        told = traceback.format_exc()
        waited = timer.phase == "comm"
        if waited:  # the rank that failed tells more
            told = (
                f"the other ranks do not answer: {traceback.format_exception_only(error)[-1].splitlines()[0]}"
            )
        print(f"hvdqn: rank {comm.rank} of {comm.size} failed: {told}", file=sys.stderr, flush=True)
        if waited:
            time.sleep(1)  # launchers go by the rank that ends first: let it be the one that failed
        comm.abort(EXIT_FAILED)


def work_and_leave(work: Work, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Train, or say what is wrong where all ranks found it; all leave the job together."""
    try:
        code = work(config, comm, stop, timer)
    except UserError as error:
        code = refuse(str(error), comm.rank)
    except (DriftError, NonFiniteError, StoppedError) as error:
        code = refuse(str(error), comm.rank, EXIT_FAILED)
    timer.start("comm")
    comm.barrier()
    comm.close()
    return code


def refuse(message: str, rank: int, code: int = EXIT_USER_ERROR) -> int:
    """Say once what every rank found wrong; the other ranks give rank 0 the time to say it."""
    if rank == 0:
        print(f"hvdqn: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return code


def refuse_unconnected(message: str, stop: StopSignal) -> int:
    """Say what this rank found wrong before ranks met: so do all, mostly, and then rank 0 alone says it.

    If it found nothing wrong it waits for the others: then the job does not end, and who does not belong to it speaks.
    """
    rank = launcher_rank()
    if rank == 0:
        print(f"hvdqn: error: {message}", file=sys.stderr, flush=True)
        if launcher_size() != 1:
            # Until the others find it, too: srun returns the highest code, and 143 of a rank that it ended.
            time.sleep(3)
        return EXIT_USER_ERROR
    deadline = time.monotonic() + 8.0  # rank 0 may start later by seconds, on a busy machine, and then waits
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.1)
    if not stop.received:
        print(f"hvdqn: error: rank {rank} alone: {message}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
