"""Timings for the tests of the benchmarks."""

from __future__ import annotations

from hvdqn.bench.loop import LoopTiming

US = 1e-6


def make_timing(
    ranks: int = 1, rate: float = 1000.0, exposed: float = 0.0, hidden: float = 0.0
) -> LoopTiming:
    """Return a timing with 8 env steps per rank, one update and 90 us of work in each iteration."""
    work = {"act": 30 * US, "env": 20 * US, "add": 0.0, "compute": 40 * US}
    return LoopTiming(
        env="CartPole-v1",
        preset="smoke",
        comm="mpi",
        world_size=ranks,
        envs_per_rank=8,
        batch_per_rank=128,
        parameters=10_000,
        replay_bytes_per_transition=30.0,
        env_steps=800 * ranks,
        updates=100,
        wall_seconds=1.0,
        env_steps_per_second=rate,
        updates_per_second=rate / 8 / ranks,
        seconds_per_iteration={**work, "comm_exposed": exposed, "comm_hidden": hidden},
    )
