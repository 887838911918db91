"""Build the parts that one rank trains with (environments, replay, learner, ...) from the configuration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from hvdqn.acting import Actor, Epsilons
from hvdqn.checkpoint import load_parameters, read_policy
from hvdqn.clock import Clock, WorkerClock
from hvdqn.comm import Comm
from hvdqn.comm.gpus import assign_gpus, visible_gpus
from hvdqn.config import Config
from hvdqn.envs import Environments, Spaces, make_environments
from hvdqn.errors import UserError
from hvdqn.faults import raise_on_all_ranks
from hvdqn.graphs import Record, Recorded, record_cuda_graph
from hvdqn.learner import Learner, load_tensors
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import Layout, QNetwork, make_network
from hvdqn.paths import absolute
from hvdqn.process import share_of_cores, use_threads
from hvdqn.rank import Acting, Parts
from hvdqn.replay import HOST_MEMORY, Importance, Memory, PrioritizedReplay, Replay
from hvdqn.replay.device import DeviceMemory, PinnedMemory
from hvdqn.role import Role, assign_role
from hvdqn.seeds import rank_seeds
from hvdqn.sync import GroupNorm, RankGroup, make_strategy


def build_parts(config: Config, comm: Comm, timer: PhaseTimer, env_steps: int = 0) -> Parts:
    """Build the parts of this rank. All ranks must call it together. No environment is reset, and replay is empty.

    Args:
        config: the checked configuration, the same on every rank.
        comm: the collectives over all ranks.
        timer: counts this rank's seconds by phase.
        env_steps: global env steps at which the run resumes, for the seeds.

    Raises:
        UserError: on all ranks, if one of them cannot get a GPU, or create its environments or network.
    """
    role = assign_role(config.parallel.sync, comm.rank, comm.size)
    seeds = rank_seeds(config.run.seed, comm.rank, env_steps)
    device, sharing = choose_device(config, comm, timer)
    threads = share_of_cores(config, comm)
    envs = raise_on_all_ranks(comm, lambda: make_own_envs(config, role, seeds.environments, threads), timer)
    spaces = share_spaces(envs, comm, timer)
    group = make_group(config, comm, timer)
    torch.manual_seed(config.run.seed)
    source = (
        config.run.init_from if env_steps == 0 and comm.rank == 0 else ""
    )  # rank 0 sends its weights to all
    network = raise_on_all_ranks(comm, lambda: first_network(config, spaces, source, group), timer)
    # If a GPU computes the network, more threads on the host would only take cores from the environments.
    use_threads(network, threads if device.type == "cpu" else 1)
    torch.manual_seed(noise_seed(config, comm, env_steps))  # from here on ranks draw different numbers
    replay = raise_on_all_ranks(
        comm, lambda: make_own_replay(config, role, envs, seeds.replay, device, sharing), timer
    )
    clock = make_clock(config, role, comm.size)
    learner = make_learner(config, comm, network, device, group)
    strategy = make_strategy(config, learner, comm, timer, clock, recording(config), group)
    acting = None
    if envs is not None and replay is not None:
        acting = Acting(envs, make_actor(config, envs, network, seeds.exploration, device), replay)
    overlap: Literal["exchange", "update"] = "exchange" if device.type == "cpu" else "update"
    return Parts(
        role=role,
        spaces=spaces,
        clock=clock,
        learner=learner,
        strategy=strategy,
        epsilons=Epsilons(config.exploration, config.environment.envs_per_rank, role.index, role.of),
        timer=timer,
        device=device,
        threads=threads,
        overlap=overlap if config.parallel.overlap else "none",
        acting=acting,
    )


def make_own_envs(config: Config, role: Role, seed: int, threads: int) -> Environments | None:
    """Create this rank's environments; return None on a rank that does not act.

    Raises:
        UserError: the environment does not exist, or a DQN cannot play it.
    """
    if not role.acts:
        return None
    return make_environments(config.environment, config.environment.envs_per_rank, seed, True, threads)


def make_own_replay(
    config: Config,
    role: Role,
    envs: Environments | None,
    rng: np.random.Generator,
    device: torch.device,
    sharing: int,
) -> Replay | None:
    """Create this rank's replay in the memory that `replay_memory` chooses; return None on a rank that does not act."""
    if envs is None:
        return None
    return make_replay(config, role, envs, rng, replay_memory(config, role, envs, device, sharing))


