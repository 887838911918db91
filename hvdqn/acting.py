"""Choose actions while training: epsilon-greedy, with one epsilon per environment, or from a softmax of Q-values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdqn.config import ExplorationConfig
from hvdqn.envs import Environments, Step, draw_legal
from hvdqn.graphs import Record, Recorded
from hvdqn.networks import Normalize, QNetwork, make_passes
from hvdqn.step import Bools


def linear_epsilon(config: ExplorationConfig, env_steps: int) -> float:
    """Return epsilon after this many *global* env steps: it changes linearly, then stays (Mnih et al. 2015)."""
    if env_steps >= config.exploration_env_steps:
        return config.epsilon_end
    done = env_steps / config.exploration_env_steps
    return config.epsilon_start + done * (config.epsilon_end - config.epsilon_start)


def ladder(config: ExplorationConfig, envs: int) -> NDArray[np.float64]:
    """Return a constant epsilon for each environment of the job, largest first (Horgan et al. 2018, Ape-X) [envs].

    epsilon_i = epsilon ^ (1 + alpha i / (N - 1))
    """
    rungs: NDArray[np.float64] = config.ladder_epsilon ** (
        1 + config.ladder_alpha * np.arange(envs) / max(envs - 1, 1)
    )
    return rungs


class Epsilons:
    """Computes epsilon, the share of random actions, for each environment of this rank.

    With `--exploration ladder` every environment of the job has its own epsilon: see `ladder`. The acting ranks get
    them in turn, number i goes to rank i mod `of`. So every rank's replay holds transitions of greedy and of exploring
    environments.

    Args:
        config: the settings of the schedule.
        envs: number of environments of one rank.
        index: the number of this rank among the acting ranks.
        of: number of acting ranks.
    """

    def __init__(self, config: ExplorationConfig, envs: int, index: int, of: int) -> None:
        self.config, self.envs = config, envs
        self.greediest: NDArray[np.bool_] = np.zeros(envs, np.bool_)
        """True for environments of this rank with an epsilon in the smallest quarter of a ladder [envs]."""
        self._rungs: NDArray[np.float64] | None = None
        self._mine: NDArray[np.float64] = np.zeros(envs)
        if config.exploration == "ladder":
            total = of * envs
            self._rungs = ladder(config, total)
            self._mine = self._rungs[index::of]
            self.greediest = np.arange(total)[index::of] >= total - max(total // 4, 1)

    def at(self, env_steps: int) -> NDArray[np.float64]:
        """Return epsilon for each environment of this rank after this many global env steps [envs]."""
        if self._rungs is None:
            epsilon = self.mean(env_steps)
            if epsilon != self._mine[0]:
                self._mine = np.full(self.envs, epsilon)
        return self._mine

    def mean(self, env_steps: int) -> float:
        """Return the mean epsilon over all environments of the job after this many global env steps."""
        if self._rungs is not None:
            return float(self._rungs.mean())
        return 0.0 if self.config.exploration == "noisy" else linear_epsilon(self.config, env_steps)


class FrameStack:
    """Holds the last `depth` frames of each environment, the input of the network for acting.

    An episode's first frame fills its whole stack, as it does in minibatches from replay.

    Args:
        first: the first frame of each environment `[envs, *frame]`.
        depth: number of frames in a stack.
        pinned: whether to keep the frames in pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(self, first: NDArray[np.generic], depth: int, pinned: bool = False) -> None:
        self.depth = depth
        self.frames = np.repeat(first[:, None], depth, axis=1)
        if pinned:
            self.frames = torch.from_numpy(self.frames).pin_memory().numpy()

    def push(self, observation: NDArray[np.generic], fresh: NDArray[np.bool_]) -> None:
        """Add each environment's newest frame `[envs, *frame]`; fill the whole stack with it where `fresh` `[envs]`."""
        if self.depth > 1:
            self.frames[:, :-1] = self.frames[:, 1:]
        self.frames[:, -1] = observation
        if self.depth > 1 and fresh.any():
            self.frames[fresh] = observation[fresh][:, None]

    @property
    def observation(self) -> NDArray[np.generic]:
        """The input of the network: `[envs, depth, *frame]`, or `[envs, *frame]` if depth is 1."""
        return self.frames if self.depth > 1 else self.frames[:, 0]


def greedy_actions(q: NDArray[Any], mask: Bools | None = None) -> NDArray[np.int64]:
    """Return the best legal action of each environment, `[envs, *action_shape]`.

    Args:
        q: `[envs, *action_shape, actions]`.
        mask: legal actions, of the same shape; None: all are legal.
    """
    actions: NDArray[np.int64] = (q if mask is None else _legal(q, mask)).argmax(axis=-1)
    return actions


