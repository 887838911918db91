"""One rank of test_sharded.py: `sharded_worker.py COMM`, started by a launcher."""

from __future__ import annotations

import sys
import traceback

import torch

from hvdqn.comm import Comm, connect
from hvdqn.metrics import PhaseTimer
from hvdqn.sync import RankGroup
from tests import model_parallel as checks

LEARNING = ("dueling convolutions", "layer norm")


def check(comm: Comm) -> None:
    """Compare split networks with whole ones; then save, load, flip a bit and divide by zero."""
    group = RankGroup(comm, 2, PhaseTimer())
    for name in LEARNING:
        checks.check_same_as_whole(comm, group, checks.NETWORKS[name])
    checks.check_same_as_data_parallel(comm, group, checks.NETWORKS["dueling convolutions"])
    checks.check_round_trip(comm, group, checks.NETWORKS["dueling convolutions"])
    checks.check_differing(comm, group, checks.NETWORKS["convolutions"])
    checks.check_not_finite(comm, group, checks.NETWORKS["convolutions"])
    group.close()
    sys.stdout.write(f"rank {comm.rank} of {comm.size} agrees over {comm.name}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    comm = connect(sys.argv[1])
    try:
        check(comm)
    except Exception:
        traceback.print_exc()
        comm.abort(1)
    comm.close()
