"""Build and run training for the benchmarks.

All that the benchmarks need from the entry point of training, the loop and the learner is in this file.
"""

from __future__ import annotations

import logging
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvdqn.acting import Epsilons
from hvdqn.bench.report import Parser
from hvdqn.comm import Comm, connect, launcher_rank, launcher_size
from hvdqn.config import Config, check_engine, check_world
from hvdqn.errors import EXIT_FINISHED, StoppedError, UserError
from hvdqn.evaluate import Evaluation
from hvdqn.faults import StopSignal
from hvdqn.job import refuse_alone
from hvdqn.logs import setup_logging
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.rank import Acting, Parts
from hvdqn.replay import Batch
from hvdqn.role import assign_role
from hvdqn.startup import check_same_config, make_trainer, start_run
from hvdqn.sync.statistics import REPORTED, STATISTICS, Outcome, Trailer
from hvdqn.train import command
from hvdqn.trainer import Trainer

log = logging.getLogger(__name__)

NO_EPISODES = (0.0,) * len(REPORTED)
LOSS = STATISTICS.index("loss")

# `python -m hvdqn.train`, but the first env step ends the process.
TRAIN_UNTIL_FIRST_ENV_STEP = """
import os, sys
from hvdqn import train
from hvdqn.acting import Actor
Actor.choose = lambda *_: os._exit(0)
sys.exit(train.command(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Job:
    """The connected ranks and what else a benchmark gets on each of them."""

    config: Config
    comm: Comm
    stop: StopSignal
    timer: PhaseTimer


Benchmark = Callable[[Namespace, Sequence[str], Job], None]


def run_on_all_ranks(
    parser: Parser,
    argv: Sequence[str],
    benchmark: Benchmark,
    before_connecting: Callable[[Namespace], None] | None = None,
) -> int:
    """Connect the ranks as training does and run a benchmark on each of them; return the exit code.

    Args:
        parser: parses the benchmark's own flags; all other flags are training's.
        argv: all flags.
        benchmark: the function to call on each rank, with the benchmark's flags, training's flags and the connected
            ranks.
        before_connecting: called before the ranks connect, with the benchmark's flags.
    """
    try:
        setup_logging(launcher_rank(), launcher_size())
        options, flags = parser.parse_known_args(argv)
        if before_connecting is not None:
            before_connecting(options)
    except UserError as error:
        return refuse_alone(str(error), StopSignal())

    def work(config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
        benchmark(options, flags, Job(config, comm, stop, timer))
        return EXIT_FINISHED

    return command(flags, work)


def check_config(config: Config, comm: Comm, steps_together: bool = False) -> None:
    """Check that the ranks have the same settings and that these fit the number of ranks; a collective call.

    Args:
        config: the settings of this rank.
        comm: the ranks.
        steps_together: if True, refuse `--sync server`, whose ranks do not step together.

    Raises:
        UserError: on all ranks, if the settings differ or do not fit.
    """
    check_same_config(config, comm)
    if steps_together and config.parallel.sync == "server":
        raise UserError("a benchmark times ranks that step together; use --sync gradients or parameters")
    check_engine(config, comm.name, comm.size)
    check_world(config, assign_role(config.parallel.sync, comm.rank, comm.size).of)


class TrainingRun:
    """A training that a benchmark runs piece by piece. Every method is a collective call.

    Attributes:
        config: the settings.
        comm: the ranks.
        parts: what this rank trains with.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.config = trainer.config
        self.comm = trainer.comm
        self.parts = trainer.parts

    @property
    def env_steps_per_iteration(self) -> int:
        """Global env steps of one iteration, which steps every environment once."""
        return self.parts.clock.envs

    def use_random_actions(self) -> None:
        """Replace every action that the network chooses by a random one from now on."""
        config = self.config.replace(exploration="linear", epsilon_start=1.0, epsilon_end=1.0)
        envs, role = config.environment.envs_per_rank, self.parts.role
        self.parts.epsilons = Epsilons(config.exploration, envs, role.index, role.of)

    def train(self, iterations: int, overlap: bool) -> None:
        """Step every environment `iterations` times and take the updates that become due.

        Args:
            iterations: the number of steps of every environment.
            overlap: if True, gradients travel while the environments step.

        Raises:
            StoppedError: a rank received a signal to stop.
        """
        self._trainer.overlap = self.parts.overlap if overlap else "none"
        self._trainer.train(self.parts.clock.env_steps + iterations * self.env_steps_per_iteration)
        if self._trainer.stopped_by:
            raise StoppedError("stopped by a signal before the measurement was complete")

    def evaluate(self, training_seconds: float) -> Evaluation:
        """Make the weights of all ranks equal, evaluate them, and log and return the result."""
        self._trainer.accumulate(self._trainer.strategy.synchronize())
        self._trainer.update_target_if_due()
        evaluation = self._trainer.recorder.evaluator.run(self.parts.learner.online)
        assert evaluation is not None, "only a signal to stop ends an evaluation, and it is not checked here"
        env_steps = self.parts.clock.env_steps
        log.info(f"{env_steps:,} env steps, {training_seconds:.1f} s of training, {evaluation}")
        return evaluation

    def close(self) -> None:
        """Close the console and the environments."""
        self._trainer.recorder.metrics.close()
        self._trainer.close()


