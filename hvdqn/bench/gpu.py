"""`hvdqn bench gpu`: all that is promised of a GPU, in one go. It has never been run on one.

    hvdqn bench gpu              samples learned per second, and how far the GPU's updates are from the CPU's: minutes
    hvdqn bench gpu --pong       and the minutes until Pong is played at 18, with 16 cores for environments

Samples are learned from replay alone, without environments. The GPU's updates are compared with the CPU's in float32,
without TF32, each side taking its own steps on the same minibatches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvdqn.bench.jobs import bench
from hvdqn.bench.report import Parser, Row, print_goals, write_json
from hvdqn.comm import connect
from hvdqn.config import Config, check_engine, parse
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import Parts, build_parts, device_kind
from hvdqn.trailer import REPORTED

PROG = "hvdqn bench gpu"
WORKLOAD = (
    "--preset", "atari", "--env", "ALE/Pong-v5", "--device", "cuda", "--replay-capacity", "100000",
    "--batch-per-rank", "512",
)  # fmt: skip
# More environments than `pong` is tuned for; not tuned on a GPU.
PONG = (
    "--preset", "pong", "--device", "cuda", "--precision", "bf16", "--envs-per-rank", "64", "--batch-per-rank", "512",
    "--lr-reference-batch", "64", "--total-env-steps", "2000000", "--learning-starts", "20000", "--eval-episodes", "16",
)  # fmt: skip
WAYS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, replay in the host's memory": {"precision": "bf16", "replay_device": "cpu"},
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


def largest_errors(config: Config, updates: int) -> tuple[float, float]:
    """Relative errors of loss and gradient against the CPU: the largest of so many updates."""
    config = config.replace(precision="fp32")
    sides = [built(config.replace(device="cpu", cuda_graphs=False)), built(config)]
    replay = sides[0].replay
    loss_error = gradient_error = 0.0
    for _ in range(updates):
        batch = replay.sample(config.replay.batch_per_rank)
        losses, gradients = [], []
        for side in sides:
            loss, _, _ = side.learner.backward(batch)
            losses.append(float(loss))
            gradients.append(side.learner.gradient.cpu().clone())
            side.learner.begin_update(batch, REPORT)
            side.learner.finish_update()
        loss_error = max(loss_error, abs(losses[1] - losses[0]) / abs(losses[0]))
        difference = torch.linalg.vector_norm(gradients[1] - gradients[0])
        gradient_error = max(gradient_error, float(difference / torch.linalg.vector_norm(gradients[0])))
    for side in sides:
        side.envs.close()
    return loss_error, gradient_error


def measure(config: Config, updates: int) -> list[Row]:
    """What one GPU is to reach, Pong aside."""
    batch, on_gpu = config.replay.batch_per_rank, device_kind(config) == "cuda"
    rates = [
        Row(f"samples/s learned, batch {batch}, {name}", "",
            (samples_per_second(config.replace(**settings), updates),), 80_000)
        for name, settings in WAYS.items()
        if on_gpu or not settings.get("cuda_graphs")
    ]  # fmt: skip
    errors = []
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for name, graphs in (("", False), (", CUDA graphs", True))[: 1 + on_gpu]:
        found = largest_errors(config.replace(cuda_graphs=graphs), min(updates, UPDATES_COMPARED))
        errors += [
            Row(f"{what}, relative error against the CPU{name}", "", (error,), 1e-3, at_most=True)
            for what, error in zip(("loss", "gradient"), found, strict=True)
        ]
    torch.backends.cudnn.allow_tf32 = allowed
    return rates + errors


def pong() -> Row:
    """Wall time until Pong is solved; infinite if it is not."""
    found = bench(["solve", "--goal", "18", "--every", "50000", *PONG])
    minutes = found["training_seconds"] / 60 if found["solved"] else float("inf")
    return Row("minutes until Pong is played at 18", "", (minutes,), 5.0, at_most=True)


def main(argv: Sequence[str]) -> int:
    """The `hvdqn bench gpu` command; returns the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-gpu.json")
    parser.add_argument("--pong", action="store_true", help="train Pong too: minutes to an hour")
    parser.add_argument("--updates", type=int, default=2_000, help="to time")
    options, flags = parser.parse_known_args(argv)
    config = parse([*WORKLOAD, *flags], PROG)
    check_engine(config, "local", 1)
    device_kind(config)
    rows = measure(config, options.updates)
    if options.pong:
        rows.append(pong())
    print_goals("GPU" if config.parallel.device == "cuda" else "CPU, where these goals mean nothing", rows)
    write_json(options.json, {"rows": [row.as_json() for row in rows]})
    return 0