def softmax_actions(
    q: NDArray[Any], temperature: float, rng: np.random.Generator, mask: Bools | None = None
) -> NDArray[np.int64]:
    """Draw a legal action for each environment from softmax(q / temperature); shapes as in `greedy_actions`.

    With several dimensions q is the mean of theirs, so that each is drawn from softmax(q / (dimensions temperature)).
    """
    temperature *= q.shape[1] if q.ndim == 3 else 1
    # The argmax of q / temperature + Gumbel noise is distributed like this, and needs no exponential of large numbers.
    return greedy_actions(q.astype(np.float64) / temperature + rng.gumbel(size=q.shape), mask)


def _legal(q: NDArray[Any], mask: Bools) -> NDArray[Any]:
    """Return q with -inf at illegal actions. A legal action that has -inf itself is lifted above them."""
    return np.where(mask, np.maximum(q, np.finfo(q.dtype).min), -np.inf)


class RandomActions:
    """Replaces actions by random ones with probability epsilon, independently in each environment.

    With `repeat` this is ez-greedy (Dabney et al. 2021, "Temporally-Extended Epsilon-Greedy Exploration"): each random
    action is taken n times or until its episode ends, where n is drawn from a zeta distribution, p(n) ~ n ** -repeat.
    It explores further where single random actions cancel out, as in MountainCar.

    A random action is one of the legal ones, and is not repeated where it is illegal. With several dimensions all of
    them are random at once.

    Args:
        envs: number of this rank's environments.
        actions: number of actions, in each dimension.
        rng: generator of all random draws.
        repeat: the exponent above, larger than 1; 0: random actions last one step.
        shape: of the action of one environment: `()`, or `(dimensions,)`.
    """

    def __init__(
        self,
        envs: int,
        actions: int,
        rng: np.random.Generator,
        repeat: float = 0.0,
        shape: tuple[int, ...] = (),
    ) -> None:
        self.actions, self.rng, self.repeat = actions, rng, repeat
        self.action: NDArray[np.int64] = np.zeros((envs, *shape), np.int64)
        self.left: NDArray[np.int64] = np.zeros(envs, np.int64)
        """How many more times each environment will take its random `action` [envs]."""

    def replace(
        self,
        greedy: NDArray[np.int64],
        epsilon: float | NDArray[np.float64],
        mask: Bools | None = None,
    ) -> NDArray[np.int64]:
        """Return the actions `greedy` with some replaced by random ones.

        Args:
            greedy: `[envs, *shape]`.
            epsilon: probability of a random action; a number or `[envs]`.
            mask: legal actions `[envs, *shape, actions]`; None: all are legal.
        """
        begun = self.rng.random(len(greedy)) < epsilon
        drawn = (
            self.rng.integers(self.actions, size=greedy.shape) if mask is None else draw_legal(self.rng, mask)
        )
        if self.repeat == 0:
            return np.where(begun if greedy.ndim == 1 else begun[:, None], drawn, greedy)
        if mask is not None:
            self.left[~_are_legal(self.action, mask)] = 0
        begun &= self.left == 0
        lengths = self.rng.zipf(self.repeat, len(greedy))
        self.action = np.where(_like(begun, drawn), drawn, self.action)
        self.left = np.where(begun, lengths, self.left)
        random = self.left > 0
        self.left -= random
        return np.where(_like(random, greedy), self.action, greedy)

    def interrupt(self, fresh: NDArray[np.bool_]) -> None:
        """Stop repeating random actions in the environments where a new episode began: `fresh` `[envs]`."""
        if self.repeat:
            self.left[fresh] = 0

    def state(self) -> dict[str, Any]:
        """Return the generator's state and the repeated actions, as plain data for a checkpoint."""
        return {"rng": self.rng.bit_generator.state, "action": self.action, "left": self.left}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the generator's state and the repeated actions that `state` returned."""
        self.rng.bit_generator.state = state["rng"]
        self.action, self.left = state["action"].copy(), state["left"].copy()


def _are_legal(actions: NDArray[np.int64], mask: Bools) -> Bools:
    """Return True where all dimensions of an environment's action are legal, `[envs]`."""
    legal = np.take_along_axis(mask, actions[..., None], axis=-1).reshape(len(actions), -1)
    return np.asarray(legal.all(axis=1))


def _like(flags: Bools, actions: NDArray[np.int64]) -> Bools:
    """Return flags `[envs]` in a shape that broadcasts with actions `[envs, *shape]`."""
    return flags.reshape(-1, *(1 for _ in actions.shape[1:]))


