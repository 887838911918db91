"""One rank of test_gradient.py: takes the flags of `hvdqn.train`, and is started by a launcher as it is.

Before the ranks train, their averaged gradient is compared with that of the whole batch on one process; afterwards
each rank tells the digest of its parameters.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import torch

import hvdqn.train
from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.comm.local import LocalComm
from hvdqn.config import LearningConfig, NetworkConfig, ParallelConfig
from hvdqn.learner import LEARNED, REPORTED, Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network
from hvdqn.replay import Batch
from hvdqn.sync import make_sync

GLOBAL_BATCH = 48
ACTIONS = 5
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}
REPORT = (0.0,) * len(REPORTED)
VECTOR, FRAMES = (6,), (10, 10, 4)


def make_batch(shape: tuple[int, ...]) -> Batch:
    """The global batch, the same on every rank: terminations, n-step discounts, importance weights."""
    rng = np.random.default_rng(7)

    def observations() -> np.ndarray:
        if shape == FRAMES:
            return rng.integers(256, size=(GLOBAL_BATCH, *shape)).astype(np.uint8)
        return rng.normal(size=(GLOBAL_BATCH, *shape)).astype(np.float32)

    return Batch(
        observation=observations(),
        action=rng.integers(ACTIONS, size=GLOBAL_BATCH),
        reward=rng.normal(size=GLOBAL_BATCH).astype(np.float32) * 3,
        next_observation=observations(),
        discount=np.where(rng.random(GLOBAL_BATCH) < 0.2, 0, 0.97).astype(np.float32),
        weight=rng.uniform(0.1, 1, GLOBAL_BATCH).astype(np.float32),
        row_ids=np.arange(GLOBAL_BATCH),
    )


def shard(batch: Batch, rank: int, size: int) -> Batch:
    share = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
    return Batch(*(getattr(batch, name)[share] for name in Batch.__slots__))


def make_learner(
    comm: Comm, shape: tuple[int, ...], dtype: torch.dtype, seed: int, parallel: ParallelConfig
) -> Learner:
    torch.manual_seed(seed)
    network = make_network(NetworkConfig(), "huber", shape, 1, is_image=shape == FRAMES, actions=ACTIONS).to(
        dtype
    )
    config = LearningConfig(max_grad_norm=0.0, optimizer="sgd", lr=0.01)
    sync = make_sync(parallel, comm, Clock(1, 1, 1.0, 0))
    return Learner(network, config, comm, sync, GLOBAL_BATCH // comm.size, PhaseTimer(), torch.device("cpu"))


def check_gradient(comm: Comm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch = make_batch(shape)
    alone = make_learner(LocalComm(), shape, dtype, 0, ParallelConfig())
    # The others begin with other weights; the learner must bring them rank 0's.
    shared = make_learner(comm, shape, dtype, comm.rank, ParallelConfig())
    assert torch.equal(shared.parameters, alone.parameters)
    for learner, part in ((alone, batch), (shared, shard(batch, comm.rank, comm.size))):
        learner.begin_update(part, REPORT)
        learner.finish_update()
    assert shared.gradient.dtype == dtype
    expected = alone.gradient
    # Where terms of a sum cancel, no relative error of the rest is left: hence the largest entry sets the scale.
    scale = expected.abs().max().item()
    torch.testing.assert_close(shared.gradient, expected, rtol=RTOL[dtype], atol=RTOL[dtype] * scale)
    learned, learned_alone = shared.drain(), alone.drain()
    for name in LEARNED:
        assert math.isclose(learned[name], learned_alone[name], rel_tol=10 * RTOL[dtype]), name


def check_parameters(comm: Comm, dtype: torch.dtype) -> None:
    """Weights averaged at every update are those of the averaged gradient; averaged less often, ranks agree then."""
    # Importance weights are divided by the largest of this update there, of the one before here: hence none.
    batch = replace(make_batch(VECTOR), weight=np.ones(GLOBAL_BATCH, np.float32))
    batch = shard(batch, comm.rank, comm.size)
    learners = [
        make_learner(
            comm, VECTOR, dtype, seed=comm.rank, parallel=ParallelConfig(sync=sync, sync_every=every)
        )
        for sync, every in (("gradients", 1), ("parameters", 1), ("parameters", 3))
    ]
    began = learners[0].parameters.clone()
    agreed = []
    for _ in range(6):
        for learner in learners:
            learner.begin_update(batch, REPORT)
            learner.finish_update()
        agreed.append(len(set(comm.all_gather_object(learners[2].sha256()))) == 1)
    moved = learners[0].parameters - began
    assert moved.abs().max() > 0
    scale = moved.abs().max().item()
    for name, learner in (("every update", learners[1]), ("every third", learners[2])):
        assert len(set(comm.all_gather_object(learner.sha256()))) == 1, name
    torch.testing.assert_close(
        learners[1].parameters - began, moved, rtol=100 * RTOL[dtype], atol=100 * RTOL[dtype] * scale
    )
    assert agreed == [False, False, True] * 2


class Checked(hvdqn.train.Training):
    """The real training of `main`, and what must hold before and after it."""

    def run(self) -> None:
        for shape in (VECTOR, FRAMES):
            for dtype in RTOL:
                check_gradient(self.comm, shape, dtype)
        for dtype in RTOL:
            check_parameters(self.comm, dtype)
        self.tell("gradients agree")
        super().run()
        self.tell(f"{self.clock.updates} updates, parameters {self.learner.sha256()}")

    def tell(self, what: str) -> None:
        sys.stdout.write(f"rank {self.comm.rank} of {self.comm.size}, {self.comm.name}, {what}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    hvdqn.train.Training = Checked  # type: ignore[misc]
    sys.exit(hvdqn.train.main())
