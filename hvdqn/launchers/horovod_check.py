"""Check the Horovod that launch/install_horovod.sh has installed; raise AssertionError if a feature is missing.

python -m hvdqn.launchers.horovod_check built cpu     it has MPI and Gloo, and NCCL for any device but cpu
python -m hvdqn.launchers.horovod_check ranks 2       it connects this job's 2 ranks and adds their numbers
"""

from __future__ import annotations

import sys


def check_built(device: str) -> None:
    """Assert that Horovod was built with MPI and Gloo, and for a GPU (any `device` but "cpu") with NCCL."""
    import horovod.torch as hvd

    assert hvd.mpi_built(), "built without MPI"
    assert hvd.gloo_built(), "built without Gloo"
    assert device == "cpu" or hvd.nccl_built(), "built without NCCL"


def check_ranks(size: int) -> None:
    """Assert that Horovod connects `size` ranks and gives this one the right sum over them."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    assert hvd.size() == size, f"connected {hvd.size()} ranks, not {size}"
    total = hvd.allreduce(torch.ones(3) * (hvd.rank() + 1), op=hvd.Sum, name="check")
    assert total.tolist() == [sum(range(size + 1))] * 3, f"wrong sum: {total.tolist()}"


if __name__ == "__main__":
    _, check, value = sys.argv
    if check == "built":
        check_built(value)
    else:
        check_ranks(int(value))
