"""What callbacks and logs see of the info of an episode's last step: numbers, text and arrays of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

EPISODE_INFO = "hvdqn_episode_info"
"""Entry of the info of a `SingleEnvironment`: a tuple with the dict, which a vector environment does not take apart."""


def plain_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain entries of the info of one environment; NumPy's numbers become Python's."""
    plain: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biuf":
            plain[str(name)] = value.item() if value.ndim == 0 else np.array(value)
        elif isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic):
            plain[str(name)] = value
    return plain


def info_of(infos: Mapping[str, Any], env: int) -> dict[str, Any]:
    """Return the plain entries of one environment in the infos of a vector environment.

    Args:
        infos: an array `[envs]` for each name, and one of the same name after `_` that marks where it is set.
        env: index of the environment.
    """
    if EPISODE_INFO in infos:
        packed = infos[EPISODE_INFO][env]
        return dict(packed[0]) if packed else {}
    names = [name for name in infos if not name.startswith("_") and np.ndim(infos[name]) > 0]
    return plain_info(
        {name: infos[name][env] for name in names if f"_{name}" not in infos or infos[f"_{name}"][env]}
    )
