"""`hvdqn bench gpu`: measure the speed and the accuracy of a GPU.

    hvdqn bench gpu              samples learned per second, and the difference between the GPU's and the CPU's updates
    hvdqn bench gpu --pong       also the minutes until Pong is solved, best with 16 cores for the environments

Samples per second are measured by learning from replay alone, without environments. Each update of the GPU is compared
with the CPU's update from the same weights and minibatch, in float32 without TF32.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hvdqn.bench.jobs import run_bench_job
from hvdqn.bench.report import Parser, Row, one_or_more, print_goals, print_message, write_json
from hvdqn.bench.training import (
    acting_parts,
    build_filled_parts,
    copy_learner,
    synchronize,
    update,
    update_and_return_gradient,
)
from hvdqn.config import Config, check_engine, check_world, parse
from hvdqn.devices import device_kind
from hvdqn.metrics import number
from hvdqn.rank import Parts

PROG = "hvdqn bench gpu"
WORKLOAD = (
    "--preset", "atari", "--env", "ALE/Pong-v5", "--device", "cuda", "--replay-capacity", "100000",
    "--batch-per-rank", "512",
)  # fmt: skip
# The preset `pong` as four ranks would run it, in one process, with a shorter exploration and a higher learning rate.
# A greedy policy can repeat one rally for ever, so evaluations use the epsilon of Dopamine (Castro et al. 2018).
PONG = (
    "--preset", "pong", "--device", "cuda", "--precision", "bf16", "--cuda-graphs", "--envs-per-rank", "32",
    "--batch-per-rank", "128", "--lr-reference-batch", "32", "--lr", "2.1e-4", "--exploration-env-steps", "50000",
    "--total-env-steps", "500000", "--eval-episodes", "16", "--eval-epsilon", "0.001",
)  # fmt: skip
# Evaluations are rare because one takes as long as 80,000 env steps of training: games between equals are long.
PONG_EVALUATE_EVERY = 100_000
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, replay in the host's memory": {"precision": "bf16", "replay_device": "cpu"},
    "fp32, CUDA graphs": {"precision": "fp32", "cuda_graphs": True},
    "bf16, CUDA graphs": {"precision": "bf16", "cuda_graphs": True},
}
UPDATES_COMPARED = 100


def build_parts_for_learning(config: Config) -> Parts:
    """Build the parts of one process, with enough transitions in replay for a few minibatches."""
    replay, envs = config.replay, config.environment.envs_per_rank
    return build_filled_parts(config, 4 * replay.batch_per_rank // envs + 16)


def samples_per_second(config: Config, updates: int) -> float:
    """Return how many transitions are learned from per second, sampling included."""
    parts, batch_size = build_parts_for_learning(config), config.replay.batch_per_rank

    def time_updates(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            update(parts, acting_parts(parts).replay.sample(batch_size))
        synchronize(parts)
        return time.perf_counter() - began

    time_updates(max(updates // 10, 1))  # warm up
    seconds = time_updates(updates)
    acting_parts(parts).envs.close()
    return updates * batch_size / seconds


def largest_errors(config: Config, updates: int) -> dict[str, tuple[float, float]]:
    """Return the largest relative errors of loss and gradient against the CPU, without and with CUDA graphs.

    Before each update the GPU gets the CPU's weights. Otherwise rounding would make the weights diverge, as it does on
    any two machines.

    Args:
        config: the settings of the device to compare with the CPU.
        updates: the number of updates to compare.
    """
    config = config.replace(precision="fp32", cuda_graphs=False)
    compared = {"": build_parts_for_learning(config)}
    if device_kind(config) == "cuda":
        compared[", CUDA graphs"] = build_parts_for_learning(config.replace(cuda_graphs=True))
    # The CPU's parts are built last: they set the number of threads to that of the cores, the GPU's set it to one.
    cpu = build_parts_for_learning(config.replace(device="cpu"))
    errors = {name: np.zeros(2) for name in compared}
    for _ in range(updates):
        batch = acting_parts(cpu).replay.sample(config.replay.batch_per_rank)
        for parts in compared.values():
            copy_learner(cpu, parts)
        expected_loss, expected = update_and_return_gradient(cpu, batch)
        for name, parts in compared.items():
            loss, gradient = update_and_return_gradient(parts, batch)
            error = torch.linalg.vector_norm(gradient - expected) / torch.linalg.vector_norm(expected)
            loss_error = abs(loss - expected_loss) / abs(expected_loss)
            errors[name] = np.maximum(errors[name], (loss_error, float(error)))
    for parts in (cpu, *compared.values()):
        acting_parts(parts).envs.close()
    return {name: (float(largest[0]), float(largest[1])) for name, largest in errors.items()}


def measure(config: Config, updates: int) -> Iterator[Row]:
    """Measure the samples learned per second, and how far the updates differ from the CPU's.

    Args:
        config: the settings of the learner.
        updates: how many updates to time and to compare.

    Yields:
        One row for each measurement, with its goal.
    """
    batch_size, on_gpu = config.replay.batch_per_rank, device_kind(config) == "cuda"
    for name, settings in VARIANTS.items():
        if on_gpu or not settings.get("cuda_graphs"):
            rate = samples_per_second(config.replace(**settings), updates)
            goal = None if settings.get("replay_device") == "cpu" else 80_000
            yield Row(f"samples/s learned, batch {batch_size}, {name}", "", (rate,), goal)
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    errors = largest_errors(config, min(updates, UPDATES_COMPARED))
    torch.backends.cudnn.allow_tf32 = allow_tf32
    for name, (loss_error, gradient_error) in errors.items():
        for what, error in (("loss", loss_error), ("gradient", gradient_error)):
            yield Row(f"{what}, relative error against the CPU{name}", "", (error,), 1e-3, at_most=True)


def measure_pong() -> Iterator[Row]:
    """Measure the wall time until Pong is solved, start and evaluations included; infinite if it is not solved."""
    began = time.perf_counter()
    result = run_bench_job(["solve", "--goal", "18", "--every", str(PONG_EVALUATE_EVERY), *PONG])
    minutes = (time.perf_counter() - began) / 60 if result["solved"] else float("inf")
    yield Row("minutes until Pong is played at 18", "", (minutes,), 5.0, at_most=True)


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn bench gpu` command; return the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-gpu.json")
    parser.add_argument("--pong", action="store_true", help="train Pong too: minutes to an hour")
    parser.add_argument("--updates", type=one_or_more, default=2_000, help="number of updates to time")
    options, flags = parser.parse_known_args(argv)
    config = parse([*WORKLOAD, *flags], PROG)
    check_engine(config, "local", 1)
    check_world(config, 1)
    device_kind(config)
    rows = []
    try:
        for row in itertools.chain(measure(config, options.updates), measure_pong() if options.pong else ()):
            print_message(f"{row.what}: {number(row.median)}")  # all rows together take minutes
            rows.append(row)
    finally:  # if a later measurement fails, the earlier ones are kept
        title = "GPU" if config.parallel.device == "cuda" else "CPU (the goals are those of a GPU)"
        print_goals(title, rows)
        write_json(options.json, {"rows": [row.as_json() for row in rows]})
    return 0
