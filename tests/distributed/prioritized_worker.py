"""One rank of test_prioritized.py: `prioritized_worker.py COMM`, started by a launcher.

The real parts, over real shards with priorities spread unevenly: what the learner makes of many weighted minibatches
is compared with the gradient of all transitions of the job, each counted once.
"""

from __future__ import annotations

import sys
import traceback

import numpy as np
import torch

from hvdqn.comm import Comm, connect
from hvdqn.config import parse
from hvdqn.learner import REPORTED, Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import Parts, build_parts
from hvdqn.replay import Batch, Importance, PrioritizedSampler

UPDATES, BATCH = 400, 32
REPORT = (0.0,) * len(REPORTED)
# A learning rate that changes no weight: every update is of the same network.
FLAGS = f"""--env CartPole-v1 --replay prioritized --priority-alpha 1 --hidden 16 --batch-per-rank {BATCH} --lr 1e-30
    --lr-scaling none --max-grad-norm 0 --envs-per-rank 3 --replay-capacity 2000 --learning-starts 100 --gamma 0.9"""


def fill(parts: Parts, rank: int) -> np.ndarray:
    """Shards of unequal length and unequal priorities, which tell on the gradient; return every start."""
    parts.replay.start(parts.actor.start())
    for _ in range(40 + 50 * rank):
        actions = parts.actor.choose(1.0)
        parts.replay.add(actions, parts.actor.step(actions))
    starts = parts.replay.ring.starts()
    lean = np.abs(parts.replay.ring.observation[starts, 2])  # what is drawn more often looks different
    td_errors = (0.02 + lean) * (1 + 4 * rank)
    parts.replay.update(parts.replay.ring.row_ids(starts), td_errors)
    return starts


def true_gradient(comm: Comm, parts: Parts, starts: np.ndarray) -> tuple[torch.Tensor, int]:
    """The mean over all transitions of all ranks, and their number."""
    sampler = parts.replay.sampler
    assert isinstance(sampler, PrioritizedSampler)
    batch = sampler._assembler.build(starts)
    assert (batch.weight == 1).all()
    parts.learner.backward(batch)
    gradient = parts.learner.gradient.double() * comm.size  # what it leaves there is to be summed over ranks
    shares = comm.all_gather_object((gradient * starts.size, starts.size))
    total = sum(count for _, count in shares)
    return torch.stack([gradient for gradient, _ in shares]).sum(dim=0) / total, total


def update(learner: Learner, batch: Batch) -> torch.Tensor:
    """The gradient that all ranks stepped along, [parameters]."""
    learner.begin_update(batch, REPORT)
    learner.finish_update()
    return learner.gradient.double().clone()


def check_unbiased(comm: Comm, config_flags: str) -> str:
    parts = build_parts(parse(config_flags.split()), comm, PhaseTimer())
    true, n_global = true_gradient(comm, parts, fill(parts, comm.rank))
    estimates, largest, uncorrected = [], [], []
    for _ in range(UPDATES):
        importance = Importance(beta=1.0, n_global=n_global, size=comm.size)
        batch = parts.replay.sample(BATCH, importance)
        largest.append(max(comm.all_gather_object(float(batch.weight.max()))))
        estimates.append(update(parts.learner, batch) * largest[-1])
        uncorrected.append(update(parts.learner, parts.replay.sample(BATCH)))
    parts.envs.close()
    z, z_uncorrected = (deviation(made, true) for made in (estimates, uncorrected))
    # Each of the parameters is off by some standard errors: their root mean square is about 1 without a bias.
    assert z < 1.5, f"biased: {z:.2f} standard errors"
    assert z_uncorrected > 3, f"the priorities make no difference: {z_uncorrected:.2f} standard errors"
    return f"{z:.2f} standard errors, {z_uncorrected:.1f} without weights"


def deviation(gradients: list[torch.Tensor], true: torch.Tensor) -> float:
    """Root mean square over parameters of (mean - true) / standard error of the mean."""
    stacked = torch.stack(gradients)
    error = stacked.std(dim=0) / len(gradients) ** 0.5
    counts = error > 1e-9  # a unit that is never active has no gradient
    z = (stacked.mean(dim=0) - true)[counts] / error[counts]
    return float(z.square().mean().sqrt())


def main(choice: str) -> None:
    torch.set_num_threads(1)
    comm = connect(choice)
    try:
        said = check_unbiased(comm, FLAGS)
        everywhere = comm.all_gather_object(said)
        assert everywhere == [said] * comm.size, "the ranks stepped along different gradients"
        sys.stdout.write(f"rank {comm.rank} of {comm.size}: {said}\n")
        sys.stdout.flush()
    except Exception:
        traceback.print_exc()
        comm.abort(1)
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
