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

import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hvdqn import __version__
from hvdqn.acting import Actor, linear_epsilon
from hvdqn.checkpoint import LEARNER, Checkpoints, rank_part
from hvdqn.clock import Clock
from hvdqn.comm import Comm, LaunchError, connect, launcher_rank
from hvdqn.config import Config, UserError, check_world, parse, write_config
from hvdqn.envs import make_environments
from hvdqn.evaluate import Evaluator
from hvdqn.faults import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    StopSignal,
    check_replicas,
    together,
)
from hvdqn.learner import Learner
from hvdqn.metrics import Metrics, PhaseTimer, write_summary
from hvdqn.networks import make_network
from hvdqn.replay import Ring, UniformSampler
from hvdqn.seeds import rank_seeds
from hvdqn.sync import make_sync

# Iterations between exchanges of votes and returns while no update carries them.
POLL_ITERATIONS = 32


class Training:
    """The parts of one rank, and the loop over them. Every method is called by all ranks together."""

    def __init__(self, config: Config, comm: Comm, run_dir: Path, stop: StopSignal) -> None:
        self.config, self.comm, self.run_dir, self.stop = config, comm, run_dir, stop
        environment, replay = config.environment, config.replay
        seeds = rank_seeds(config.run.seed, comm.rank)
        device, threads = choose_device(config, comm), choose_threads(config, comm)
        self.timer = PhaseTimer()
        self.envs = together(
            comm,
            lambda: make_environments(
                environment, environment.envs_per_rank, seeds.environments, training=True, threads=threads
            ),
        )
        self.clock = Clock(
            envs=comm.size * environment.envs_per_rank,
            global_batch=comm.size * replay.batch_per_rank,
            replay_ratio=replay.replay_ratio,
            # Nothing can be sampled before each environment has made n steps and been reset in between.
            learning_starts=max(
                replay.learning_starts, 2 * (replay.n_step + 1) * comm.size * environment.envs_per_rank
            ),
        )
        torch.manual_seed(config.run.seed)
        self.learner = Learner(
            make_network(
                config.network,
                config.learning.loss,
                self.envs.observation_shape,
                environment.frame_stack,
                self.envs.is_image,
                self.envs.actions,
            ),
            config.learning,
            comm,
            make_sync(config.parallel.sync, comm),
            replay.batch_per_rank,
            self.clock.updates_owed(config.run.total_env_steps),
            self.timer,
            device,
            autocast=config.parallel.precision == "bf16",
        )
        self.ring = Ring(
            envs=self.envs.envs,
            capacity=replay.replay_capacity // comm.size,
            observation_shape=self.envs.observation_shape,
            observation_dtype=self.envs.observation_dtype,
            frame_stack=environment.frame_stack,
            n_step=replay.n_step,
            gamma=config.learning.gamma,
        )
        self.replay = UniformSampler(self.ring, seeds.replay)
        self.actor = Actor(self.envs, self.learner.online, environment.frame_stack, seeds.exploration, device)
        self.ring.start(self.actor.first_observation)
        self.evaluator = Evaluator(
            environment,
            comm,
            config.run.eval_episodes,
            config.run.eval_epsilon,
            seeds.evaluation,
            device,
            threads,
        )
        self.checkpoints = Checkpoints(run_dir / "checkpoints", comm, config.run.checkpoint_keep)
        self.metrics = Metrics(run_dir if comm.rank == 0 else None, config.run.total_env_steps, self.timer)
        self.evaluation: dict[str, float] = {}
        self.evaluated_at = self.saved_at = -1

    def run(self) -> None:
        """Step, remember, learn, until the env steps are spent or a rank was told to stop."""
        while self.clock.env_steps < self.config.run.total_env_steps and not self.learner.stop_voted:
            travelling = self.begin_updates()
            self.act()  # while the gradients travel
            if travelling:
                self.learner.finish_update()
            elif self.clock.due(POLL_ITERATIONS * self.clock.envs):
                self.learner.exchange(self.report())
            self.timer.start("other")
            if self.clock.due(self.config.learning.target_every):
                check_replicas(self.learner.sync_target(), self.clock.env_steps)
            if self.clock.due(self.config.run.log_every):
                self.log()
            if self.clock.due(self.config.run.eval_every):
                self.evaluate()
            if self.clock.due(self.config.run.checkpoint_every):
                self.save()

    def begin_updates(self) -> bool:
        """Begin every update that is due; whether the last one's gradient is still travelling."""
        travelling = False
        while self.clock.update_due():
            if travelling:
                self.learner.finish_update()
            self.timer.start("sample")
            batch = self.replay.sample(self.config.replay.batch_per_rank)
            self.timer.start("compute")
            self.learner.begin_update(batch, self.report())
            self.clock.updates += 1
            travelling = True
            if not self.config.parallel.overlap:
                self.learner.finish_update()
                travelling = False
        return travelling

    def act(self) -> None:
        """One env step in every environment, into replay."""
        self.timer.start("act")
        actions = self.actor.choose(self.epsilon)
        self.timer.start("env")
        step = self.actor.step(actions)
        self.timer.start("sample")
        self.ring.add(actions, step)
        self.clock.tick()

    @property
    def epsilon(self) -> float:
        """Share of random actions now."""
        return linear_epsilon(self.config.exploration, self.clock.env_steps)

    def report(self) -> Sequence[float]:
        """What this rank tells the others since it last did: `learner.REPORTED`."""
        episodes = self.envs.finished()
        returns, lengths = sum(e.episode_return for e in episodes), sum(e.length for e in episodes)
        return (float(self.stop.received), float(len(episodes)), returns, float(lengths))

    def log(self) -> None:
        """One line of metrics."""
        totals = self.learner.drain()
        episodes = totals["episodes"]
        values = {
            "loss": totals["loss"],
            "td_error": totals["td_error"],
            "q_mean": totals["q_mean"],
            "epsilon": self.epsilon,
            "lr": self.learner.lr,
            "grad_norm": self.learner.grad_norm,
            "episodes": episodes,
            "skipped_updates": self.learner.skipped_updates,
        }
        if episodes:
            values["episode_return_mean"] = totals["return_sum"] / episodes
            values["episode_length_mean"] = totals["length_sum"] / episodes
        self.metrics.log(self.clock.env_steps, self.clock.updates, values)

    def evaluate(self) -> None:
        """Play greedily, every rank its share."""
        if self.evaluated_at == self.clock.env_steps:
            return
        evaluation = self.evaluator.run(self.learner.online)
        self.evaluated_at = self.clock.env_steps
        self.evaluation = {
            "eval_return_mean": evaluation.mean,
            "eval_return_std": evaluation.std,
            "eval_episodes": len(evaluation.returns),
        }
        self.metrics.log(self.clock.env_steps, self.clock.updates, self.evaluation)
        self.metrics.say(f"evaluation at env step {self.clock.env_steps:,}, {evaluation}")

    def save(self) -> None:
        """Write a checkpoint; a disk that fails does not end the run."""
        if self.saved_at == self.clock.env_steps:
            return
        parts: dict[str, Any] = {rank_part(self.comm.rank): {}}
        if self.comm.rank == 0:
            parts[LEARNER] = {
                "learner": self.learner.state(),
                "clock": self.clock.state(),
                "seconds": self.timer.seconds(),
            }
        failure = self.checkpoints.save(self.clock.env_steps, parts, self.config.flat())
        self.saved_at = self.clock.env_steps
        if failure:
            self.metrics.say(
                f"checkpoint at env step {self.clock.env_steps:,} failed: {failure}; the last one stands"
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
            "wall_seconds": wall_seconds,
            "env_steps_per_second": self.clock.env_steps / wall_seconds,
            "updates_per_second": self.clock.updates / wall_seconds,
            **{
                name: self.evaluation.get(name)
                for name in ("eval_return_mean", "eval_return_std", "eval_episodes")
            },
            "param_sha256": self.learner.sha256(),
            "stopped_by": "signal" if self.learner.stop_voted else "finished",
            "seconds": seconds,
        }

    def close(self) -> None:
        """Release what the parts hold."""
        self.metrics.close()
        self.envs.close()