def share_spaces(envs: Environments | None, comm: Comm, timer: PhaseTimer) -> Spaces:
    """Return the spaces of the job's environments, also on a rank that has none. All ranks must call it together."""
    mine = envs.spaces if envs else None
    with timer.during("comm"):
        return next(spaces for spaces in comm.all_gather_object(mine) if spaces is not None)


def make_group(config: Config, comm: Comm, timer: PhaseTimer) -> RankGroup | None:
    """Connect the ranks that hold one network with this one, if `--model-parallel` is set; a collective call."""
    size = config.parallel.model_parallel
    return RankGroup(comm, size, timer) if size > 1 else None


def noise_seed(config: Config, comm: Comm, env_steps: int) -> int:
    """Return the seed of torch's generator: ranks that hold one network draw the same numbers, all others do not."""
    first = comm.rank - comm.rank % config.parallel.model_parallel
    return rank_seeds(config.run.seed, first, env_steps).noise


def first_network(config: Config, spaces: Spaces, source: str, group: RankGroup | None = None) -> QNetwork:
    """Make the network of a run, and load the weights of the run or checkpoint `source`, if there is one.

    Raises:
        UserError: observations cannot be normalized, or the weights cannot be read or belong to another network.
    """
    if config.network.normalize_observations and not spaces.are_numbers:
        raise UserError(
            "--normalize-observations is for vectors of numbers, and these observations are images or one-hot vectors; "
            "leave it out"
        )
    network = network_for(config, spaces, group)
    if source:
        torso = config.run.init_torso_only
        remedy = (
            "give its settings of the torso" if torso else "give its network's settings, or --init-torso-only"
        )
        only = ("torso.", "normalize.") if torso else ""
        load_parameters(network, read_policy(absolute(source)), remedy, only)
    return network


