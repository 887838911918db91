"""`hvdqn bench replay`: whether a large replay is as fast as a small one. One add and one sample, at two capacities.

Both rings are filled the way training fills them, with one step repeated: what is in an observation costs nothing. They
take turns, and all of the larger one is memory that must be there: 7 GB for a million Atari transitions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdqn.bench.report import Parser, print_table, write_json
from hvdqn.config import Config, check_engine, check_world, parse
from hvdqn.envs import Environments, Step, make_environments
from hvdqn.parts import make_replay
from hvdqn.replay import Replay

PROG = "hvdqn bench replay"
CALLS = 200
"""In one turn."""
TURNS = 20


@dataclass
class Filled:
    """A full replay, and what to add to it."""

    replay: Replay
    actions: np.ndarray
    step: Step
    batch: int

    def seconds(self) -> float:
        """Of one add and one sample, mean over a turn."""
        began = time.perf_counter()
        for _ in range(CALLS):
            self.replay.add(self.actions, self.step)
            self.replay.sample(self.batch)
        return (time.perf_counter() - began) / CALLS


def fill(config: Config, envs: Environments, capacity: int) -> Filled:
    """A full replay of this capacity.

    Raises:
        UserError: it is too small.
    """
    config = config.replace(replay_capacity=capacity)
    check_world(config, 1)
    replay = make_replay(config, 1, envs, np.random.default_rng(config.run.seed))
    replay.start(envs.reset())
    actions = np.zeros(envs.num_envs, np.int64)
    step = envs.step(actions)
    for _ in range(capacity // envs.num_envs + 1):
        replay.add(actions, step)
    return Filled(replay, actions, step, config.replay.batch_per_rank)


def measure(config: Config, capacities: Sequence[int]) -> dict[int, float]:
    """Seconds of one add and one sample by capacity, median over turns."""
    environment = config.environment
    envs = make_environments(environment, environment.envs_per_rank, config.run.seed, training=True)
    filled = {capacity: fill(config, envs, capacity) for capacity in capacities}
    envs.close()
    turns: dict[int, list[float]] = {capacity: [] for capacity in capacities}
    for _ in range(TURNS):
        for capacity in capacities:
            turns[capacity].append(filled[capacity].seconds())
    return {capacity: statistics.median(seconds) for capacity, seconds in turns.items()}


def main(argv: Sequence[str]) -> int:
    """The `hvdqn bench replay` command; returns the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-replay.json")
    parser.add_argument(
        "--capacities", type=int, nargs=2, default=(10_000, 1_000_000), metavar="N", help="to compare"
    )
    options, flags = parser.parse_known_args(argv)
    small, large = sorted(options.capacities)
    config = parse(flags, PROG)
    check_engine(config, "local", 1)
    seconds = measure(config, (small, large))
    ratio = seconds[large] / seconds[small]
    rows = [(f"{capacity:,}", f"{1e6 * value:,.1f}") for capacity, value in seconds.items()]
    print_table(f"Large over small: {ratio:.2f}", ("transitions", "add + sample, us"), rows)
    write_json(options.json, {"seconds": seconds, "ratio": ratio})
    return 0