def device_kind(config: Config) -> str:
    """Cpu or cuda.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    wanted = config.parallel.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def choose_device(config: Config, comm: Comm) -> torch.device:
    """The rank's device: a GPU of its own where its host has as many as ranks."""
    if device_kind(config) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_threads(config: Config, comm: Comm) -> int:
    """Threads of this rank: its share of the cores that it may use, so that ranks do not fight for them."""
    threads = config.parallel.threads_per_rank
    threads = threads or max(1, len(os.sched_getaffinity(0)) // comm.local_size)
    torch.set_num_threads(threads)
    return threads


def open_run_dir(config: Config, comm: Comm) -> Path:
    """The run directory, made by rank 0 with `config.yaml` in it.

    Raises:
        UserError: it cannot be written.
    """
    named = config.run.run_dir or "runs/" + "-".join(
        re.sub(r"[^\w.]+", "_", part)
        for part in (
            config.environment.env,
            config.preset,
            f"seed{config.run.seed}",
            time.strftime("%Y%m%d-%H%M%S"),
        )
        if part
    )
    path = Path(comm.broadcast_object(named))

    def make() -> Path:
        if comm.rank == 0:
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_config(config, path / "config.yaml")
            except OSError as error:
                raise UserError(
                    f"cannot write to the run directory '{path}': {error.strerror}; choose another with --run-dir"
                ) from None
        return path

    return together(comm, make)


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


def train(config: Config, comm: Comm, stop: StopSignal) -> int:
    """Train, evaluate, record; return the exit code.

    Raises:
        UserError: the input is wrong, the same on every rank.
    """
    check_same_config(config, comm)
    check_world(config, comm.size)
    run_dir = open_run_dir(config, comm)
    training = Training(config, comm, run_dir, stop)
    training.metrics.say(f"hvdqn {__version__}: {comm.size} rank(s), {comm.why}")
    training.metrics.say(
        f"{training.envs.description} per rank; {training.learner.parameters.numel():,} parameters"
    )
    training.run()
    training.save()
    if not training.learner.stop_voted:
        training.evaluate()
    if comm.rank == 0:
        write_summary(run_dir, training.summary())
    training.metrics.say(f"run directory: {run_dir}")
    training.close()
    return EXIT_REQUEUE if training.learner.stop_voted else EXIT_FINISHED


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        comm = connect(config.parallel.comm, device_kind(config))
    except (UserError, LaunchError) as error:
        return refuse(str(error), launcher_rank())
    try:
        code = train(config, comm, StopSignal())
    except UserError as error:
        code = refuse(str(error), comm.rank)
    except Exception:
        print(
            f"hvdqn: rank {comm.rank} of {comm.size} failed:\n{traceback.format_exc()}",
            file=sys.stderr,
            flush=True,
        )
        comm.abort(EXIT_FAILED)
    comm.barrier()
    comm.close()
    return code


def refuse(message: str, rank: int) -> int:
    """Say once what is wrong with the input; the other ranks give rank 0 the time to say it."""
    if rank == 0:
        print(f"hvdqn: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
