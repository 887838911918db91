"""`hvdqn bench gpu`: all that is promised of a GPU, in one go.

    hvdqn bench gpu              samples learned per second, and how far the GPU's updates are from the CPU's: minutes
    hvdqn bench gpu --pong       and the minutes until Pong is played at 18, with 16 cores for environments

Samples are learned from replay alone, without environments. Each of the GPU's updates is compared with the CPU's of the
same weights and minibatch, in float32 without TF32.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdqn.bench.jobs import bench
from hvdqn.bench.report import Parser, Row, one_or_more, print_goals, write_json
from hvdqn.comm import connect
from hvdqn.config import Config, check_engine, check_world, parse
from hvdqn.metrics import PhaseTimer, number
from hvdqn.parts import Parts, build_parts, device_kind
from hvdqn.replay import Batch
from hvdqn.trailer import REPORTED

PROG = "hvdqn bench gpu"
WORKLOAD = (
    "--preset", "atari", "--env", "ALE/Pong-v5", "--device", "cuda", "--replay-capacity", "100000",
    "--batch-per-rank", "512",
)  # fmt: skip
# `pong` as four ranks play it, in one process; but it stops exploring sooner and learns faster: on a CPU it was at 18
# after 250k env steps so, and at 11 after 400k as the preset has it (seed 1). Where nothing is left to chance a player
# of some strength may repeat one rally for ever: hence evaluations with the epsilon of Dopamine (Castro et al. 2018).
PONG = (
    "--preset", "pong", "--device", "cuda", "--precision", "bf16", "--cuda-graphs", "--envs-per-rank", "32",
    "--batch-per-rank", "128", "--lr-reference-batch", "32", "--lr", "2.1e-4", "--exploration-env-steps", "50000",
    "--total-env-steps", "500000", "--eval-episodes", "16", "--eval-epsilon", "0.001",
)  # fmt: skip
WAYS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, replay in the host's memory": {"precision": "bf16", "replay_device": "cpu"},
    "fp32, CUDA graphs": {"precision": "fp32", "cuda_graphs": True},
    "bf16, CUDA graphs": {"precision": "bf16", "cuda_graphs": True},
}
UPDATES_COMPARED = 100
REPORT = (0.0,) * len(REPORTED)


def built(config: Config) -> Parts:
    """One process's parts, with enough replay filled to draw from."""
    parts = build_parts(config, connect("local"), PhaseTimer())
    parts.replay.start(parts.actor.start())
    for _ in range(4 * config.replay.batch_per_rank // config.environment.envs_per_rank + 16):
        actions = parts.actor.choose(1.0)
        parts.replay.add(actions, parts.actor.step(actions))
    return parts


def samples_per_second(config: Config, updates: int) -> float:
    """Transitions learned from per second: sampling, update and all."""
    parts, batch = built(config), config.replay.batch_per_rank

    def learn(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            parts.learner.begin_update(parts.replay.sample(batch), REPORT)
            parts.learner.finish_update()
        if parts.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    learn(max(updates // 10, 1))
    seconds = learn(updates)
    parts.envs.close()
    return updates * batch / seconds


def largest_errors(config: Config, updates: int) -> Iterator[tuple[str, float, float]]:
    """Relative errors of loss and gradient against the CPU, the largest of so many updates, without and with graphs.

    Before each update the GPU is given the CPU's weights: on steps of their own the two would part, as any two would
    of which one rounds otherwise.
    """
    config = config.replace(precision="fp32", cuda_graphs=False)
    sides = {"": built(config)}
    if device_kind(config) == "cuda":
        sides[", CUDA graphs"] = built(config.replace(cuda_graphs=True))
    # Last, for with it come as many threads as there are cores, and with the others one.
    host = built(config.replace(device="cpu"))
    errors = {name: np.zeros(2) for name in sides}
    for _ in range(updates):
        batch = host.replay.sample(config.replay.batch_per_rank)
        for side in sides.values():
            side.learner.load_state(host.learner.state())
        loss, gradient = learned(host, batch)
        for name, side in sides.items():
            found, its_gradient = learned(side, batch)
            away = torch.linalg.vector_norm(its_gradient - gradient) / torch.linalg.vector_norm(gradient)
            errors[name] = np.maximum(errors[name], (abs(found - loss) / abs(loss), float(away)))
    for side in (host, *sides.values()):
        side.envs.close()
    return ((name, *found.tolist()) for name, found in errors.items())


def learned(side: Parts, batch: Batch) -> tuple[float, Tensor]:
    """Take an update; its loss and its gradient, on the host."""
    side.learner.begin_update(batch, REPORT)
    gradient = side.learner.gradient.cpu().clone()
    side.learner.finish_update()
    return side.learner.drain()["loss"], gradient


def measure(config: Config, updates: int) -> Iterator[Row]:
    """What one GPU is to reach, Pong aside."""
    batch, on_gpu = config.replay.batch_per_rank, device_kind(config) == "cuda"
    for name, settings in WAYS.items():
        if on_gpu or not settings.get("cuda_graphs"):
            rate = samples_per_second(config.replace(**settings), updates)
            goal = None if settings.get("replay_device") == "cpu" else 80_000
            yield Row(f"samples/s learned, batch {batch}, {name}", "", (rate,), goal)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for name, *found in largest_errors(config, min(updates, UPDATES_COMPARED)):
        for what, error in zip(("loss", "gradient"), found, strict=True):
            yield Row(f"{what}, relative error against the CPU{name}", "", (error,), 1e-3, at_most=True)
    torch.backends.cudnn.allow_tf32 = allowed


def pong() -> Iterator[Row]:
    """Wall time until Pong is solved, start and evaluations included; infinite if it is not."""
    began = time.perf_counter()
    # Seldom: games between equals are long, and an evaluation takes as long as 80,000 env steps of training.
    found = bench(["solve", "--goal", "18", "--every", "100000", *PONG])
    minutes = (time.perf_counter() - began) / 60 if found["solved"] else float("inf")
    yield Row("minutes until Pong is played at 18", "", (minutes,), 5.0, at_most=True)


def main(argv: Sequence[str]) -> int:
    """The `hvdqn bench gpu` command; returns the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-gpu.json")
    parser.add_argument("--pong", action="store_true", help="train Pong too: minutes to an hour")
    parser.add_argument("--updates", type=one_or_more, default=2_000, help="to time")
    options, flags = parser.parse_known_args(argv)
    config = parse([*WORKLOAD, *flags], PROG)
    check_engine(config, "local", 1)
    check_world(config, 1)
    device_kind(config)
    rows = []
    try:
        for row in itertools.chain(measure(config, options.updates), pong() if options.pong else ()):
            print(f"{row.what}: {number(row.median)}", file=sys.stderr, flush=True)  # it takes minutes
            rows.append(row)
    finally:  # what was measured stays where what comes after it fails
        print_goals(
            "GPU" if config.parallel.device == "cuda" else "CPU, where these goals mean nothing", rows
        )
        write_json(options.json, {"rows": [row.as_json() for row in rows]})
    return 0
