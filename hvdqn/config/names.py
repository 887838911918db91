"""Handle names that a user writes: suggest known ones for misspelled ones, and import `module:attribute`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from hvdqn.errors import UserError

OTHER_NAMES: Mapping[str, str] = {
    other: name
    for name, others in {
        "lr": "learning_rate alpha step_size adam_lr",
        "lr_final": "end_learning_rate final_lr",
        "lr_warmup": "warmup warmup_steps",
        "optimizer": "optim",
        "optimizer_eps": "adam_eps adam_epsilon eps_adam",
        "gamma": "discount discount_factor",
        "total_env_steps": "total_timesteps n_timesteps num_timesteps timesteps total_steps max_steps num_steps "
        "num_frames total_frames max_timesteps steps",
        "replay_capacity": "buffer_size replay_size replay_buffer_size memory_size memory_capacity",
        "replay_ratio": "train_freq train_frequency gradient_steps training_intensity update_freq",
        "replay": "prioritized prioritized_replay per replay_type",
        "priority_alpha": "prioritized_replay_alpha alpha_per per_alpha",
        "priority_beta": "prioritized_replay_beta prioritized_replay_beta0 per_beta",
        "batch_per_rank": "batch_size train_batch_size minibatch_size",
        "learning_starts": "learn_start learning_start min_replay_size warm_start start_steps random_steps",
        "rollout_steps": "rollout_length unroll_length rollout_fragment_length",
        "td_lambda": "lambda q_lambda gae_lambda trace_decay",
        "epochs": "update_epochs num_epochs n_epochs num_sgd_iter",
        "minibatches": "num_minibatches n_minibatches nminibatches",
        "n_step": "n_steps nstep multi_step n_step_return",
        "env": "env_id environment env_name gym_id game",
        "envs_per_rank": "num_envs n_envs nenv num_env num_workers",
        "action_bins": "bins num_bins n_bins discretization",
        "frame_stack": "stack_num num_stack framestack history_length",
        "env_kwargs": "env_config env_args",
        "clip_rewards": "reward_clipping clip_reward",
        "epsilon_start": "start_e eps_start epsilon_initial initial_epsilon exploration_initial_eps epsilon_init",
        "epsilon_end": "end_e eps_end epsilon_final final_epsilon exploration_final_eps epsilon epsilon_min eps",
        "exploration_env_steps": "exploration_fraction exploration_steps eps_decay epsilon_decay "
        "epsilon_decay_steps epsilon_timesteps",
        "target_every": "target_network_frequency target_update_interval target_update_freq target_update "
        "target_network_update_freq",
        "target_tau": "tau polyak",
        "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clip max_gradient_norm",
        "hidden": "net_arch hidden_size hidden_sizes hiddens layers fcnet_hiddens",
        "torso": "network policy model arch backbone",
        "head": "distributional",
        "atoms": "n_atoms num_atoms atom_size",
        "quantiles": "n_quantiles num_quantiles",
        "double": "double_q double_dqn ddqn",
        "dueling": "dueling_dqn duel",
        "noisy": "noisy_net noisy_nets",
        "preset": "algo algorithm agent",
        "device": "cuda gpu use_cuda",
        "precision": "amp fp16 bf16",
        "comm": "backend dist_backend",
        "run_dir": "output_dir logdir log_dir log_folder save_dir save_path checkpoint_dir out",
        "resume": "restore load load_model resume_from",
        "eval_every": "eval_freq eval_frequency evaluation_interval eval_interval",
        "eval_episodes": "n_eval_episodes num_eval_episodes evaluation_duration",
        "checkpoint_every": "save_freq save_frequency checkpoint_freq checkpoint_frequency save_interval",
        "log_every": "log_interval log_freq log_frequency",
        "episodes": "n_episodes num_episodes",
    }.items()
    for other in others.split()
}
"""What other libraries call a setting, and its name here."""


def did_you_mean(word: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean 'a' or 'b'?` with the known words closest to `word`, or "" if none is close.

    Args:
        word: the unknown word.
        known: all words that are known.
        others: maps words that other libraries use to the known words for the same thing.
    """
    known = list(known)
    if others and others.get(word) in known:
        return f"; did you mean '{others[word]}'?"
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def import_module(module: str, flag: str) -> ModuleType:
    """Import and return a module that the user named with a flag.

    Raises:
        UserError: it cannot be imported.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{flag}: '{module}' is no module's name; write package.module, without path and .py")
    try:
        return importlib.import_module(module)
    except SystemExit as error:
        raise UserError(
            f"{flag}: '{module}' calls sys.exit({error.code!r}) when it is imported; put what it runs below "
            "if __name__ == '__main__'"
        ) from error
    except ImportError as error:
        raise UserError(
            f"{flag}: cannot import '{module}' ({' '.join(str(error).split())}); install it or put it on PYTHONPATH"
        ) from error


def import_attribute(path: str, flag: str) -> Any:
    """Import and return the attribute that `module:attribute` names.

    Raises:
        UserError: the module cannot be imported or has no such attribute.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UserError(f"{flag} '{path}' is not of the form module:attribute")
    found = getattr(import_module(module, f"{flag} '{path}'"), attribute, None)
    if found is None:
        raise UserError(f"{flag} '{path}': module '{module}' has no '{attribute}'")
    return found