def network_for(config: Config, spaces: Spaces | Environments, group: RankGroup | None = None) -> QNetwork:
    """Create the Q-network for these environments, with random weights from torch's generator.

    With a group, create this rank's part of the network that the ranks of the group hold between them.

    Raises:
        UserError: the torso does not fit the observations, the head the actions, or the network the memory.
    """
    try:
        return make_network(
            config.network,
            config.learning.loss,
            spaces.observation_shape,
            config.environment.frame_stack,
            spaces.is_image,
            spaces.num_actions,
            spaces.action_shape,
            group,
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise UserError(
            f"the network does not fit into memory: {str(error).splitlines()[0]}; make it smaller"
        ) from None


def batch_factor(config: Config, size: int) -> float:
    """Return k, the batch of one update (over all ranks) divided by the one that the learning rate was tuned for.

    Under `--sync server` an update is one worker's, so its batch is that of one rank.
    """
    ranks = 1 if config.parallel.sync == "server" else size
    batch = config.replay.batch_per_rank
    return ranks * batch / (config.learning.lr_reference_batch or batch)


def make_learner(
    config: Config, comm: Comm, network: QNetwork, device: torch.device, group: RankGroup | None = None
) -> Learner:
    """Create the learner of this network, and give it rank 0's weights. All ranks must call it together.

    Raises:
        UserError: `--cuda-graphs` is set, and the device is a CPU.
    """
    if config.parallel.cuda_graphs and device.type == "cpu":
        raise UserError("--cuda-graphs needs a GPU, and the networks live on the CPU here; leave it out")
    # The parts of a split network come first in the flat tensor: ranks in the same place of their groups hold them.
    split_numel = Layout(network, group).split_numel if group else 0
    learner = Learner(
        network,
        config.learning,
        device,
        batch_factor(config, comm.size),
        autocast=config.parallel.precision == "bf16",
        norm=GroupNorm(group, split_numel) if group else torch.linalg.vector_norm,
    )
    if record := recording(config):
        learner.differentiate = Recorded(learner.differentiate, record, device)  # type: ignore[method-assign, assignment]
    if group is not None:
        group.peers.broadcast_(learner.parameters[:split_numel])
    comm.broadcast_(learner.parameters[split_numel:])
    if learner.buffers:
        on_host = {name: buffer.cpu() for name, buffer in learner.buffers.items()}
        load_tensors(learner.buffers, comm.broadcast_object(on_host))
    learner.update_target()
    return learner


def recording(config: Config) -> Record | None:
    """Return the function that records CUDA graphs; None if the configuration uses none."""
    return record_cuda_graph if config.parallel.cuda_graphs else None


def make_actor(
    config: Config, envs: Environments, network: QNetwork, rng: np.random.Generator, device: torch.device
) -> Actor:
    """Create the actor, which chooses actions and steps this rank's environments."""
    softmax = config.exploration.exploration == "softmax"
    temperature = config.exploration.temperature if softmax else 0.0
    repeat = config.exploration.epsilon_repeat
    stack = config.environment.frame_stack
    record = recording(config)
    return Actor(envs, network, stack, rng, device, temperature, repeat, record, network.normalize)


def make_clock(config: Config, role: Role, size: int) -> Clock:
    """Create the clock of the job or, on a worker under `--sync server`, the worker's own clock."""
    replay, envs_per_rank = config.replay, config.environment.envs_per_rank
    envs = role.of * envs_per_rank
    # Replay can be sampled once each environment has made n steps in one episode. A reset may come in between.
    earliest = 2 * (replay.n_step + 1)
    starts = max(replay.learning_starts, earliest * envs)
    batch, ratio = replay.batch_per_rank, replay.replay_ratio
    if config.parallel.sync != "server":
        return Clock(envs, size * batch, ratio, starts)
    if not role.acts:
        return Clock(envs, batch, ratio, starts)
    return WorkerClock(envs_per_rank, batch, ratio, starts, own_earliest=earliest * envs_per_rank)


def replay_memory(
    config: Config, role: Role, envs: Environments, device: torch.device, sharing: int
) -> Memory:
    """Return where this rank's replay keeps its observations: in host memory, pinned memory or on a GPU.

    `--replay-device` decides; "auto" stands for the GPU if the observations of all ranks that share it take at most
    half of its free memory.

    Args:
        config: the configuration of the run.
        role: this rank's role.
        envs: this rank's environments.
        device: the device of this rank's networks.
        sharing: number of ranks that use this device.

    Raises:
        UserError: `--replay-device` names a GPU, and the networks are on the CPU.
    """
    wanted = config.replay.replay_device
    if device.type == "cpu":
        if wanted == "cuda":
            raise UserError(
                "--replay-device cuda, but the networks live on the CPU here; leave it out, or give --device cuda"
            )
        return HOST_MEMORY
    frame = math.prod(envs.observation_shape) * envs.observation_dtype.itemsize
    needed = frame * config.replay.replay_capacity // role.of
    fits = needed * sharing <= torch.cuda.mem_get_info(device)[0] / 2
    on_gpu = wanted == "cuda" or (wanted == "auto" and fits)
    return DeviceMemory(device) if on_gpu else PinnedMemory()


def make_replay(
    config: Config, role: Role, envs: Environments, rng: np.random.Generator, memory: Memory = HOST_MEMORY
) -> Replay:
    """Create this rank's replay, still empty, for its share of `--replay-capacity`.

    Raises:
        UserError: the replay does not fit into memory.
    """
    capacity = config.replay.replay_capacity // role.of
    arguments: dict[str, Any] = {
        "envs": envs.num_envs,
        "capacity": capacity,
        "observation_shape": envs.observation_shape,
        "observation_dtype": envs.observation_dtype,
        "rng": rng,
        "frame_stack": config.environment.frame_stack,
        "n_step": config.replay.n_step,
        "gamma": config.learning.gamma,
        "memory": memory,
        "mask_shape": (*envs.action_shape, envs.num_actions),
    }
    try:
        if config.replay.replay == "prioritized":
            return PrioritizedReplay(alpha=config.replay.priority_alpha, **arguments)
        return Replay(**arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"a replay of {capacity:,} transitions: {reason}; lower --replay-capacity") from None


def importance_at(config: Config, role: Role, env_steps: int) -> Importance:
    """Return the settings of importance weights after this many global env steps (Schaul et al. 2016).

    Beta rises linearly from `--priority-beta` to 1. The number of transitions in all replays is computed from env
    steps, so that every rank gets the same.
    """
    first = config.replay.priority_beta
    beta = first + (1.0 - first) * min(env_steps / config.run.total_env_steps, 1.0)
    n_global = max(min(env_steps, config.replay.replay_capacity), 1)
    return Importance(beta, n_global, size=role.of)


def engine_settings(config: Config) -> tuple[str, str, float, str]:
    """Return the arguments of `connect`: choice, device, stall_timeout and host_sum.

    Raises:
        UserError: see `device_kind`.
    """
    parallel = config.parallel
    # The server's ranks send messages to each other through plain MPI.
    host_sum = "off" if parallel.sync == "server" else parallel.host_sum
    return parallel.comm, device_kind(config), parallel.stall_timeout, host_sum


def device_kind(config: Config) -> str:
    """Return the kind of device that `--device` stands for on this host: "cpu" or "cuda".

    Raises:
        UserError: `--device cuda` is given, and torch sees no CUDA device.
    """
    wanted = config.parallel.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def choose_device(config: Config, comm: Comm, timer: PhaseTimer) -> tuple[torch.device, int]:
    """Return this rank's device, and how many ranks use it. All ranks must call this together.

    Each rank gets a GPU of its own, as long as there are enough.

    Raises:
        UserError: on all ranks, if some see GPUs and others none, or if two would share one and the engine does not
            allow it.
    """
    seen = visible_gpus() if device_kind(config) == "cuda" else []
    with timer.during("comm"):
        assigned = assign_gpus(comm.all_gather_object(seen))
    if not any(assigned):
        return torch.device("cpu"), comm.local_size
    check_gpus(assigned, comm)
    mine = assigned[comm.rank]
    assert mine is not None
    device = torch.device("cuda", seen.index(mine))
    torch.cuda.set_device(device)
    # Autograd's thread warns of this once, and then creates the context by itself.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    return device, assigned.count(mine)


def check_gpus(assigned: Sequence[str | None], comm: Comm) -> None:
    """Check that every rank got a GPU, and that no two share one if the engine does not allow that.

    Args:
        assigned: the UUID of each rank's GPU, from `assign_gpus`.
        comm: the collectives over all ranks.

    Raises:
        UserError: some ranks see no GPU, or two share one and the engine does not allow it.
    """
    without = [str(rank) for rank, gpu in enumerate(assigned) if gpu is None]
    if without:
        raise UserError(
            f"no GPU is seen by rank {', '.join(without)}, and one is by others; start all where there are GPUs, or "
            "give --device cpu"
        )
    ranks, gpus = len(assigned), len(set(assigned))
    if ranks > gpus and not comm.ranks_may_share_a_gpu:
        raise UserError(
            f"--comm {comm.name} wants a GPU for each rank, and {ranks} ranks see {gpus} GPU{'s' * (gpus != 1)}; start "
            "fewer ranks on a host, choose --comm mpi, or start with torchrun"
        )
