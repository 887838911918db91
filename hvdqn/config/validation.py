"""Checks of settings: their ranges, settings that contradict each other, and settings without effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvdqn.config.fields import Needs, flag_of
from hvdqn.config.names import did_you_mean
from hvdqn.config.settings import SETTINGS, Config, LearningConfig, NetworkConfig, preset_config
from hvdqn.config.values import value_of_data
from hvdqn.errors import UserError

TORSOS = ("auto", "mlp", "nature", "impala", "minatar")


def check(config: Config) -> None:
    """Check everything that one process can check before it connects to the others.

    Raises:
        UserError: a value cannot be right, or two settings contradict each other.
    """
    _check_ranges(config.flat())
    _check_network(config.network, config.learning)
    _check_munchausen(config.network, config.learning)
    _check_exploration(config)
    if config.parallel.model_parallel > 1:
        _check_model_parallel(config)
    _check_evaluation(config)
    if config.parallel.tolerate_dead_workers and config.parallel.stall_timeout == 0:
        raise UserError(
            "--tolerate-dead-workers needs the watchdog to find them; leave --stall-timeout 0 out, or give seconds"
        )
    if config.network.normalize_observations and config.parallel.sync == "server":
        raise UserError(
            "--normalize-observations does not support --sync server, whose workers would each have a mean of their "
            "own; use --sync gradients or parameters"
        )
    if config.run.init_torso_only and not config.run.init_from:
        raise UserError("--init-torso-only needs --init-from, the run whose torso is taken")
    if config.replay.replay == "none":
        _check_rollouts(config)
    else:
        _check_replay(config)


def _check_rollouts(config: Config) -> None:
    replay, envs = config.replay, config.environment.envs_per_rank
    if envs * replay.rollout_steps % replay.minibatches:
        raise UserError(
            f"--minibatches {replay.minibatches} does not divide the {envs * replay.rollout_steps} steps of a rank in "
            f"a rollout (--envs-per-rank {envs} x --rollout-steps {replay.rollout_steps}); change one of them"
        )
    if config.run.prefill:
        raise UserError("--prefill fills replay, and with --replay none there is none; leave one of them out")


def _check_replay(config: Config) -> None:
    """Check that learning starts before the run ends or replay is full, and that a target network is updated."""
    if config.learning.target_every == 0 and config.learning.target_tau == 1.0:
        raise UserError(
            "--target-every 0 would never update the target network; give env steps or a --target-tau below 1"
        )
    starts = config.replay.learning_starts
    if config.replay.replay_capacity <= starts:
        raise UserError(
            f"--replay-capacity {config.replay.replay_capacity} must be above --learning-starts {starts}, or learning "
            "would never start"
        )
    if config.run.total_env_steps <= starts:
        raise UserError(
            f"--total-env-steps {config.run.total_env_steps} must be above --learning-starts {starts}, or learning "
            "would never start; raise one or lower the other"
        )


def check_saved(settings: Mapping[str, Any]) -> None:
    """Check the type and the range of each setting in a file, by name. Names that this version does not know pass.

    Raises:
        UserError: a value cannot be right.
    """
    known = {
        name: value_of_data(SETTINGS[name], value)
        for name, value in settings.items()
        if name in SETTINGS and not (value is None and SETTINGS[name].default is None)
    }
    _check_ranges({name: list(value) if isinstance(value, tuple) else value for name, value in known.items()})


def _check_ranges(settings: Mapping[str, Any]) -> None:
    """Check each number by itself."""
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_of(name)} is {value}; it must be a finite number")
        numbers = value if isinstance(value, list) else [value]
        for allowed in SETTINGS[name].ranges:
            if any(number not in allowed for number in numbers):
                shown = " ".join(map(str, numbers))
                raise UserError(f"{flag_of(name)} is {shown}; it must be {allowed.words}")


def _check_network(network: NetworkConfig, learning: LearningConfig) -> None:
    torso = network.torso
    if torso not in TORSOS and ":" not in torso:
        raise UserError(
            f"unknown --torso '{torso}'{did_you_mean(torso, TORSOS)}; there are {', '.join(TORSOS)}, or give "
            "module:attribute"
        )
    has_atoms = network.head in ("c51", "hl-gauss")
    if has_atoms and (network.atoms < 2 or network.v_min >= network.v_max):
        raise UserError(
            f"--head {network.head} with --atoms {network.atoms} from --v-min {network.v_min:g} to --v-max "
            f"{network.v_max:g}; give at least 2 atoms, and a --v-min below --v-max"
        )
    if network.head != "scalar" and learning.loss == "mse":
        raise UserError(
            f"--loss mse has no meaning for --head {network.head}, which has a loss of its own; use --loss huber"
        )


def _check_munchausen(network: NetworkConfig, learning: LearningConfig) -> None:
    if learning.munchausen and network.head == "c51":
        raise UserError("--munchausen is not defined for --head c51; use --head scalar, hl-gauss, qr or iqn")
    if learning.munchausen and learning.double:
        raise UserError(
            "--munchausen bootstraps from a softmax policy, which leaves --double no action to choose; add --no-double"
        )


def _check_exploration(config: Config) -> None:
    repeat = config.exploration.epsilon_repeat
    if 0 != repeat <= 1:
        raise UserError(f"--epsilon-repeat is {repeat:g}; it must be above 1, or 0 for single actions")
    if config.exploration.exploration == "noisy" and not config.network.noisy:
        raise UserError(
            "--exploration noisy needs the noise of --noisy; without it the agent would not explore"
        )


def _check_model_parallel(config: Config) -> None:
    """Refuse what a network that is split over ranks does not support."""
    network, parallel, m = config.network, config.parallel, config.parallel.model_parallel
    refused = {
        f"--sync {parallel.sync}": parallel.sync != "gradients",
        "--cuda-graphs": parallel.cuda_graphs,
        "--precision bf16": parallel.precision != "fp32",
        "--head iqn": network.head == "iqn",
        "--noisy": network.noisy,
        "--init-from": bool(config.run.init_from),
    }
    for flag, given in refused.items():
        if given:
            raise UserError(f"--model-parallel {m} does not support {flag}; leave one of them out")
    if not network.hidden:
        raise UserError(f"--model-parallel {m} splits the layers of --hidden, and there are none; give some")
    # Layers are split in pairs: the first by its outputs.
    for units in network.hidden[::2]:
        if units % m:
            raise UserError(
                f"--model-parallel {m} does not divide a layer of {units} units in --hidden "
                f"{' '.join(map(str, network.hidden))}; give a multiple of {m}"
            )


def _check_evaluation(config: Config) -> None:
    config.evaluation_environment()
    run = config.run
    if run.stop_at_return is not None and not (run.eval_every and run.eval_episodes):
        raise UserError(
            "--stop-at-return needs evaluations during training; give --eval-every, and --eval-episodes of 1 or more"
        )


def unused_settings(config: Config) -> list[str]:
    """Return a line for each setting that was changed from its preset but has no effect."""
    settings, usual = config.flat(), preset_config(config.preset).flat()
    return [
        f"{flag_of(name)} does nothing without {_alternatives(needs)}"
        for name, field in SETTINGS.items()
        for needs in field.needs
        if settings[needs.setting] not in needs.values and settings[name] != usual[name]
    ]


def _alternatives(needs: Needs) -> str:
    flag = flag_of(needs.setting)
    return " or ".join(flag if value is True else f"{flag} {value}" for value in needs.values)


def check_engine(config: Config, engine: str, size: int) -> None:
    """Check that `--sync` works with this communication library and number of ranks.

    Raises:
        UserError: it does not.
    """
    if config.parallel.sync == "server" and (engine != "mpi" or size < 2):
        found = "a single rank" if size < 2 else f"--comm {engine}"
        raise UserError(
            f"--sync server works between 2 or more ranks over plain MPI, not with {found}; start it with "
            "'mpirun -np N python -m hvdqn.train --comm mpi --sync server', N of 2 or more, or use another --sync"
        )


def check_groups(config: Config, size: int) -> None:
    """Check that the ranks can be divided into groups of `--model-parallel`.

    Raises:
        UserError: they cannot.
    """
    m = config.parallel.model_parallel
    if size % m:
        raise UserError(
            f"--model-parallel {m} does not divide {size} rank{'s' * (size > 1)}; start a multiple of {m} ranks"
        )


def check_world(config: Config, ranks: int) -> None:
    """Check what depends on the number of ranks that act.

    Raises:
        UserError: the replay shard of a rank is too small, the run no longer than a rollout, or the ladder of epsilons
            has a single step.
    """
    envs = ranks * config.environment.envs_per_rank
    if config.exploration.exploration == "ladder" and envs < 2:
        raise UserError(
            "--exploration ladder spreads its epsilons over environments, and there is one; raise --envs-per-rank"
        )
    if config.replay.replay == "none":
        rollout = envs * config.replay.rollout_steps
        if config.run.total_env_steps <= rollout:
            raise UserError(
                f"--total-env-steps {config.run.total_env_steps} end before the first update, which follows a rollout "
                f"of {rollout} (--rollout-steps {config.replay.rollout_steps} of {envs} environments); raise it"
            )
        return
    capacity = config.replay.replay_capacity
    shard = capacity // ranks
    if config.replay.batch_per_rank > shard:
        raise UserError(
            f"--batch-per-rank {config.replay.batch_per_rank} is larger than the replay shard of a rank, {shard} "
            f"(--replay-capacity {capacity} over {ranks} ranks); lower one or raise the other"
        )
    rows = shard // config.environment.envs_per_rank
    needed = config.replay.n_step + config.environment.frame_stack
    if rows < needed:
        raise UserError(
            f"--replay-capacity {capacity} leaves {rows} transitions for each of {envs} environments; n-step and "
            f"frame stack need {needed}: raise it"
        )
