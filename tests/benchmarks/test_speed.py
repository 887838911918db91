"""Measure the speed of the parts, to compare one commit with another on a quiet machine.

    taskset -c 0 python -m pytest -m benchmark tests/benchmarks --benchmark-save=before
    ...
    taskset -c 0 python -m pytest -m benchmark tests/benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

These tests assert no times, and they do not run with the other tests.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from hvdqn.bench.training import acting_parts, build_filled_parts, update
from hvdqn.comm import Comm, connect
from hvdqn.config import Config, parse
from hvdqn.rank import Parts
from tests.launchers import clean_environment

pytestmark = pytest.mark.benchmark

PRESETS = ("bench-cartpole", "bench-pong")
FILLED_ENV_STEPS = 2_000


@pytest.fixture(scope="module", params=PRESETS)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[Config, Parts]]:
    """Yield the settings and the parts of a preset, with transitions in replay."""
    if request.param == "bench-pong":
        pytest.importorskip("ale_py", reason="ale_py is not installed: Atari is not measured")
    config = parse(["--preset", request.param])
    parts = build_filled_parts(config, FILLED_ENV_STEPS // config.environment.envs_per_rank)
    yield config, parts
    acting_parts(parts).envs.close()


def test_act(benchmark: BenchmarkFixture, run: tuple[Config, Parts]) -> None:
    _, parts = run
    actions = benchmark(acting_parts(parts).actor.choose, 0.05)
    assert actions.shape == (acting_parts(parts).envs.num_envs,)


def test_sample(benchmark: BenchmarkFixture, run: tuple[Config, Parts]) -> None:
    config, parts = run
    batch = benchmark(acting_parts(parts).replay.sample, config.replay.batch_per_rank)
    assert len(batch.action) == config.replay.batch_per_rank


def test_update(benchmark: BenchmarkFixture, run: tuple[Config, Parts]) -> None:
    config, parts = run
    before = parts.learner.parameters.detach().clone()
    batch = acting_parts(parts).replay.sample(config.replay.batch_per_rank)
    benchmark(update, parts, batch)
    assert not torch.equal(before, parts.learner.parameters)


PEER = """
import torch
from hvdqn.comm import Comm, connect
comm = connect("torch")
while (request := comm.broadcast_object(None)) is not None:
    floats, calls = request
    message = torch.zeros(floats)
    for _ in range(calls):
        comm.allreduce_sum_async(message, "gradient").wait()
    comm.allreduce_sum_async(message + 1.0, "gradient").wait()
comm.close()
"""


@pytest.fixture(scope="module")
def comm() -> Iterator[Comm]:
    """Yield a `Comm` of two ranks over torch.distributed: this process, and one that runs `PEER`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "RANK": "0"}.items():
            patch.setenv(name, value)
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER], env={**clean_environment(), **variables, "RANK": "1"}
        )
        try:
            connected = connect("torch")
            yield connected
            connected.broadcast_object(None)
            connected.close()
        finally:
            peer.kill()
            peer.wait()


@pytest.mark.parametrize("floats", [11_000, 1_700_000])  # the sizes of the gradients of both presets
def test_allreduce(benchmark: BenchmarkFixture, comm: Comm, floats: int) -> None:
    rounds, warm_up = 200, 20
    comm.broadcast_object((floats, rounds + warm_up))
    message = torch.zeros(floats)  # sums of repeated sums would overflow with any other value
    benchmark.pedantic(
        lambda: comm.allreduce_sum_async(message, "gradient").wait(), rounds=rounds, warmup_rounds=warm_up
    )
    total = comm.allreduce_sum_async(message + 2.0, "gradient").wait()
    assert torch.equal(total, torch.full((floats,), 3.0))
