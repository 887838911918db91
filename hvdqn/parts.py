"""The parts of one rank, built from the configuration."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from hvdqn.acting import Actor, Epsilons
from hvdqn.clock import Clock, ReportedClock
from hvdqn.comm import Comm
from hvdqn.comm.gpus import assign_gpus, visible_gpus
from hvdqn.config import Config, acting_place, acting_ranks
from hvdqn.envs import Environments, make_environments
from hvdqn.errors import UserError
from hvdqn.faults import raise_on_all_ranks
from hvdqn.graphs import Record, record_cuda_graph
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import QNetwork, make_network
from hvdqn.replay import Importance, PrioritizedSampler, Replay, Ring, Sampler, UniformSampler
from hvdqn.replay.frames import DeviceFrames, HostFrames, MakeFrames, PinnedFrames
from hvdqn.seeds import rank_seeds
from hvdqn.sync import make_sync

# Below this many parameters an operation is too short to be worth a second thread.
PARAMETERS_WORTH_THREADS = 500_000


@dataclass
class Parts:
    """What one rank trains with. Nothing has begun: no environment is reset, replay is empty."""

    envs: Environments
    clock: Clock
    learner: Learner
    replay: Replay
    actor: Actor
    epsilons: Epsilons
    timer: PhaseTimer
    device: torch.device
    threads: int


def build_parts(config: Config, comm: Comm, timer: PhaseTimer, env_steps: int = 0) -> Parts:
    """Build them; a collective call.

    Args:
        config: checked, the same on every rank.
        comm: the ranks.
        timer: of this rank.
        env_steps: where the run is resumed, for the seeds.

    Raises:
        UserError: on all ranks, where one cannot have its GPU, or make its environments or network.
    """
    seeds = rank_seeds(config.run.seed, comm.rank, env_steps)
    device, sharing = choose_device(config, comm, timer)
    threads = share_of_cores(config, comm)
    environment = config.environment
    envs = raise_on_all_ranks(
        comm,
        lambda: make_environments(environment, environment.envs_per_rank, seeds.environments, True, threads),
        timer,
    )
    torch.manual_seed(config.run.seed)
    network = raise_on_all_ranks(comm, lambda: network_for(config, envs), timer)
    # Beside a GPU the host has small copies to make: threads of its own would take the cores from environments.
    use_threads(network, threads if device.type == "cpu" else 1)
    torch.manual_seed(seeds.noise)  # from here on ranks draw different numbers
    clock = make_clock(config, comm)
    frames = place_frames(config, comm.size, envs, device, sharing)
    replay = raise_on_all_ranks(
        comm, lambda: make_replay(config, comm.size, envs, seeds.replay, frames), timer
    )
    return Parts(
        envs=envs,
        clock=clock,
        learner=make_learner(config, comm, network, timer, device, clock),
        replay=replay,
        actor=make_actor(config, envs, network, seeds.exploration, device),
        epsilons=make_epsilons(config, comm),
        timer=timer,
        device=device,
        threads=threads,
    )


def network_for(config: Config, envs: Environments) -> QNetwork:
    """The Q-network of these environments.

    Raises:
        UserError: the torso does not fit the observations, or the network the memory of this host.
    """
    try:
        return make_network(
            config.network,
            config.learning.loss,
            envs.observation_shape,
            config.environment.frame_stack,
            envs.is_image,
            envs.num_actions,
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise UserError(
            f"the network does not fit into memory: {str(error).splitlines()[0]}; make it smaller"
        ) from None


def make_learner(
    config: Config, comm: Comm, network: QNetwork, timer: PhaseTimer, device: torch.device, clock: Clock
) -> Learner:
    """The learner of this network, equal to rank 0's; a collective call.

    Raises:
        UserError: CUDA graphs are asked for without CUDA.
    """
    if config.parallel.cuda_graphs and device.type == "cpu":
        raise UserError("--cuda-graphs needs a GPU, and the networks live on the CPU here; leave it out")
    return Learner(
        network,
        config.learning,
        comm,
        make_sync(config.parallel, comm, clock),
        config.replay.batch_per_rank,
        timer,
        device,
        autocast=config.parallel.precision == "bf16",
        record=recording(config),
    )


def recording(config: Config) -> Record | None:
    """How passes through the networks are recorded, if they are."""
    return record_cuda_graph if config.parallel.cuda_graphs else None


def make_actor(
    config: Config, envs: Environments, network: QNetwork, rng: np.random.Generator, device: torch.device
) -> Actor:
    """What steps this rank's environments."""
    softmax = config.exploration.exploration == "softmax"
    temperature = config.exploration.temperature if softmax else 0.0
    repeat = config.exploration.epsilon_repeat
    stack = config.environment.frame_stack
    return Actor(envs, network, stack, rng, device, temperature, repeat, recording(config))


def make_epsilons(config: Config, comm: Comm) -> Epsilons:
    """Which share of this rank's actions is random."""
    place, acting = acting_place(config, comm.rank), acting_ranks(config, comm.size)
    return Epsilons(config.exploration, config.environment.envs_per_rank, place, acting)


def make_clock(config: Config, comm: Comm) -> Clock:
    """The clock of the job, or of one rank where ranks step by themselves."""
    replay, envs_per_rank = config.replay, config.environment.envs_per_rank
    envs = acting_ranks(config, comm.size) * envs_per_rank
    # Nothing can be sampled before each environment has made n steps and may have been reset in between.
    earliest = 2 * (replay.n_step + 1)
    starts = max(replay.learning_starts, earliest * envs)
    batch, ratio = replay.batch_per_rank, replay.replay_ratio
    if config.parallel.sync != "server":
        return Clock(envs, comm.size * batch, ratio, starts)
    if comm.rank == 0:
        return Clock(envs, batch, ratio, starts)
    return ReportedClock(envs_per_rank, batch, ratio, starts, own_earliest=earliest * envs_per_rank)


