"""A trained policy as a Python object. It needs no launcher, no MPI, and not even its environment.

policy = hvdqn.load("runs/cartpole")
action = policy.act(observation)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from hvdqn.acting import FrameStack, greedy_actions
from hvdqn.checkpoint import SavedPolicy, load_parameters, policy_part, read_policy, write_part
from hvdqn.config import Config
from hvdqn.envs import ACTION_MASK, Spaces, make_actions, make_environments, make_space, split_mask, to_inputs
from hvdqn.errors import UserError
from hvdqn.networks import QNetwork, make_passes
from hvdqn.parts import network_for
from hvdqn.paths import absolute
from hvdqn.step import Bools
from hvdqn.trust import check_trust, code_to_import


class Policy:
    """A trained network that acts greedily on observations of its environment.

    Observations are those that the environment returns, after the `--wrapper` of the run: arrays, dicts, tuples or
    numbers. All methods take one observation, or a batch of them as a vector environment returns it.

    With a frame stack, a policy remembers the last frames of each environment: row i of a batch is environment i, a
    single observation is environment 0. Call `reset` when an episode begins.

    Args:
        network: in evaluation mode from now on.
        config: settings of the run.
        spaces: of its environments.
        env_steps: for which it was trained.
        device: of the network.

    Attributes:
        observation_space: of the environment, without bounds and without action masks.
        actions: its action space.
    """

    def __init__(
        self, network: QNetwork, config: Config, spaces: Spaces, env_steps: int, device: torch.device
    ) -> None:
        self.config, self.spaces, self.env_steps, self.device = config, spaces, env_steps, device
        self.network = network.to(device).eval()
        self.observation_space = make_space(spaces.observation_space)
        self.actions = make_actions(spaces, config.environment.env, config.environment.action_bins)
        self._passes = make_passes(self.network)
        self._stack: FrameStack | None = None
        self._fresh: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def act(self, observation: Any, action_mask: Any = None) -> int | NDArray[Any]:
        """Return the greedy action of the environment; of a batch, the actions `[batch, ...]`.

        Args:
            observation: one, or a batch.
            action_mask: 1 or True for the actions that are allowed: `[actions]`, or `[batch, actions]`; those of all
                dimensions in a row. By default it is taken from a Dict observation that has an `action_mask`.

        Raises:
            UserError: the observation or the mask does not fit.
        """
        inputs, alone, own_mask = self._read(observation)
        mask = self._read_mask(own_mask if action_mask is None else action_mask, len(inputs))
        q = self._values(self._stacked(inputs, remember=True))
        actions = self.actions.to_environment(greedy_actions(q, mask))
        if not alone:
            return actions
        return actions[0] if self.actions.space_shape else int(actions[0])

    def q_values(self, observation: Any) -> NDArray[np.float32]:
        """Return the expected return of each action, `[actions]`; of a batch, `[batch, actions]`.

        With several dimensions they are `[dimensions, actions]`, without meaning where a dimension has fewer actions.

        The frame stacks do not change: to have the values of an observation and act on it, call this before `act`.

        Raises:
            UserError: the observation does not fit.
        """
        inputs, alone, _ = self._read(observation)
        q = self._values(self._stacked(inputs, remember=False))
        return q[0] if alone else q

    @property
    def is_stacked(self) -> bool:
        """Whether an input of the network has several frames."""
        return self.config.environment.frame_stack > 1

    def reset(self, env_index: int | None = None) -> None:
        """Begin an episode: forget the frames of one environment of a batch, or of all.

        Without a frame stack there is nothing to forget.

        Raises:
            IndexError: there is no such environment.
        """
        if env_index is None:
            self._stack = None
        elif self._stack is not None:
            self._fresh[env_index] = True

    def save(self, path: str | Path) -> None:
        """Write the policy to a file that `hvdqn.load` reads, by convention `NAME.safetensors`.

        Raises:
            OSError: the file cannot be written.
        """
        write_part(absolute(path), policy_part(self.network, self.config, self.spaces, self.env_steps))

    def _stacked(self, inputs: NDArray[Any], remember: bool) -> NDArray[Any]:
        """Return inputs `[batch, *shape]` and the frames before them `[batch, depth, *shape]`, if there is a stack."""
        depth = self.config.environment.frame_stack
        if depth == 1:
            return inputs
        known = self._stack
        if known is not None and len(known.frames) != len(inputs):
            raise UserError(
                f"the policy has the frames of {len(known.frames)} environments and got {len(inputs)} observations; "
                "call reset() first"
            )
        stack = FrameStack(inputs, depth)
        if known is not None:
            stack.frames[:] = known.frames
            stack.push(inputs, self._fresh)
        if remember:
            self._stack, self._fresh = stack, np.zeros(len(inputs), np.bool_)
        return stack.observation

    def _values(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        with torch.inference_mode():
            q = self._passes.q_values(torch.from_numpy(np.ascontiguousarray(inputs)).to(self.device))
        values: NDArray[np.float32] = q.cpu().numpy().copy()  # passes reuse their memory
        return values

    def _read(self, observation: Any) -> tuple[NDArray[Any], bool, Any]:
        """Return inputs `[batch, *shape]`, whether it was a single observation, and the mask in it or None."""
        mask, space = None, self.observation_space
        masked = isinstance(observation, Mapping) and len(observation) > 1 and ACTION_MASK in observation
        if masked and not (isinstance(space, gym.spaces.Dict) and ACTION_MASK in space.spaces):
            observation, mask = split_mask(observation)
        return *to_inputs(self.spaces, space, observation), mask

    def _read_mask(self, action_mask: Any, batch: int) -> Bools | None:
        """Return the actions that are allowed `[batch, *action_shape, actions]`; None if all are."""
        if action_mask is None:
            exists = self.actions.exists
            return None if exists is None else np.broadcast_to(exists, (batch, *exists.shape))
        try:
            mask = self.actions.read_masks(action_mask, batch)
        except UserError:
            try:
                mask = self.actions.read_masks(action_mask)
            except UserError:
                raise UserError(
                    f"the action mask does not fit: the policy takes [{self.actions.total}] booleans or numbers 0 and "
                    f"1, or a mask for each of {batch} observations"
                ) from None
        if not mask.any(axis=-1).all():
            raise UserError("an action mask allows no action; at least one must be")
        return np.broadcast_to(mask, (batch, *self.actions.shape, self.actions.count))


def load(path: str | Path, trust: bool = False, device: str | torch.device = "cpu") -> Policy:
    """Load the policy of a run directory (its newest), of a checkpoint such as `RUN/checkpoints/best`, or of a file.

    Args:
        path: of the run, the checkpoint or the policy file.
        trust: import the code that the run names, which is its own `--torso`. Without it such a run is refused.
        device: where the network computes.

    Raises:
        UserError: there is no policy, or it is broken, or it names code that is not trusted.
    """
    return load_trusted(Path(path), trust, (), "load it with trust=True if you trust whoever made it", device)


def load_trusted(
    path: Path, trust: bool, repeated: Sequence[str], remedy: str, device: str | torch.device = "cpu"
) -> Policy:
    """Do the same as `load`, for a command; `check_trust` explains `repeated` and `remedy`."""
    saved = read_policy(absolute(path))
    found = code_to_import(saved.config, torso_only=saved.spaces is not None)
    check_trust(path, found, trust, repeated, remedy)
    if saved.spaces is None:
        message = f"'{path}' is of version 0.1: save() its policy to have a file that later versions read"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    return make_policy(saved, torch.device(device))


def make_policy(saved: SavedPolicy, device: torch.device) -> Policy:
    """Return the policy that was read from disk. What it names must be trusted.

    Raises:
        UserError: its network cannot be made, or has other parameters.
    """
    config, spaces = saved.config, saved.spaces
    if spaces is None:  # version 0.1 did not keep them
        envs = make_environments(config.environment, 1, 0, training=False)
        spaces = envs.spaces
        envs.close()
    with torch.random.fork_rng(devices=[]):
        network = network_for(config, spaces)
    load_parameters(network, saved, "its torso has changed since")
    return Policy(network, config, spaces, saved.env_steps, device)
