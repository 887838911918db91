"""Evaluate a network by playing greedily: shared by all ranks during training, and alone in `hvdqn eval`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from hvdqn.acting import Actor
from hvdqn.checkpoint import LEARNER, BrokenCheckpointError, Checkpoint, check_learner, open_checkpoint
from hvdqn.comm import Comm
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, parse_flags
from hvdqn.envs import Environments, as_exception, global_generators_kept, make_environments
from hvdqn.errors import UserError
from hvdqn.graphs import Record
from hvdqn.links import follow_link
from hvdqn.metrics import PhaseTimer, ProgressLine, finite
from hvdqn.networks import QNetwork
from hvdqn.parts import network_for
from hvdqn.paths import absolute, folder_remembered
from hvdqn.process import usable_cores, use_threads
from hvdqn.seeds import eval_command_seed, rank_seeds
from hvdqn.trust import code_to_import
from hvdqn.video import check_video, record

# The time limit of an environment without one of its own: the 108,000 frames of the Atari papers.
LONGEST_EPISODE_ENV_STEPS = 27_000
MOST_ENVS_PER_RANK = 16
# How often the ranks agree whether to stop early, so that a stop signal does not wait for the end of an evaluation.
STEPS_BETWEEN_VOTES = 8


@dataclass(frozen=True)
class Evaluation:
    """Hold the undiscounted, unclipped returns of the evaluation episodes of all ranks."""

    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """The standard deviation of the returns."""
        return float(np.std(self.returns))

    def __str__(self) -> str:
        low, high = min(self.returns), max(self.returns)
        return f"{len(self.returns)} episodes: mean {self.mean:.2f}, std {self.std:.2f}, min {low:g}, max {high:g}"


class Evaluator:
    """Play this rank's share of the `eval_episodes`.

    Each call of `run` makes new environments with the same seed, so all evaluations of a training run begin alike.
    The environments are those of training, but with raw rewards and without `episodic_life`, or the run's `eval_env`.

    Args:
        config: the configuration of the run.
        comm: connects the ranks that share the episodes.
        device: the device of the network.
        timer: counts the seconds that this rank waits for others as communication.
        threads: number of threads of an Atari vector; 0: one per core.
        record: records CUDA graphs of the network's forward passes, as in `Actor`.
        seed: the seed of environments and random actions. By default a stream of its own, so that evaluations play
            other episodes than training does, and the same ones after a resume.
    """

    def __init__(
        self,
        config: Config,
        comm: Comm,
        device: torch.device,
        timer: PhaseTimer,
        threads: int = 0,
        record: Record | None = None,
        seed: int | None = None,
    ) -> None:
        self.config, self.comm, self.device, self.timer = config, comm, device, timer
        self.environment = config.evaluation_environment()
        self.threads, self.record = threads, record
        self.seed = rank_seeds(config.run.seed, comm.rank).evaluation if seed is None else seed
        episodes = config.run.eval_episodes
        self.share = episodes // comm.size + (comm.rank < episodes % comm.size)

    def run(
        self,
        network: QNetwork,
        stop: Callable[[], bool] = lambda: False,
        show: Callable[[int], None] = lambda _: None,
    ) -> Evaluation | None:
        """Play the episodes and return all ranks' returns, or None if `stop` was True on some rank before the end.

        A collective call: all ranks must make it together. Environments that draw from `np.random` or `random` play
        the same episodes each time, and those of training go on as if there had been no evaluation.

        Args:
            network: chooses the actions.
            stop: returns True if this rank wants to stop.
            show: called every few steps with the number of episodes that all ranks have finished.
        """
        show(0)
        with global_generators_kept():
            return self._run(network, stop, show)

    def _run(
        self, network: QNetwork, stop: Callable[[], bool], show: Callable[[int], None]
    ) -> Evaluation | None:
        player = self._make_player(network) if self.share else None
        network.eval()  # a noisy network acts without noise
        try:
            playing, stopped = True, False
            while playing and not stopped:
                unfinished = player is not None and player.play(STEPS_BETWEEN_VOTES)
                finished = len(player.returns) if player is not None else 0
                playing, stopped, finished = self._exchange(unfinished, stop(), finished)
                show(finished)
        finally:
            network.train()
            if player is not None:
                player.envs.close()
        if stopped:
            return None
        with self.timer.during("comm"):
            returns = self.comm.all_gather_object(player.returns if player is not None else [])
        return Evaluation(tuple(itertools.chain.from_iterable(returns)))

    def _make_player(self, network: QNetwork) -> _Player:
        environment, run = self.environment, self.config.run
        num_envs = min(self.share, MOST_ENVS_PER_RANK)
        try:
            envs = make_environments(environment, num_envs, self.seed, False, self.threads)
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"'{environment.env}' cannot be made for the evaluation ({reason}); if a process can hold only one, "
                "use --vectorization async"
            ) from error
        rng = np.random.default_rng(self.seed)
        actor = Actor(envs, network, environment.frame_stack, rng, self.device, record=self.record)
        return _Player(envs, actor, run.eval_epsilon, self.share, self.timer)

    def _exchange(self, playing: bool, stop: bool, finished: int) -> tuple[bool, bool, int]:
        """Return whether any rank still plays, whether any wants to stop, and how many episodes all have finished."""
        sums = torch.tensor([float(playing), float(stop), float(finished)])
        with self.timer.during("comm"):  # ranks with short episodes wait here for the others
            self.comm.allreduce_sum_async(sums, name="evaluation").wait()
        return bool(sums[0] > 0), bool(sums[1] > 0), int(sums[2])


class _Player:
    """Play a fixed number of episodes in each environment, so that short episodes are not favored.

    Args:
        envs: this rank's environments, not reset yet.
        actor: chooses the actions and steps `envs`.
        epsilon: the probability of a random action.
        episodes: the number of episodes, at least one per environment.
        timer: shows the watchdog that this rank makes progress.
    """

    def __init__(
        self, envs: Environments, actor: Actor, epsilon: float, episodes: int, timer: PhaseTimer
    ) -> None:
        self.envs, self.actor, self.epsilon, self.timer = envs, actor, epsilon, timer
        self.returns: list[float] = []
        self.episodes_left = np.full(envs.num_envs, episodes // envs.num_envs)
        self.episodes_left[: episodes % envs.num_envs] += 1
        self.episode_return = np.zeros(envs.num_envs)
        self.length = np.zeros(envs.num_envs, dtype=np.int64)
        actor.start()

    def play(self, steps: int) -> bool:
        """Take up to `steps` steps in every environment; return True if episodes are left."""
        for _ in range(steps):
            if not (self.episodes_left > 0).any():
                return False
            self._step()
        return bool((self.episodes_left > 0).any())

    def _step(self) -> None:
        self.timer.start("other")  # each change of phase shows the watchdog that this rank makes progress
        step = self.actor.step(self.actor.choose(self.epsilon))
        self.episode_return += step.reward
        self.length += step.valid
        ended = step.terminated | step.truncated
        endless = ~ended & (self.length >= LONGEST_EPISODE_ENV_STEPS)
        over = ended | endless
        if over.any():
            self.returns += self.episode_return[over & (self.episodes_left > 0)].tolist()
            self.episodes_left[ended] -= 1
            self.episodes_left[endless] = 0  # the return so far counts; the next episode may be endless too
            self.episode_return[over], self.length[over] = 0.0, 0


@dataclass(frozen=True)
class EvalOptions:
    """Play a trained network greedily and print its returns."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or its `checkpoints`, to play the newest one, or any checkpoint, such as `checkpoints/best`."""
    episodes: int = 100
    """Number of episodes to play."""
    epsilon: float = 0.0
    """Probability of a random action."""
    seed: int = 1
    """Seed of the environments and of the random actions. With every seed the episodes differ from those that training
    evaluated on."""
    video: Path | None = None
    """Also record one episode in this .mp4 or .gif file."""
    trust: bool = False
    """Import the code that the run names: its own torso, wrappers and environment. Without it they are refused, because
    a run directory of a stranger could name any code."""
    env: str = ""
    """Allows to import the run's `--env module:id`, if it is this one."""
    eval_env: str = ""
    """Allows to import the run's `--eval-env module:id`, if it is this one."""
    wrapper: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Allows to import the run's `--wrapper module:attribute`, if it is this one. May be repeated."""
    torso: str = ""
    """Allows to import the run's `--torso module:attribute`, if it is this one."""
    json: bool = False
    """Print one line of JSON, with the return of every episode."""