def place_frames(
    config: Config, size: int, envs: Environments, device: torch.device, sharing: int
) -> MakeFrames:
    """What keeps this rank's observations: in the memory that `--replay-device` names, or where they fit.

    Args:
        config: of the job.
        size: its ranks.
        envs: of this one.
        device: where its networks live.
        sharing: how many ranks live there.

    Raises:
        UserError: they are to be on a GPU, and the networks are not.
    """
    wanted = config.replay.replay_device
    if device.type == "cpu":
        if wanted == "cuda":
            raise UserError(
                "--replay-device cuda, but the networks live on the CPU here; leave it out, or give --device cuda"
            )
        return HostFrames
    frame = math.prod(envs.observation_shape) * envs.observation_dtype.itemsize
    needed = frame * config.replay.replay_capacity // acting_ranks(config, size)
    fits = needed * sharing <= torch.cuda.mem_get_info(device)[0] / 2
    return (
        partial(DeviceFrames, device=device)
        if wanted == "cuda" or (wanted == "auto" and fits)
        else PinnedFrames
    )


def make_replay(
    config: Config, size: int, envs: Environments, rng: np.random.Generator, frames: MakeFrames = HostFrames
) -> Replay:
    """This rank's shard of replay.

    Raises:
        UserError: it does not fit into the memory of this host.
    """
    capacity = config.replay.replay_capacity // acting_ranks(config, size)
    try:
        ring = Ring(
            envs=envs.num_envs,
            capacity=capacity,
            observation_shape=envs.observation_shape,
            observation_dtype=envs.observation_dtype,
            frame_stack=config.environment.frame_stack,
            n_step=config.replay.n_step,
            gamma=config.learning.gamma,
            frames=frames,
        )
        sampler: Sampler = UniformSampler(ring, rng)
        if config.replay.replay == "prioritized":
            sampler = PrioritizedSampler(ring, rng, config.replay.priority_alpha)
    except (MemoryError, torch.OutOfMemoryError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"a replay of {capacity:,} transitions: {said}; lower --replay-capacity") from None
    return Replay(ring, sampler)


def importance_at(config: Config, size: int, env_steps: int) -> Importance:
    """What corrects prioritized draws after this many global env steps: beta rises in a line to 1 (Schaul et al. 2016).

    The number of transitions in the whole job follows from the clock, so that it is the same on every rank.
    """
    first = config.replay.priority_beta
    beta = first + (1.0 - first) * min(env_steps / config.run.total_env_steps, 1.0)
    n_global = max(min(env_steps, config.replay.replay_capacity), 1)
    return Importance(beta, n_global, size=acting_ranks(config, size))


def device_kind(config: Config) -> str:
    """The kind of device that `--device` means here: cpu or cuda.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    wanted = config.parallel.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def choose_device(config: Config, comm: Comm, timer: PhaseTimer) -> tuple[torch.device, int]:
    """The rank's device, a GPU of its own where there are enough, and how many ranks have it; a collective call.

    Raises:
        UserError: on all ranks, where some see GPUs and others none, or two share one and the engine does not let them.
    """
    seen = visible_gpus() if device_kind(config) == "cuda" else []
    with timer.during("comm"):
        dealt = assign_gpus(comm.all_gather_object(seen))
    if not any(dealt):
        return torch.device("cpu"), comm.local_size
    check_gpus(dealt, comm)
    mine = dealt[comm.rank]
    assert mine is not None
    device = torch.device("cuda", seen.index(mine))
    torch.cuda.set_device(device)
    # Of autograd's thread, which then finds the context by itself.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    return device, dealt.count(mine)


def check_gpus(dealt: Sequence[str | None], comm: Comm) -> None:
    """Check what every rank has been dealt, where some see GPUs.

    Raises:
        UserError: others see none, or two share one and the engine does not let them.
    """
    without = [str(rank) for rank, gpu in enumerate(dealt) if gpu is None]
    if without:
        raise UserError(
            f"no GPU is seen by rank {', '.join(without)}, and one is by others; start all where there are GPUs, or "
            "give --device cpu"
        )
    ranks, gpus = len(dealt), len(set(dealt))
    if ranks > gpus and not comm.ranks_may_share_a_gpu:
        raise UserError(
            f"--comm {comm.name} wants a GPU for each rank, and {ranks} ranks see {gpus} GPU{'s' * (gpus != 1)}; start "
            "fewer ranks on a host, choose --comm mpi, or start with torchrun"
        )


def use_threads(network: QNetwork, most: int) -> None:
    """Let torch and NumPy work with so many threads, from now on, or with one where the network is small."""
    small = sum(p.numel() for p in network.parameters()) < PARAMETERS_WORTH_THREADS
    threads = 1 if small else most
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")


def share_of_cores(config: Config, comm: Comm) -> int:
    """Threads of this rank: its share of the cores it may use, so that ranks of one host do not fight.

    A collective call: a launcher may have bound each rank to cores of its own, or all to the same.
    """
    mine = os.sched_getaffinity(0)
    sharing = sum(not mine.isdisjoint(cores) for cores in comm.cores_of_host())
    return config.parallel.threads_per_rank or max(1, len(mine) // sharing)
