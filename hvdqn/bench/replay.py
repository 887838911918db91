"""`hvdqn bench replay`: compare the time of one add and one sample in a large replay with that in a small one.

Both replays are filled as in training, with one step repeated, since the content of an observation does not matter.
The measurements alternate. The larger replay must fit into memory: 7 GB for a million Atari transitions.
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
from hvdqn.role import Role

PROG = "hvdqn bench replay"
CALLS_PER_ROUND = 200
ROUNDS = 20


@dataclass
class FilledReplay:
    """A full replay for timing, with the actions and the `Step` that `time_round` adds again and again."""

    replay: Replay
    actions: np.ndarray
    step: Step
    batch: int

    def time_round(self) -> float:
        """Return the mean seconds of one add and one sample."""
        began = time.perf_counter()
        for _ in range(CALLS_PER_ROUND):
            self.replay.add(self.actions, self.step)
            self.replay.sample(self.batch)
        return (time.perf_counter() - began) / CALLS_PER_ROUND


def fill(config: Config, envs: Environments, capacity: int) -> FilledReplay:
    """Return a full replay of this capacity.

    Raises:
        UserError: the capacity is too small.
    """
    config = config.replace(replay_capacity=capacity)
    check_world(config, 1)
    replay = make_replay(config, Role(True, 0, 1), envs, np.random.default_rng(config.run.seed))
    replay.start(envs.reset())
    actions = np.zeros(envs.num_envs, np.int64)
    step = envs.step(actions)
    for _ in range(capacity // envs.num_envs + 1):
        replay.add(actions, step)
    return FilledReplay(replay, actions, step, config.replay.batch_per_rank)


def measure(config: Config, capacities: Sequence[int]) -> dict[int, float]:
    """Return the seconds of one add and one sample by capacity, the median over rounds."""
    environment = config.environment
    envs = make_environments(environment, environment.envs_per_rank, config.run.seed, training=True)
    replays = {capacity: fill(config, envs, capacity) for capacity in capacities}
    envs.close()
    times: dict[int, list[float]] = {capacity: [] for capacity in capacities}
    for _ in range(ROUNDS):
        for capacity in capacities:
            times[capacity].append(replays[capacity].time_round())
    return {capacity: statistics.median(seconds) for capacity, seconds in times.items()}


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn bench replay` command; return the exit code.

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
