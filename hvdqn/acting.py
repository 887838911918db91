"""How actions are chosen while training: greedily but for an epsilon of each environment, or from a softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdqn.config import ExplorationConfig
from hvdqn.envs import Environments, Step
from hvdqn.graphs import Record, Replayed
from hvdqn.networks import QNetwork


def linear_epsilon(config: ExplorationConfig, env_steps: int) -> float:
    """Epsilon after this many *global* env steps: a line from start to end, then flat (Mnih et al. 2015)."""
    if env_steps >= config.exploration_env_steps:
        return config.epsilon_end
    done = env_steps / config.exploration_env_steps
    return config.epsilon_start + done * (config.epsilon_end - config.epsilon_start)


def ladder(config: ExplorationConfig, envs: int) -> NDArray[np.float64]:
    """Epsilon of every environment of the job, falling (Horgan et al. 2018, Ape-X, appendix D). [envs].

    epsilon_i = epsilon ^ (1 + alpha i / (N - 1))
    """
    rungs: NDArray[np.float64] = config.ladder_epsilon ** (
        1 + config.ladder_alpha * np.arange(envs) / max(envs - 1, 1)
    )
    return rungs


class Epsilons:
    """Share of random actions in each environment of this rank, and in the job.

    Rungs of a ladder are dealt to the ranks in turn, environment i of the job to rank i mod size, so that every shard
    of replay is filled by greedy and by exploring environments alike.

    Args:
        config: which schedule.
        envs: environments of one rank.
        rank: this rank.
        size: ranks.
    """

    def __init__(self, config: ExplorationConfig, envs: int, rank: int, size: int) -> None:
        self.config, self.envs = config, envs
        self.greediest: NDArray[np.bool_] = np.zeros(envs, np.bool_)
        """This rank's environments among the greediest quarter of a ladder; none where all explore alike. [envs]."""
        self._rungs: NDArray[np.float64] | None = None
        self._mine: NDArray[np.float64] = np.zeros(envs)
        if config.exploration == "ladder":
            total = size * envs
            self._rungs = ladder(config, total)
            self._mine = self._rungs[rank::size]
            self.greediest = np.arange(total)[rank::size] >= total - max(total // 4, 1)

    def at(self, env_steps: int) -> NDArray[np.float64]:
        """Of each environment of this rank after this many global env steps. [envs]."""
        if self._rungs is None:
            epsilon = self.mean(env_steps)
            if epsilon != self._mine[0]:
                self._mine = np.full(self.envs, epsilon)
        return self._mine

    def mean(self, env_steps: int) -> float:
        """Of all environments of the job."""
        if self._rungs is not None:
            return float(self._rungs.mean())
        return 0.0 if self.config.exploration == "noisy" else linear_epsilon(self.config, env_steps)


class FrameStack:
    """The last `depth` frames of each environment, `[envs, depth, *frame]`; `[envs, *frame]` if depth is 1.

    An episode's first frame is repeated to fill its stack, as replay does when it stacks at sampling time.

    Args:
        first: the first frame of each.
        depth: frames of a stack.
        pinned: in pages from which a GPU copies by itself.
    """

    def __init__(self, first: NDArray[np.generic], depth: int, pinned: bool = False) -> None:
        self.depth = depth
        self.frames = np.repeat(first[:, None], depth, axis=1)
        if pinned:
            self.frames = torch.from_numpy(self.frames).pin_memory().numpy()

    def push(self, observation: NDArray[np.generic], fresh: NDArray[np.bool_]) -> None:
        """Add each environment's newest frame; begin anew where an episode did."""
        if self.depth > 1:
            self.frames[:, :-1] = self.frames[:, 1:]
        self.frames[:, -1] = observation
        if self.depth > 1 and fresh.any():
            self.frames[fresh] = observation[fresh][:, None]

    @property
    def observation(self) -> NDArray[np.generic]:
        """What the network sees."""
        return self.frames if self.depth > 1 else self.frames[:, 0]


def softmax_actions(q: NDArray[Any], temperature: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """An action for each environment, drawn from softmax(q / temperature), `[envs]`, given q `[envs, actions]`."""
    # The largest of q / temperature + Gumbel noise is such a draw, and needs no exponential of large numbers.
    actions: NDArray[np.int64] = (q.astype(np.float64) / temperature + rng.gumbel(size=q.shape)).argmax(
        axis=1
    )
    return actions


class RandomActions:
    """Replaces actions by random ones with probability epsilon, each environment's by a coin of its own.

    With `repeat` this is ez-greedy (Dabney et al. 2021, "Temporally-Extended Epsilon-Greedy Exploration"): each random
    action is taken n times, n from a zeta distribution, p(n) ~ n ** -repeat, or until its episode ends. Where single
    random actions cancel out, as on a slope that is climbed by going one way for long, it gets somewhere.

    Args:
        envs: environments of this rank.
        actions: number of actions.
        rng: of the coins, the actions and their lengths.
        repeat: exponent, above 1; 0: random actions last one step.
    """

    def __init__(self, envs: int, actions: int, rng: np.random.Generator, repeat: float = 0.0) -> None:
        self.actions, self.rng, self.repeat = actions, rng, repeat
        self.action: NDArray[np.int64] = np.zeros(envs, np.int64)
        self.left: NDArray[np.int64] = np.zeros(envs, np.int64)
        """How many times more the random `action` of each environment is to be taken. [envs]."""

    def replace(self, greedy: NDArray[np.int64], epsilon: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """What is done in place of the `greedy` actions `[envs]`, with epsilon of all environments or of each."""
        begun = self.rng.random(len(greedy)) < epsilon
        drawn = self.rng.integers(self.actions, size=len(greedy))
        if self.repeat == 0:
            return np.where(begun, drawn, greedy)
        begun &= self.left == 0
        lengths = self.rng.zipf(self.repeat, len(greedy))
        self.action, self.left = np.where(begun, drawn, self.action), np.where(begun, lengths, self.left)
        random = self.left > 0
        self.left -= random
        return np.where(random, self.action, greedy)

    def interrupt(self, fresh: NDArray[np.bool_]) -> None:
        """An episode began in these environments `[envs]`: what was to be repeated is over."""
        if self.repeat:
            self.left[fresh] = 0

    def state(self) -> dict[str, Any]:
        """Plain data to go on from."""
        return {"rng": self.rng.bit_generator.state, "action": self.action, "left": self.left}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.rng.bit_generator.state = state["rng"]
        self.action, self.left = state["action"].copy(), state["left"].copy()


class Actor:
    """Steps this rank's environments with the online network.

    Args:
        envs: this rank's environments, not reset yet.
        network: the online network.
        frame_stack: frames that make one observation.
        rng: of exploration.
        device: where the network lives.
        temperature: of the softmax from which actions are drawn; 0: the greedy ones.
        repeat: of random actions, as `RandomActions` takes it.
        record: how the network's passes are recorded and replayed; None: they are not.
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
    ) -> None:
        self.envs, self.network, self.frame_stack = envs, network, frame_stack
        self.rng, self.device, self.temperature = rng, device, temperature
        self.q_values = Replayed(self._q_values, record, device) if record else self._q_values
        self.random = RandomActions(envs.num_envs, envs.num_actions, rng, repeat)

    def start(self) -> NDArray[np.generic]:
        """Begin an episode in every environment; return the first observations."""
        first = self.envs.reset()
        self.frames = self._stack(first)
        self.random.interrupt(np.ones(self.envs.num_envs, np.bool_))
        return first

    def choose(self, epsilon: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """Actions of all environments, `[envs]`, random with probability epsilon: of all, or of each `[envs]`."""
        (q_values,) = self.q_values(torch.from_numpy(self.frames.observation))
        q: NDArray[Any] = q_values.cpu().numpy()  # from a GPU, which the CPU waits for here
        chosen = softmax_actions(q, self.temperature, self.rng) if self.temperature > 0 else q.argmax(axis=1)
        return self.random.replace(chosen, epsilon)

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Take one env step in every environment."""
        self.send(actions)
        return self.receive()

    def send(self, actions: NDArray[np.int64]) -> None:
        """Begin one; environments that run beside this thread work from here on."""
        self.envs.send(actions)

    def receive(self) -> Step:
        """Finish what `send` began."""
        step = self.envs.receive()
        self.frames.push(step.observation, step.fresh)
        self.random.interrupt(step.fresh)
        return step

    def state(self) -> dict[str, Any]:
        """Plain data to go on from; `environments` is None where theirs cannot be had."""
        return {
            "random": self.random.state(),
            "frames": self.frames.frames,
            "environments": self.envs.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> bool:
        """Go on where `state` was taken; False where environments have to `start` anew."""
        self.random.load_state(state["random"])
        if state["environments"] is None:
            return False
        try:
            self.envs.load_state(state["environments"])
        except ValueError:  # such as another version of the environment
            return False
        self.frames = self._stack(state["frames"][:, 0])
        self.frames.frames[:] = state["frames"]
        return True

    def _stack(self, first: NDArray[np.generic]) -> FrameStack:
        return FrameStack(first, self.frame_stack, pinned=self.device.type == "cuda")

    def _q_values(self, observation: Tensor) -> tuple[Tensor]:
        with torch.inference_mode():
            return (self.network.q_values(observation.to(self.device, non_blocking=True)),)