class Actor:
    """Chooses actions by the online network, and steps this rank's environments.

    Args:
        envs: this rank's environments, not reset yet.
        network: the online network.
        frame_stack: number of consecutive frames that make one network input.
        rng: generator of exploration.
        device: the network's device.
        temperature: temperature of the softmax from which actions are drawn; 0: greedy actions.
        repeat: the exponent in `RandomActions`.
        record: records the network's forward pass as a CUDA graph; None: do not record it.
        normalize: collects the observations of training; None: they are not collected.
    """

    def __init__(
        self,
        envs: Environments,
        network: QNetwork,
        frame_stack: int,
        rng: np.random.Generator,
        device: torch.device,
        temperature: float = 0.0,
        repeat: float = 0.0,
        record: Record | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        self.envs, self.frame_stack, self.normalize = envs, frame_stack, normalize
        self.passes = make_passes(network)
        self.rng, self.device, self.temperature = rng, device, temperature
        self.q_values = Recorded(self._q_values, record, device) if record else self._q_values
        self.random = RandomActions(envs.num_envs, envs.num_actions, rng, repeat, envs.action_shape)

    def set_network(self, network: QNetwork) -> None:
        """Act with this network from now on. Call it also when the network's parameters moved to other memory."""
        self.passes = make_passes(network)

    def start(self, seed: int | None = None) -> NDArray[np.generic]:
        """Reset every environment, with new seeds if one is given.

        Returns:
            The first observations `[envs, *shape]`, without frame stack.
        """
        first = self.envs.reset(seed)
        if self.normalize is not None:
            self.normalize.observe(first)
        self.frames = self._stack(first)
        self.random.interrupt(np.ones(self.envs.num_envs, np.bool_))
        return first

    def choose(self, epsilon: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """Return actions for all environments, by Q-values or, with probability `epsilon`, random ones.

        `epsilon` is a number or `[envs]`; the actions are `[envs, *action_shape]`.
        """
        (q_values,) = self.q_values(torch.from_numpy(self.frames.observation))
        q: NDArray[Any] = q_values.cpu().numpy()  # the host waits for a GPU here
        mask = self.envs.action_mask
        if self.temperature > 0:
            chosen = softmax_actions(q, self.temperature, self.rng, mask)
        else:
            chosen = greedy_actions(q, mask)
        return self.random.replace(chosen, epsilon, mask)

    def values(self, observation: NDArray[Any] | Tensor, mask: Bools | None = None) -> NDArray[np.float32]:
        """Return the Q-value of each observation's best legal action `[batch]`, the mean over the action's dimensions.

        Args:
            observation: inputs of the network `[batch, ...]`.
            mask: legal actions `[batch, *action_shape, actions]`; None: all are legal.
        """
        q: NDArray[Any] = self._q_values(torch.as_tensor(observation))[0].float().cpu().numpy()
        best = np.take_along_axis(q, greedy_actions(q, mask)[..., None], axis=-1)
        values: NDArray[np.float32] = best.reshape(len(q), -1).mean(axis=1)
        return values

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Take one env step in every environment, with these actions `[envs]`."""
        self.send(actions)
        return self.receive()

    def send(self, actions: NDArray[np.int64]) -> None:
        """Begin an env step with these actions `[envs]`; environments in other threads or processes start to work."""
        self.envs.send(actions)

    def receive(self) -> Step:
        """Wait for the env step that `send` began, add its frames to the stacks, and return it."""
        step = self.envs.receive()
        if self.normalize is not None:
            self.normalize.observe(step.next_observation[step.valid])
            self.normalize.observe(step.observation[step.fresh])
        self.frames.push(step.observation, step.fresh)
        self.random.interrupt(step.fresh)
        return step

    def state(self) -> dict[str, Any]:
        """Return plain data for a checkpoint; the state of environments that cannot be saved is None.

        `observed` are those observations that are in no statistics yet; None if observations are not normalized.
        """
        return {
            "random": self.random.state(),
            "frames": self.frames.frames,
            "environments": self.envs.state(),
            "observed": self.normalize.state() if self.normalize else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> bool:
        """Restore what `state` returned; return False if environments must begin new episodes (call `start`)."""
        self.random.load_state(state["random"])
        if self.normalize is not None:
            self.normalize.load_state(state["observed"])
        if state["environments"] is None:
            return False
        try:
            self.envs.load_state(state["environments"])
        except ValueError:  # for example, the environment has another version
            return False
        self.frames = self._stack(state["frames"][:, 0])
        self.frames.frames[:] = state["frames"]
        return True

    def _stack(self, first: NDArray[np.generic]) -> FrameStack:
        return FrameStack(first, self.frame_stack, self.passes.pinned_inputs)

    def _q_values(self, observation: Tensor) -> tuple[Tensor]:
        with torch.inference_mode():
            return (self.passes.q_values(observation.to(self.device, non_blocking=True)),)
