"""Wrong input on two ranks is printed once, not once per rank, within 10 s, and mpirun returns exit code 2."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launchers import REPOSITORY, Result, launch, launch_line, start
from tests.unit.test_wrong_input import tree

pytestmark = pytest.mark.distributed

TRAIN = ["-m", "hvdqn.train", "--preset", "smoke"]
LIMIT_SECONDS = 10.0

ROWS = {
    # Refused before the ranks connect.
    "unknown flag": ("--learnin-starts 3", ("'--learnin-starts'", "did you mean")),
    "another world than promised": ("--comm local", ("OMPI_COMM_WORLD_SIZE=2", "started 2 ranks", "connects 1")),
    # Refused after they connect.
    "unknown environment": ("--env CartPoll-v1", ("unknown environment 'CartPoll-v1'", "'CartPole-v1'")),
    "batch above shard": ("--batch-per-rank 1001", ("1001", "shard of a rank, 1000", "2000 over 2 ranks")),
    "server over Horovod": ("--sync server", ("--sync server", "not with --comm horovod", "--comm mpi")),
    "run directory not writable": ("--run-dir {tmp}/file/run", ("cannot write", "Not a directory", "--run-dir")),
}  # fmt: skip


def refused(launcher: str, np: int, args: Sequence[str], words: tuple[str, ...]) -> Result:
    """Launch a wrong command line and check that its error is printed once, within the limit.

    On a busy machine the limit is three times the time that the imports alone take.
    """
    result, limit = launch(launcher, np, args, timeout=120), LIMIT_SECONDS
    for _ in range(2):
        if result.seconds >= limit:
            with start(launcher, np, ["-c", "import hvdqn.train"], timeout=120) as imports:
                result = launch(launcher, np, args, timeout=120)
                limit = max(LIMIT_SECONDS, 3 * imports.wait().seconds)
    assert result.seconds < limit, str(result)
    lines = [line for line in result.stderr.splitlines() if "hvdqn: error: " in line]
    assert len(lines) == 1, str(result)
    for word in words:
        assert word in lines[0]
    # No traceback except that of the launcher, which may lie in a folder of any name.
    assert f"{REPOSITORY / 'hvdqn'}/" not in result.stdout + result.stderr, str(result)
    return result


@pytest.mark.parametrize(("argv", "words"), ROWS.values(), ids=ROWS)
def test_two_ranks_print_it_once(argv: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    run_dir = ["--run-dir", str(tmp_path / "run")]
    flags = [word.format(tmp=tmp_path) for word in argv.split()]
    result = refused("mpirun", 2, [*TRAIN, *run_dir, *flags], words)
    assert result.returncode == 2, str(result)
    assert tree(tmp_path).keys() == {"file"}


def test_ranks_of_different_settings(tmp_path: Path) -> None:
    train = [*TRAIN, "--run-dir", str(tmp_path / "run")]
    second = [":", "-np", "1", sys.executable, *train, "--gamma", "0.9"]
    words = ("different settings", "--gamma is 0.99 on rank 0 and 0.9 on rank 1", "one command")
    result = refused("mpirun", 1, [*train, *second], words)
    assert result.returncode == 2, str(result)
    assert tree(tmp_path) == {}


RANK_0_SEES_A_GPU = """
import sys
from types import SimpleNamespace
import torch
from hvdqn.comm import launcher_rank
from hvdqn.train import main
if launcher_rank() == 0:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda gpu: SimpleNamespace(uuid="of the only one")
sys.exit(main())
"""


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_hosts_with_and_without_a_gpu(launcher: str, tmp_path: Path) -> None:
    """torch.distributed makes an NCCL group before this can be refused: all ranks must make it, or none."""
    script = tmp_path / "train.py"
    script.write_text(RANK_0_SEES_A_GPU)
    flags = ["--preset", "smoke", "--comm", "mpi" if launcher == "mpirun" else "torch"]
    words = ("no GPU is seen by rank 1, and one is by others", "--device cpu")
    result = refused(launcher, 2, [str(script), *flags, "--run-dir", str(tmp_path / "run")], words)
    assert result.returncode == (2 if launcher == "mpirun" else 1), str(result)
    assert tree(tmp_path).keys() == {"train.py"}


def test_a_run_directory_that_only_rank_0_sees(tmp_path: Path) -> None:
    """A relative path, on hosts that start in different folders."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    train = [sys.executable, *TRAIN, "--run-dir", "run"]
    ranks = ["-np", "1", "-wdir", "here", *train, ":", "-np", "1", "-wdir", "there", *train]
    result = launch_line(shlex.join(["mpirun", *ranks]), 2, timeout=120, cwd=tmp_path)
    assert result.returncode == 2, str(result)
    assert result.stderr.count("hvdqn: error: ") == 1, str(result)
    assert re.search(
        r"rank 1 on host \S+ does not see .* directory '\S*run'; with --run-dir name a folder", result.stderr
    )
    assert tree(tmp_path).keys() == {"here", "there"}


def test_an_error_on_one_rank_alone_is_printed_by_that_rank(tmp_path: Path) -> None:
    train = [*TRAIN, "--run-dir", str(tmp_path / "run")]
    second = [":", "-np", "1", sys.executable, *train, "--learnin-starts", "3"]
    words = ("rank 1 alone", "'--learnin-starts'", "did you mean")
    result = refused("mpirun", 1, [*train, *second], words)
    assert result.returncode == 2, str(result)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("launcher", ["horovodrun-gloo", "torchrun"])
def test_launchers_that_do_not_pass_exit_codes_on(launcher: str, tmp_path: Path) -> None:
    train = [*TRAIN, "--run-dir", str(tmp_path), "--env", "Pendulum-v1"]
    result = refused(launcher, 2, train, ("'Pendulum-v1'", "needs Discrete"))
    assert result.returncode, str(result)
    assert tree(tmp_path) == {}