@contextmanager
def start_training(config: Config, job: Job) -> Iterator[TrainingRun]:
    """Start a run in a temporary run directory, and close it after the `with` block; a collective call."""
    with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
        run_dir = Path(job.comm.broadcast_object(folder))
        run = TrainingRun(start_run(config, job.comm, run_dir, job.stop, job.timer, make_trainer))
        yield run
        run.close()


def acting_parts(parts: Parts) -> Acting:
    """Return the environments, the actor and the replay of a rank that acts."""
    assert parts.acting is not None, "only rank 0 of --sync server does not act"
    return parts.acting


def gradient_floats(parts: Parts, comm: Comm) -> int:
    """Return the size of the message of one update: the flat gradient and its trailer."""
    return parts.learner.gradient.numel() + Trailer.length(comm.size, slots=2)


def build_filled_parts(config: Config, random_iterations: int) -> Parts:
    """Build the parts of a single process and fill its replay with random actions.

    Args:
        config: the settings.
        random_iterations: steps of every environment.
    """
    parts = build_parts(config, connect("local"), PhaseTimer())
    actor, replay = acting_parts(parts).actor, acting_parts(parts).replay
    replay.start(actor.start(), actor.envs.action_mask)
    for _ in range(random_iterations):
        actions = actor.choose(1.0)
        replay.add(actions, actor.step(actions))
    return parts


def update(parts: Parts, batch: Batch) -> Outcome:
    """Take one update from this minibatch; return its outcome."""
    launch_update(parts, batch)
    return parts.strategy.wait()


def update_and_return_gradient(parts: Parts, batch: Batch) -> tuple[float, Tensor]:
    """Take one update from this minibatch; return its loss and a copy of its gradient on the CPU."""
    launch_update(parts, batch)
    gradient = parts.learner.gradient.cpu().clone()
    outcome = parts.strategy.wait()
    return float(outcome.statistics[LOSS]), gradient


def launch_update(parts: Parts, batch: Batch) -> None:
    """Compute the gradient of this minibatch and launch its exchange."""
    learned = parts.learner.compute_gradient(batch)
    parts.strategy.launch(NO_EPISODES, learned, float(batch.weight.max()), progress=1.0)


def copy_learner(source: Parts, target: Parts) -> None:
    """Give the learner of `target` the weights and optimizer state of the learner of `source`."""
    target.learner.load_state(source.learner.state())


def synchronize(parts: Parts) -> None:
    """Wait until the device of these parts has finished all its work."""
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
