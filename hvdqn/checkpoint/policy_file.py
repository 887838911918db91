"""The policy file of a checkpoint: the online network's parameters by name, and what it takes to act with them.

`policy.safetensors` holds one tensor for each parameter and each persistent buffer. Its metadata hold, as JSON, the
settings of the run and the spaces of its environments, so that the file alone is a policy: it may be copied anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hvdqn import __version__
from hvdqn.checkpoint.contents import LEARNER, check_learner
from hvdqn.checkpoint.files import BrokenCheckpointError, read_part
from hvdqn.checkpoint.manifest import Checkpoint, open_checkpoint
from hvdqn.config import Config, check_saved
from hvdqn.envs import Spaces, make_space
from hvdqn.errors import UserError
from hvdqn.links import follow_link
from hvdqn.networks import QNetwork, spectral_layers

POLICY = "policy"
"""Name of the part that holds the online network, and of the entry in it that is no tensor."""


@dataclass(frozen=True)
class SavedPolicy:
    """A policy as it was read from disk.

    Attributes:
        path: of the file or the checkpoint.
        parameters: those of the online network and its persistent buffers, by name.
        config: settings of the run.
        spaces: of its environments; None in checkpoints of version 0.1.
        env_steps: at which it was saved.
        flat: all parameters in one array, in checkpoints of version 0.1, which have no names; else None.
    """

    path: Path
    config: Config
    env_steps: int
    spaces: Spaces | None = None
    parameters: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    flat: NDArray[Any] | None = None


def policy_part(
    network: QNetwork, config: Config, spaces: Spaces, env_steps: int, **more: Any
) -> dict[str, Any]:
    """Return the content of a policy file.

    Args:
        network: the online network. Its tensors are not copied.
        config: settings of the run.
        spaces: of its environments.
        env_steps: of the run so far.
        more: plain data to keep beside them.
    """
    buffers = network.state_buffers()
    about = {
        "hvdqn": __version__,
        "env_steps": env_steps,
        "config": config.flat(),
        "spaces": spaces._asdict(),
        "buffers": list(buffers),
        **more,
    }
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return {**parameters, **buffers, POLICY: about}


def check_policy(part: Any, path: object) -> None:
    """Check the shape of what a policy file holds: a digest does not prove any.

    Raises:
        BrokenCheckpointError: it is not a policy.
    """
    about = part.get(POLICY) if isinstance(part, dict) else None
    if not isinstance(about, dict) or len(part) < 2:
        raise BrokenCheckpointError(f"{path} holds no policy")
    try:
        for name, values in part.items():
            kinds = "fiub" if name in about.get("buffers", ()) else "f"  # parameters are floats
            if name != POLICY and not (isinstance(values, np.ndarray) and values.dtype.kind in kinds):
                raise ValueError(f"{name} is no array of numbers")
        check_saved(about["config"])
        if type(about["env_steps"]) is not int:
            raise ValueError("env_steps is no whole number")
        spaces_of(about)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BrokenCheckpointError(f"{path} is not a policy's: {reason}") from None


def spaces_of(about: Mapping[str, Any]) -> Spaces:
    """Return the spaces in the plain data of a policy file."""
    data = about["spaces"]
    make_space(data["observation_space"])
    if data.get("action_space") is not None:
        make_space(data["action_space"])
    shapes = {"observation_shape": data["observation_shape"], "action_shape": data.get("action_shape", ())}
    return Spaces(**{**data, **{name: tuple(shape) for name, shape in shapes.items()}})


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


def read_policy(path: Path) -> SavedPolicy:
    """Read the policy of a run directory (its newest one), of a checkpoint, or of a policy file.

    Nothing that the files name is imported.

    Raises:
        UserError: there is none, or it is broken.
    """
    try:
        if path.suffix == ".safetensors" and path.is_file():
            return _saved(path, read_part(path))
        return policy_of(find_checkpoint(path))
    except (BrokenCheckpointError, OSError) as broken:
        raise UserError(f"{broken}; choose another checkpoint") from None


def policy_of(checkpoint: Checkpoint) -> SavedPolicy:
    """Read the policy of a checkpoint.

    Raises:
        BrokenCheckpointError: the file is broken.
    """
    if checkpoint.has_names:
        return _saved(checkpoint.path, checkpoint.read(POLICY))
    part = checkpoint.read(LEARNER)
    check_learner(part, checkpoint.path)
    config = Config().replace(**checkpoint.manifest["config"])
    return SavedPolicy(checkpoint.path, config, checkpoint.env_steps, flat=part["learner"]["online"])


def _saved(path: Path, part: Any) -> SavedPolicy:
    check_policy(part, path)
    about = part.pop(POLICY)
    config = Config().replace(**about["config"])
    return SavedPolicy(path, config, about["env_steps"], spaces_of(about), part)


def load_parameters(
    network: QNetwork, saved: SavedPolicy, remedy: str, only: str | tuple[str, ...] = ""
) -> None:
    """Load the parameters and buffers of a policy into a network.

    Args:
        network: whose parameters and buffers are overwritten; buffers that the policy lacks stay.
        saved: the policy.
        remedy: what to do if the network is another one, for the message.
        only: load only parameters and buffers whose name begins like this, or like one of these.

    Raises:
        UserError: the network has other parameters, or spectral normalization where the policy has none.
    """
    if spectral_layers(network) and not saved.config.network.spectral_norm:
        raise UserError(f"'{saved.path}' has no --spectral-norm, and the network has; {remedy}")
    kept = {name: buffer for name, buffer in network.state_buffers().items() if name in saved.parameters}
    every = {**dict(network.named_parameters()), **kept}
    own = {name: tensor for name, tensor in every.items() if name.startswith(only)}
    if saved.flat is not None:
        expected = sum(tensor.numel() for tensor in own.values())
        if only or saved.flat.size != expected:
            raise UserError(
                f"'{saved.path}' has {saved.flat.size:,} parameters, without names, and {expected:,} are needed; "
                f"{remedy}"
            )
        nn.utils.vector_to_parameters(torch.tensor(saved.flat), network.parameters())
        return
    theirs = {name: array for name, array in saved.parameters.items() if name.startswith(only)}
    for name in [*own, *theirs]:
        mine, its = _shape(own, name), _shape(theirs, name)
        if mine != its:
            raise UserError(f"'{saved.path}' has {its} as {name}, and the network has {mine}; {remedy}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(theirs[name]))


def _shape(tensors: Mapping[str, Any], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "nothing"
