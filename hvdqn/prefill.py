"""`--prefill`: transitions from an .npz file, or from a local Minari dataset, for the replay of every rank."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdqn.config import Config
from hvdqn.envs import Spaces, make_space, to_inputs
from hvdqn.errors import UserError
from hvdqn.paths import absolute
from hvdqn.rank import Parts
from hvdqn.replay.prefill import KEYS, fill, make_transitions

MINARI = "minari:"


def prefill(config: Config, parts: Parts) -> int:
    """Fill the empty replay of this rank with its share of the transitions of `--prefill`; return how many it holds.

    Raises:
        UserError: they cannot be read, or do not fit the environment.
    """
    acting, source, spaces = parts.acting, config.run.prefill, parts.spaces
    if acting is None:
        return 0
    if spaces.action_shape:
        raise UserError(
            f"--prefill does not support actions of several dimensions, as of '{config.environment.env}'"
        )
    is_minari = source.startswith(MINARI)
    arrays = read_minari(source, spaces) if is_minari else read_npz(absolute(source))
    known = make_transitions(source, arrays, acting.replay, spaces.num_actions, spaces.first_action)
    return fill(acting.replay, known, parts.role.index, parts.role.of, config.environment.clip_rewards)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file of transitions.

    Raises:
        UserError: it cannot be read, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in (*KEYS, "truncations")}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no .npz file of plain arrays"
        raise UserError(f"--prefill '{path}': {reason}; give a file that numpy.savez wrote") from None
    if missing := [key for key in KEYS if key not in arrays]:
        raise UserError(f"--prefill '{path}' lacks {', '.join(missing)}; it must hold {', '.join(KEYS)}")
    arrays.setdefault("truncations", np.zeros(len(arrays["actions"]), np.bool_))
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1 or not counts["actions"]:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"--prefill '{path}' must hold equally many of each, at least one, and has {shown}")
    return arrays


def read_minari(source: str, spaces: Spaces) -> dict[str, NDArray[Any]]:
    """Return the transitions of a dataset on this machine, as the arrays of a file; nothing is downloaded.

    Raises:
        UserError: there is no such dataset, or Minari is not installed.
    """
    try:
        import minari
    except ImportError:
        raise UserError(f"--prefill {source} needs the minari extra; pip install 'hvdqn[minari]'") from None
    name = source.removeprefix(MINARI)
    try:
        dataset = minari.load_dataset(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        found = ", ".join(sorted(minari.list_local_datasets())) or "none"
        reason = " ".join(str(error).split())
        raise UserError(f"--prefill {source}: {reason}; the datasets of this machine: {found}") from None
    space = make_space(spaces.observation_space)
    columns: dict[str, list[NDArray[Any]]] = {key: [] for key in (*KEYS, "truncations")}
    for episode in dataset.iterate_episodes():
        observation, _ = to_inputs(spaces, space, episode.observations)
        columns["observations"].append(observation[:-1])
        columns["next_observations"].append(observation[1:])
        for key in ("actions", "rewards", "terminations", "truncations"):
            columns[key].append(np.asarray(getattr(episode, key)))
    return {key: np.concatenate(parts) for key, parts in columns.items()}