def find_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at a path, or the newest checkpoint of a run directory or of its folder of checkpoints.

    Raises:
        UserError: there is no checkpoint, or it is broken.
    """
    for place in (path, path / "latest", path / "checkpoints" / "latest"):
        try:
            if (follow_link(place) / "manifest.json").exists():
                return open_checkpoint(place)
        except (BrokenCheckpointError, OSError) as broken:
            raise UserError(f"{broken}; choose another checkpoint") from None
    raise UserError(f"'{path}' contains no checkpoint; give a run directory or one of its checkpoints")


def load_network(checkpoint: Checkpoint, config: Config, envs: Environments) -> QNetwork:
    """Build the network of a configuration and load the online parameters of a checkpoint.

    Raises:
        UserError: the file is broken, or its number of parameters differs.
    """
    network = network_for(config, envs)
    try:
        part = checkpoint.read(LEARNER)
        check_learner(part, checkpoint.path)
        flat = torch.from_numpy(part["learner"]["online"])
    except (BrokenCheckpointError, OSError) as broken:
        raise UserError(f"{broken}; choose another checkpoint") from None
    expected = sum(parameter.numel() for parameter in network.parameters())
    if flat.numel() != expected:
        raise UserError(
            f"'{checkpoint.path}' has {flat.numel():,} parameters, but its settings now make {expected:,}: the torso "
            "or the environment has changed since"
        )
    torch.nn.utils.vector_to_parameters(flat, network.parameters())
    return network


def check_options(options: EvalOptions) -> None:
    """Check the options before anything is played.

    Raises:
        UserError: a value is out of range, or the video cannot be written.
    """
    if options.episodes < 1:
        raise UserError(f"--episodes is {options.episodes}; it must be at least 1")
    if not 0.0 <= options.epsilon <= 1.0:
        raise UserError(f"--epsilon is {options.epsilon}; it must be within [0, 1]")
    if not 0 <= options.seed < 1 << 63:
        raise UserError(f"--seed is {options.seed}; it must be 0 or more, and below 2^63")
    if options.video is not None:
        check_video(absolute(options.video))


def check_trust(options: EvalOptions, config: Config) -> None:
    """Raise an error if a run names code to import and the user does not allow it with `--trust`.

    Only a trusted run finds modules in the current folder.

    Raises:
        UserError: it is not allowed.
    """
    allowed = [("--env", options.env), ("--eval-env", options.eval_env), ("--torso", options.torso)]
    allowed += [("--wrapper", path) for path in options.wrapper]
    repeated = [f"{flag} {value!r}" for flag, value in allowed if value]
    found = code_to_import(config)
    if unknown := [flag for flag in repeated if flag not in found]:
        raise UserError(f"'{options.path}' was not trained with {unknown[0]}; leave it out")
    refused = [flag for flag in found if flag not in repeated]
    if refused and not options.trust:
        raise UserError(
            f"'{options.path}' names code that would be imported: {', '.join(refused)}; give --trust if you trust "
            "whoever made it, or repeat its --env, --wrapper and --torso"
        )
    folder = str(Path.cwd())
    if found and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)


def evaluate(options: EvalOptions) -> Iterator[str]:
    """Play in this process alone, even under a launcher; yield one line of text per result.

    Raises:
        UserError: there is no such checkpoint, or it names code that is not trusted, or its environment cannot be made
            or rendered.
    """
    check_options(options)
    checkpoint = find_checkpoint(absolute(options.path))
    config = Config().replace(**checkpoint.manifest["config"])
    check_trust(options, config)
    config = config.replace(eval_episodes=options.episodes, eval_epsilon=options.epsilon, seed=options.seed)
    environment = config.evaluation_environment()
    with closing(make_environments(environment, 1, options.seed, training=False)) as envs:
        network = load_network(checkpoint, config, envs)
    threads = usable_cores()
    use_threads(network, min(threads, torch.get_num_threads()))
    seed = eval_command_seed(options.seed)
    evaluator = Evaluator(config, LocalComm(), torch.device("cpu"), PhaseTimer(), threads, seed=seed)
    playing = f"playing {environment.env}: {{}} of {options.episodes} episodes".format
    with closing(ProgressLine(sys.stderr)) as line:
        evaluation = evaluator.run(network, show=lambda finished: line.show(playing(finished)))
    assert evaluation is not None  # only `stop` makes it None
    yield (
        as_json(options, environment.env, checkpoint, evaluation)
        if options.json
        else f"{options.path}: {evaluation}"
    )
    if options.video is not None:
        with closing(ProgressLine(sys.stderr)) as line:
            line.show(f"recording one episode in {options.video}")
            record(network, environment, absolute(options.video), options.seed, options.epsilon)
        if not options.json:
            yield f"video of one episode: {options.video}"


def as_json(options: EvalOptions, env: str, checkpoint: Checkpoint, evaluation: Evaluation) -> str:
    """Return the result as one line of JSON, with null for numbers that are not finite."""
    result = {
        "checkpoint": str(checkpoint.path),
        "env": env,
        "env_steps": checkpoint.env_steps,
        "seed": options.seed,
        "epsilon": options.epsilon,
        "episodes": len(evaluation.returns),
        "mean": evaluation.mean,
        "std": evaluation.std,
        "min": min(evaluation.returns),
        "max": max(evaluation.returns),
        "returns": evaluation.returns,
    }
    return json.dumps(finite(result))


@folder_remembered()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the `hvdqn eval` command; return its exit code."""
    try:
        options = parse_flags(EvalOptions, sys.argv[1:] if argv is None else argv, prog="hvdqn eval")
        try:
            for line in evaluate(options):
                print(line, flush=True)
        except BaseException as error:  # also SystemExit of an environment
            raise as_exception(error)  # noqa: B904
    except UserError as error:
        print(f"hvdqn eval: error: {error}", file=sys.stderr)
        return 2
    return 0
