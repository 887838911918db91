"""Greedy play, shared by all ranks, and `hvdqn eval`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from hvdqn.acting import Actor
from hvdqn.checkpoint import LEARNER, BrokenCheckpointError, Checkpoint, open_checkpoint
from hvdqn.comm import Comm
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, EnvironmentConfig, parse_flags
from hvdqn.envs import Environments, make_environments
from hvdqn.errors import UserError
from hvdqn.graphs import Record
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import QNetwork
from hvdqn.parts import network_for
from hvdqn.process import use_threads
from hvdqn.seeds import rank_seeds
from hvdqn.video import check_video, record

# Environments without a time limit must not hold an evaluation for ever: Atari's 108,000 frames.
LONGEST_EPISODE_ENV_STEPS = 27_000
MOST_ENVS_PER_RANK = 16
# A rank that is told to stop must not wait for the end of an evaluation.
STEPS_BETWEEN_VOTES = 8


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted, unclipped returns of whole episodes, over all ranks."""

    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation over episodes."""
        return float(np.std(self.returns))

    def __str__(self) -> str:
        low, high = min(self.returns), max(self.returns)
        return f"{len(self.returns)} episodes: mean {self.mean:.2f}, std {self.std:.2f}, min {low:g}, max {high:g}"


class Evaluator:
    """Plays this rank's share of the episodes, each time in new environments.

    Args:
        config: the environment, as in training but for clipping and episodic life.
        episodes: over all ranks.
        epsilon: share of random actions.
        seed: this rank's evaluation seed; every evaluation of a run starts from it anew.
        record: how passes are recorded, as `Actor` takes it.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        comm: Comm,
        episodes: int,
        epsilon: float,
        seed: int,
        device: torch.device,
        timer: PhaseTimer,
        threads: int = 0,
        record: Record | None = None,
    ) -> None:
        self.config, self.comm, self.epsilon, self.seed = config, comm, epsilon, seed
        self.device, self.timer, self.threads, self.record = device, timer, threads, record
        self.share = episodes // comm.size + (comm.rank < episodes % comm.size)
        self.envs = min(self.share, MOST_ENVS_PER_RANK)

    def run(self, network: QNetwork, stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Play; a collective call. None if some rank's `stop` asked to leave off before the end."""
        returns: list[float] = []
        with closing(self._play(network)) as play:
            playing = True
            while playing:
                playing = False
                for returns in itertools.islice(play, STEPS_BETWEEN_VOTES):  # noqa: B007 - the last one stays
                    playing = True
                votes = torch.tensor([float(playing), float(stop())])
                with self.timer.during("comm"):  # ranks whose episodes were short wait here
                    self.comm.allreduce_sum_async(votes, name="evaluation").wait()
                if votes[1] > 0:
                    return None
                playing = bool(votes[0] > 0)
        with self.timer.during("comm"):
            shares = self.comm.all_gather_object(returns)
        return Evaluation(tuple(value for share in shares for value in share))

    def _play(self, network: QNetwork) -> Generator[list[float], None, None]:
        """After each step, the returns so far."""
        if self.share:
            envs = make_environments(self.config, self.envs, self.seed, training=False, threads=self.threads)
            network.eval()  # without the noise that a noisy network explores by
            try:
                with closing(envs):
                    yield from self._play_quota(network, envs)
            finally:
                network.train()

    def _play_quota(self, network: QNetwork, envs: Environments) -> Generator[list[float], None, None]:
        """Each environment plays a fixed number of episodes, so that short episodes are not favoured."""
        left = np.full(self.envs, self.share // self.envs)
        left[: self.share % self.envs] += 1
        rng = np.random.default_rng(self.seed)
        actor = Actor(envs, network, self.config.frame_stack, rng, self.device, record=self.record)
        actor.start()
        running, length = np.zeros(self.envs), np.zeros(self.envs, dtype=np.int64)
        returns: list[float] = []
        while (left > 0).any():
            self.timer.start("other")  # a sign of life for the watchdog
            step = actor.step(actor.choose(self.epsilon))
            running += step.reward
            length += step.valid
            ended = step.terminated | step.truncated
            endless = ~ended & (length >= LONGEST_EPISODE_ENV_STEPS)
            if ended.any() or endless.any():
                returns += running[(ended | endless) & (left > 0)].tolist()
                left[ended] -= 1
                left[endless] = 0  # it may never end: what it played counts, and it plays no more
                running[ended], length[ended] = 0.0, 0
            yield returns


@dataclass(frozen=True)
class EvalOptions:
    """Play a trained network greedily and print its returns."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory, of which the newest checkpoint is played; its `checkpoints/best`; or any checkpoint."""
    episodes: int = 100
    """Episodes to play."""
    epsilon: float = 0.0
    """Share of random actions."""
    seed: int = 1
    """Seed of environments and random actions."""
    video: Path | None = None
    """Also record one episode to this .mp4 or .gif."""


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the newest of a run directory.

    Raises:
        UserError: there is none, or it is broken.
    """
    for place in (path, path / "checkpoints" / "latest"):
        try:
            if (place / "manifest.json").exists():
                return open_checkpoint(place)
        except (BrokenCheckpointError, OSError) as broken:
            raise UserError(f"{broken}; choose another checkpoint") from None
    raise UserError(f"'{path}' holds no checkpoint; give a run directory or one of its checkpoints")


def load_network(checkpoint: Checkpoint, config: Config, envs: Environments) -> QNetwork:
    """The online network of a checkpoint.

    Raises:
        UserError: the file is broken, or of another network.
    """
    network = network_for(config, envs)
    try:
        flat = torch.from_numpy(checkpoint.read(LEARNER)["learner"]["online"])
    except (BrokenCheckpointError, OSError) as broken:
        raise UserError(f"{broken}; choose another checkpoint") from None
    has = sum(parameter.numel() for parameter in network.parameters())
    if flat.numel() != has:
        raise UserError(
            f"'{checkpoint.path}' holds {flat.numel():,} parameters, its settings now make {has:,}: the torso or the "
            "environment is not what it was"
        )
    torch.nn.utils.vector_to_parameters(flat, network.parameters())
    return network


def check_options(options: EvalOptions) -> None:
    """Whatever can be refused before anything is played.

    Raises:
        UserError: a value that cannot be right.
    """
    if options.episodes < 1:
        raise UserError(f"--episodes is {options.episodes}; it must be at least 1")
    if not 0.0 <= options.epsilon <= 1.0:
        raise UserError(f"--epsilon is {options.epsilon}; it must be within [0, 1]")
    if not 0 <= options.seed < 1 << 63:
        raise UserError(f"--seed is {options.seed}; it must be 0 or more, and below 2^63")
    if options.video is not None:
        check_video(options.video)


def evaluate(options: EvalOptions) -> Iterator[str]:
    """Play in this process, whatever started it; yield a line for people on each thing that is done.

    Raises:
        UserError: no such checkpoint, or its environment cannot be made or drawn here.
    """
    check_options(options)
    checkpoint = find_checkpoint(options.path)
    config = Config().replace(**checkpoint.manifest["config"])
    probe = make_environments(config.environment, 1, options.seed, training=False)
    network = load_network(checkpoint, config, probe)
    probe.close()
    use_threads(network, torch.get_num_threads())
    evaluator = Evaluator(
        config.environment,
        LocalComm(),
        options.episodes,
        options.epsilon,
        rank_seeds(options.seed, 0).evaluation,
        torch.device("cpu"),
        PhaseTimer(),
    )
    evaluation = evaluator.run(network)
    assert evaluation is not None  # nobody asked to leave off
    yield f"{options.path}: {evaluation}"
    if options.video is not None:
        record(network, config.environment, options.video, options.seed, options.epsilon)
        yield f"one episode: {options.video}"


def main(argv: Sequence[str] | None = None) -> int:
    """The `hvdqn eval` command; returns the exit code."""
    try:
        options = parse_flags(EvalOptions, sys.argv[1:] if argv is None else argv, prog="hvdqn eval")
        for line in evaluate(options):
            print(line, flush=True)
    except UserError as error:
        print(f"hvdqn eval: error: {error}", file=sys.stderr)
        return 2
    return 0
