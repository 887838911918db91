"""Build the parts that one rank trains with (environments, replay, learner, ...) from the configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch

from hvdqn.acting import Actor, Epsilons
from hvdqn.checkpoint import load_parameters, read_policy
from hvdqn.clock import Clock, WorkerClock
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.devices import choose_device
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
from hvdqn.replay import (
    HOST_MEMORY,
    Importance,
    Memory,
    PrioritizedReplay,
    Replay,
    Rollout,
    Values,
    rollout_rows,
)
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
    clock = make_clock(config, role, comm.size)
    learner = make_learner(config, comm, network, device, group)
    strategy = make_strategy(config, learner, comm, timer, clock, recording(config), group)
    actor = make_actor(config, envs, network, seeds.exploration, device) if envs else None
    replay = raise_on_all_ranks(
        comm, lambda: make_own_replay(config, role, actor, seeds.replay, device, sharing), timer
    )
    acting = Acting(actor.envs, actor, replay) if actor and replay is not None else None
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
    actor: Actor | None,
    rng: np.random.Generator,
    device: torch.device,
    sharing: int,
) -> Replay | None:
    """Create this rank's replay in the memory that `replay_memory` chooses; return None on a rank that does not act."""
    if actor is None:
        return None
    memory = replay_memory(config, role, actor.envs, device, sharing)
    return make_replay(config, role, actor.envs, rng, memory, actor.values)


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
    batch = config.batch_per_rank
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
    replay, envs_per_rank, batch = config.replay, config.environment.envs_per_rank, config.batch_per_rank
    envs = role.of * envs_per_rank
    if replay.replay == "none":
        earliest, starts, ratio, rollout_steps = 0, 0, float(replay.epochs), replay.rollout_steps
    else:
        # Replay can be sampled once each environment has made n steps in one episode. A reset may come in between.
        earliest = 2 * (replay.n_step + 1)
        starts, ratio, rollout_steps = max(replay.learning_starts, earliest * envs), replay.replay_ratio, 0
    if config.parallel.sync != "server":
        return Clock(envs, size * batch, ratio, starts, rollout_steps)
    if not role.acts:
        return Clock(envs, batch, ratio, starts, rollout_steps)
    own_earliest = earliest * envs_per_rank
    return WorkerClock(envs_per_rank, batch, ratio, starts, rollout_steps, own_earliest=own_earliest)


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
    needed = frame * replay_rows(config, role)
    fits = needed * sharing <= torch.cuda.mem_get_info(device)[0] / 2
    on_gpu = wanted == "cuda" or (wanted == "auto" and fits)
    return DeviceMemory(device) if on_gpu else PinnedMemory()


def replay_rows(config: Config, role: Role) -> int:
    """Return the capacity of this rank's replay: its share of `--replay-capacity`, or what a rollout needs."""
    environment, replay = config.environment, config.replay
    if replay.replay == "none":
        return rollout_rows(environment.envs_per_rank, replay.rollout_steps, environment.frame_stack)
    return replay.replay_capacity // role.of


def make_replay(
    config: Config,
    role: Role,
    envs: Environments,
    rng: np.random.Generator,
    memory: Memory = HOST_MEMORY,
    values: Values | None = None,
) -> Replay:
    """Create this rank's replay, still empty.

    Args:
        config: the configuration of the run.
        role: this rank's role.
        envs: this rank's environments.
        rng: generator of all random draws.
        memory: where observations lie.
        values: `Actor.values`, which `--replay none` needs.

    Raises:
        UserError: the replay does not fit into memory.
    """
    settings, capacity = config.replay, replay_rows(config, role)
    arguments: dict[str, Any] = {
        "envs": envs.num_envs,
        "capacity": capacity,
        "observation_shape": envs.observation_shape,
        "observation_dtype": envs.observation_dtype,
        "rng": rng,
        "frame_stack": config.environment.frame_stack,
        "n_step": 1 if settings.replay == "none" else settings.n_step,
        "gamma": config.learning.gamma,
        "memory": memory,
        "mask_shape": (*envs.action_shape, envs.num_actions),
    }
    try:
        if settings.replay == "prioritized":
            return PrioritizedReplay(alpha=settings.priority_alpha, **arguments)
        if settings.replay == "none":
            assert values is not None
            return Rollout(
                settings.rollout_steps, settings.td_lambda, settings.epochs, values=values, **arguments
            )
        return Replay(**arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        lower = "--envs-per-rank" if settings.replay == "none" else "--replay-capacity"
        raise UserError(f"a replay of {capacity:,} transitions: {reason}; lower {lower}") from None


def importance_at(config: Config, role: Role, env_steps: int) -> Importance:
    """Return the settings of importance weights after this many global env steps (Schaul et al. 2016).

    Beta rises linearly from `--priority-beta` to 1. The number of transitions in all replays is computed from env
    steps, so that every rank gets the same.
    """
    first = config.replay.priority_beta
    beta = first + (1.0 - first) * min(env_steps / config.run.total_env_steps, 1.0)
    n_global = max(min(env_steps, config.replay.replay_capacity), 1)
    return Importance(beta, n_global, size=role.of)
