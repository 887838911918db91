"""One rank of test_comm.py: `comm_worker.py MODE COMM`, started by a launcher.

MODE conformance checks what the docstrings of `Comm` state. In the other modes rank 1 fails.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from hvdqn.comm import Comm, connect, launcher_rank
from hvdqn.errors import LaunchError

SIZES = (1, 2, 3, 7, 1000, 17_003, 134_002, 1_310_720)  # up to 10 MB of float64
DTYPES = (torch.float32, torch.float64)


def part(rank: int, size: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """Return the message of `rank` in a reduction. Every rank can compute those of all others."""
    generator = torch.Generator().manual_seed(1_000_003 * salt + 101 * size + rank)
    return torch.randn(size, dtype=dtype, generator=generator)


def check_sum(comm: Comm, result: torch.Tensor, salt: int = 0) -> str:
    """Compare a sum with the float64 sum of all messages; return a hash of its bits."""
    parts = [part(rank, len(result), result.dtype, salt).double() for rank in range(comm.size)]
    expected = sum(parts)
    tolerance = 2 * comm.size**2 * torch.finfo(result.dtype).eps * max(p.abs().max().item() for p in parts)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
    return hashlib.sha256(result.numpy().tobytes()).hexdigest()


def world(comm: Comm) -> None:
    assert comm.all_gather_object(comm.rank) == list(range(comm.size))
    assert launcher_rank() == comm.rank
    hosts = comm.all_gather_object(socket.gethostname())
    assert comm.local_size == hosts.count(socket.gethostname())
    assert comm.local_rank == hosts[: comm.rank].count(socket.gethostname())
    assert comm.why
    if comm.name == "horovod" and "OMPI_COMM_WORLD_RANK" in os.environ:
        expected = {"shared memory": "5", "Horovod": "0"}.get(comm.path)  # None on several hosts
        assert os.environ.get("HOROVOD_CYCLE_TIME") == expected


def total(comm: Comm) -> list[str]:
    bits = []
    for dtype in DTYPES:
        for size in SIZES:
            tensor = part(comm.rank, size, dtype)
            result = comm.allreduce_sum_async(tensor, f"sum.{size}.{dtype}").wait()
            assert result is tensor, "the sum is not in place"
            bits.append(check_sum(comm, result))
    return bits


def same_name_again(comm: Comm) -> list[str]:
    bits = []
    for update in range(20):
        tensor = part(comm.rank, 1000, torch.float32, salt=update)
        comm.allreduce_sum_async(tensor, "gradient").wait()
        bits.append(check_sum(comm, tensor, salt=update))
    return bits


def ranks_that_are_late_in_turn(comm: Comm) -> list[str]:
    """No rank adds messages of different updates."""
    bits = []
    for update in range(300):
        tensor = part(comm.rank, 1000, torch.float32, salt=update)
        time.sleep(0.002 * (update // 3 % comm.size == comm.rank and update % 3 > 0))
        pending = comm.allreduce_sum_async(tensor, "late")
        time.sleep(0.002 * (update // 5 % comm.size == comm.rank and update % 5 > 2))
        pending.wait()
        bits.append(check_sum(comm, tensor, salt=update))
    return bits


def two_in_flight(comm: Comm) -> list[str]:
    first, second = (part(comm.rank, size, torch.float32) for size in (17_003, 1000))
    pending_first = comm.allreduce_sum_async(first, "first")
    pending_second = comm.allreduce_sum_async(second, "second")
    time.sleep(0.01 * comm.rank)
    assert pending_first.wait() is first
    assert pending_second.wait() is second
    return [check_sum(comm, first), check_sum(comm, second)]


def again_the_same_bits(comm: Comm) -> None:
    """For any order of arrival. (Of several sums in progress, Horovod fuses those that are ready: bits may differ.)"""
    for size in (1000, 17_003, 134_002):
        tensor = part(comm.rank, size, torch.float32)
        sums = []
        for last in range(comm.size):
            time.sleep(0.01 * (comm.rank == last))
            sums.append(comm.allreduce_sum_async(tensor.clone(), f"again.{size}").wait())
        assert all(torch.equal(sums[0], one) for one in sums)


def waiting_again_changes_nothing(comm: Comm) -> None:
    tensor = part(comm.rank, 1000, torch.float64)
    pending = comm.allreduce_sum_async(tensor, "again")
    pending.wait()
    assert pending.wait() is tensor
    check_sum(comm, tensor)


def part_of_a_larger_tensor(comm: Comm) -> None:
    larger = torch.full((1002,), 5.0)
    larger[1:-1] = part(comm.rank, 1000, torch.float32)
    comm.allreduce_sum_async(larger[1:-1], "view").wait()
    check_sum(comm, larger[1:-1].clone())
    assert larger[0] == larger[-1] == 5.0


def parameters_that_require_gradients(comm: Comm) -> None:
    tensor = torch.nn.Parameter(torch.full((100,), float(comm.rank)))
    with torch.no_grad():
        comm.allreduce_sum_async(tensor, "parameters").wait()
        assert tensor.tolist() == [comm.size * (comm.size - 1) / 2] * 100
        comm.broadcast_(tensor)


def nan_and_inf_reach_every_rank(comm: Comm) -> None:
    tensor = torch.zeros(4)
    if comm.rank == comm.size - 1:
        tensor[0], tensor[1] = float("nan"), float("inf")
    comm.allreduce_sum_async(tensor, "poisoned").wait()
    assert tensor[0].isnan()
    assert tensor[1].isinf()
    assert tensor[2:].tolist() == [0, 0]


def broadcast(comm: Comm) -> None:
    dtypes = (torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16, *DTYPES)
    for root in {0, comm.size - 1}:
        for dtype in dtypes:
            for shape in ((), (0,), (1,), (3, 5, 7), (50_000,)):
                expected = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(root)).to(dtype)
                tensor = expected.clone() if comm.rank == root else torch.zeros(shape, dtype=dtype)
                comm.broadcast_(tensor, root)
                assert torch.equal(tensor, expected), (root, dtype, shape)


def objects(comm: Comm) -> None:
    mine = {"rank": comm.rank, "text": "é" * 1000 * comm.rank, "none": None}
    for root in {0, comm.size - 1}:
        received = comm.broadcast_object(mine, root)
        assert received["rank"] == root
        assert len(received["text"]) == 1000 * root
    gathered = comm.all_gather_object(mine)
    assert [one["rank"] for one in gathered] == list(range(comm.size))
    assert [len(one["text"]) for one in gathered] == [1000 * rank for rank in range(comm.size)]
    assert gathered[comm.rank] == mine


def barrier(comm: Comm) -> None:
    time.sleep(0.05 * comm.rank)
    entered = time.monotonic()  # one clock for all processes of a host
    comm.barrier()
    left = time.monotonic()
    times = comm.all_gather_object((entered, left))
    assert max(entered for entered, _ in times) <= min(left for _, left in times)


def groups(comm: Comm) -> None:
    """Odd and even ranks; then all ranks but the last; then every rank alone. All groups work side by side."""
    for colors in ((comm.rank % 2), int(comm.rank == comm.size - 1), comm.size - comm.rank):
        everyone = comm.all_gather_object(colors)
        ranks = [rank for rank in range(comm.size) if everyone[rank] == colors]
        group = comm.split(colors)
        assert (group.size, ranks[group.rank]) == (len(ranks), comm.rank)
        hosts = group.all_gather_object(socket.gethostname())
        assert group.local_size == hosts.count(socket.gethostname())
        assert group.local_rank == hosts[: group.rank].count(socket.gethostname())
        assert group.all_gather_object(comm.rank) == ranks
        assert group.broadcast_object(comm.rank, group.size - 1) == ranks[-1]
        tensor = torch.full((1000,), float(comm.rank))
        in_job = tensor.clone()
        group.allreduce_sum_async(tensor, "gradient").wait()
        comm.allreduce_sum_async(in_job, "gradient").wait()
        assert tensor.tolist() == [sum(ranks)] * 1000
        assert in_job.tolist() == [comm.size * (comm.size - 1) / 2] * 1000
        group.broadcast_(tensor.fill_(comm.rank), group.size - 1)
        assert tensor.tolist() == [ranks[-1]] * 1000
        group.barrier()
        group.close()


def one_rank_has_no_memory_to_share(comm: Comm) -> None:
    """Then no rank uses shared memory."""
    from hvdqn.comm import host_sum

    def fail(place: object) -> None:
        raise OSError(28, "No space left on device")

    map_memory = host_sum.map_memory
    if comm.rank == 1:
        host_sum.map_memory = fail
    for update in range(3):
        tensor = part(comm.rank, 500, torch.float32, salt=update)
        comm.allreduce_sum_async(tensor, "refused").wait()
        check_sum(comm, tensor, salt=update)
    host_sum.map_memory = map_memory


# Each may return hashes, which must be the same on every rank.
CHECKS: tuple[Callable[[Comm], list[str] | None], ...] = (
    world,
    total,
    same_name_again,
    ranks_that_are_late_in_turn,
    two_in_flight,
    again_the_same_bits,
    waiting_again_changes_nothing,
    part_of_a_larger_tensor,
    parameters_that_require_gradients,
    nan_and_inf_reach_every_rank,
    broadcast,
    objects,
    barrier,
    groups,
    one_rank_has_no_memory_to_share,
)


def conformance(comm: Comm) -> None:
    bits = [one for check in CHECKS for one in check(comm) or []]
    assert not list(Path("/dev/shm").glob(f"hvdqn-{os.getpid()}-*")), "a killed job would leave this behind"
    everywhere = comm.all_gather_object(bits)
    assert everywhere == [bits] * comm.size, "the ranks hold different bits"
    summary = hashlib.sha256("".join(bits).encode()).hexdigest()
    write_line(f"rank {comm.rank} of {comm.size} passed over {comm.name}, {comm.path}, bits {summary}")


def error_on_one_rank(comm: Comm) -> None:
    if comm.rank == 1:
        raise RuntimeError("the environment of this rank broke")
    comm.allreduce_sum_async(torch.ones(1000), "gradient").wait()


def abort_by_watchdog(comm: Comm) -> None:
    """Rank 1 hangs and the others wait for it in a collective, until a watchdog thread of rank 0 aborts the job."""
    if comm.rank == 1:
        time.sleep(600)
    if comm.rank == 0:
        threading.Timer(0.3, abort, [comm]).start()
    comm.allreduce_sum_async(torch.ones(1000), "gradient").wait()


def abort(comm: Comm) -> None:
    write_line(f"aborting at {time.time()}")
    comm.abort(7)


def write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(mode: str, choice: str, host_sum: str = "auto") -> None:
    torch.set_num_threads(1)
    try:
        os.environ.pop("HOROVOD_CYCLE_TIME", None)  # use hvdqn's default
        comm = connect(choice, host_sum=host_sum)
    except LaunchError as error:
        if launcher_rank() == 0:
            write_line(f"refused: {error}")
        sys.exit(2)
    try:
        globals()[mode](comm)
    except Exception:
        traceback.print_exc()
        comm.abort(1)
    comm.close()
    write_line(f"closed at {time.time()}")


if __name__ == "__main__":
    main(*sys.argv[1:4])  # launch scripts are given more
