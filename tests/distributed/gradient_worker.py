"""One rank of test_gradient.py: takes the flags of `hvdqn.train`, and is started by a launcher as it is.

Before the ranks train, their averaged gradient is compared with that of the whole batch on one process. Afterwards
each rank prints the digest of its parameters.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import torch

import hvdqn.train
from hvdqn.comm import Comm
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config
from hvdqn.networks import make_network
from hvdqn.replay import Batch
from hvdqn.sync.statistics import LEARNED
from hvdqn.trainer import Trainer
from tests.learning_ranks import LearningRank, share, weighted_batch

GLOBAL_BATCH = 48
ACTIONS = 5
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}
VECTOR, FRAMES = (6,), (10, 10, 4)


def make_batch(shape: tuple[int, ...]) -> Batch:
    """Return the global batch, the same on every rank."""
    return weighted_batch(GLOBAL_BATCH, shape, ACTIONS, np.random.default_rng(7))


def make_rank(
    comm: Comm, shape: tuple[int, ...], dtype: torch.dtype, seed: int, sync: str = "gradients", every: int = 1
) -> LearningRank:
    """Return a rank whose network is initialized from `seed`, before rank 0's weights are loaded."""
    config = Config().replace(
        max_grad_norm=0.0,
        optimizer="sgd",
        lr=0.01,
        batch_per_rank=GLOBAL_BATCH // comm.size,
        sync=sync,
        sync_every=every,
    )
    torch.manual_seed(seed)
    network = make_network(config.network, "huber", shape, 1, is_image=shape == FRAMES, actions=ACTIONS)
    return LearningRank(config, comm, network.to(dtype))


def check_gradient(comm: Comm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check that the ranks' averaged gradient is that of one process with the whole batch."""
    batch = make_batch(shape)
    alone = make_rank(LocalComm(), shape, dtype, 0)
    # The other ranks begin with other weights, in whose place they must load rank 0's.
    shared = make_rank(comm, shape, dtype, comm.rank)
    assert torch.equal(shared.learner.parameters, alone.learner.parameters)
    alone.update(batch)
    shared.update(share(batch, comm.rank, comm.size))
    gradient, expected = shared.learner.gradient, alone.learner.gradient
    assert gradient.dtype == dtype
    # Where the terms of a sum cancel, the rest has a large relative error: hence the largest entry sets the scale.
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=RTOL[dtype], atol=RTOL[dtype] * scale)
    learned, learned_alone = shared.totals.pop(), alone.totals.pop()
    for name in LEARNED:
        assert math.isclose(learned[name], learned_alone[name], rel_tol=10 * RTOL[dtype]), name


def check_parameters(comm: Comm, dtype: torch.dtype) -> None:
    """Check that weights averaged at every update are those that averaged gradients give.

    Weights averaged less often must be equal on all ranks after each average.
    """
    # Without importance weights: `parameters` divides by the largest of the update before, `gradients` of this one.
    batch = replace(make_batch(VECTOR), weight=np.ones(GLOBAL_BATCH, np.float32))
    batch = share(batch, comm.rank, comm.size)
    strategies = (("gradients", 1), ("parameters", 1), ("parameters", 3))
    ranks = [make_rank(comm, VECTOR, dtype, comm.rank, sync, every) for sync, every in strategies]
    gradients, every_update, every_third = (rank.learner for rank in ranks)
    before = gradients.parameters.clone()
    equal = []
    for _ in range(6):
        for rank in ranks:
            rank.update(batch)
        equal.append(len(set(comm.all_gather_object(every_third.sha256()))) == 1)
    moved = gradients.parameters - before
    assert moved.abs().max() > 0
    scale = moved.abs().max().item()
    for name, learner in (("every update", every_update), ("every third", every_third)):
        assert len(set(comm.all_gather_object(learner.sha256()))) == 1, name
    torch.testing.assert_close(
        every_update.parameters - before, moved, rtol=100 * RTOL[dtype], atol=100 * RTOL[dtype] * scale
    )
    assert equal == [False, False, True] * 2


class CheckedTrainer(Trainer):
    """The trainer of `main`, with checks before and after it trains."""

    def train(self, until_env_steps: int | None = None) -> None:
        for shape in (VECTOR, FRAMES):
            for dtype in RTOL:
                check_gradient(self.comm, shape, dtype)
        for dtype in RTOL:
            check_parameters(self.comm, dtype)
        self.print("gradients agree")
        super().train(until_env_steps)
        self.print(f"{self.clock.updates} updates, parameters {self.learner.sha256()}")

    def print(self, result: str) -> None:
        sys.stdout.write(f"rank {self.comm.rank} of {self.comm.size}, {self.comm.name}, {result}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    hvdqn.train.make_trainer = CheckedTrainer  # type: ignore[assignment]
    sys.exit(hvdqn.train.main())
