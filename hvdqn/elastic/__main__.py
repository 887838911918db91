"""Train on hosts that come and go: Horovod elastic over Gloo.

    launch/elastic.sh --hosts h1:4,h2:4,h3:4 --min-np 4 -- --preset atari --run-dir /shared/runs/pong

Every worker runs this file. Its flags are those of `hvdqn.train` and the two of `elastic_options`. When a rank dies,
the others form a new world and continue; when a host comes, its ranks join. Ranks are replicas: after an update each
holds the same weights, moments and clock. So every finished update is safe on all ranks, and after a loss the rank
that got furthest sends its state to all. Replay and environments stay where they are. A new rank contributes a zero
gradient until its replay has filled as at the start of a run.

Exit codes: 0, 2 and 75 as for `hvdqn.train`, and 70 if all ranks failed: with these launch/elastic.sh ends the job. Any
other code means that a single worker is lost; it may be replaced.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from hvdqn.comm import launcher_rank, launcher_size
from hvdqn.config import Config, parse
from hvdqn.elastic.worker import ElasticWorker, exit_worker
from hvdqn.elastic.world import ElasticWorld
from hvdqn.errors import (
    EXIT_FAILED,
    EXIT_JOB_FAILED,
    DriftError,
    LaunchError,
    NonFiniteError,
    UserError,
)
from hvdqn.faults import StopSignal
from hvdqn.job import refuse, refuse_alone
from hvdqn.logs import setup_logging
from hvdqn.paths import folder_remembered
from hvdqn.process import tune_process

log = logging.getLogger(__name__)


def elastic_options(argv: Sequence[str]) -> tuple[int, float, list[str]]:
    """Return `--max-np` (ranks of the largest world), `--join-timeout` (seconds to wait for workers) and other flags.

    Raises:
        UserError: a value is wrong.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--max-np", type=int, default=0)
    parser.add_argument("--join-timeout", type=float, default=60.0)
    try:
        options, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see launch/elastic.sh --help") from None
    if options.max_np < 1 and "--help" not in argv:
        raise UserError("--max-np N is missing: the ranks of the largest world; launch/elastic.sh gives it")
    if not options.join_timeout > 0:
        raise UserError(f"--join-timeout is {options.join_timeout}; it must be above 0")
    return options.max_np, options.join_timeout, rest


def elastic_config(argv: Sequence[str], max_np: int) -> Config:
    """Return the settings of an elastic run.

    Raises:
        UserError: a setting is wrong, or cannot be elastic.
    """
    config = parse(argv, prog="python -m hvdqn.elastic")
    if config.parallel.comm not in ("auto", "horovod"):
        raise UserError(f"--comm {config.parallel.comm} cannot lose ranks; drop it, elastic runs use Horovod")
    if config.parallel.device == "cuda":
        raise UserError(
            "--device cuda: NCCL does not survive the loss of a rank; drop it, elastic runs use CPUs"
        )
    if config.parallel.sync != "gradients":
        raise UserError(f"--sync {config.parallel.sync} cannot lose ranks; use --sync gradients")
    if config.parallel.model_parallel > 1:
        raise UserError("--model-parallel cannot lose ranks, which hold parts of the network; leave it out")
    if config.replay.replay == "none":
        raise UserError("--replay none cannot lose ranks in the middle of a rollout; use --replay uniform")
    # However far the world shrinks, the replay of a rank that counts as filled must hold something to sample.
    earliest = 2 * (config.replay.n_step + 1) * max_np * config.environment.envs_per_rank
    return config.replace(device="cpu", learning_starts=max(config.replay.learning_starts, earliest))


@folder_remembered()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; return its exit code."""
    tune_process()
    stop = StopSignal()
    try:
        setup_logging(launcher_rank(), launcher_size())
        max_np, join_timeout, rest = elastic_options(sys.argv[1:] if argv is None else argv)
        config = elastic_config(rest, max_np)
        worker = ElasticWorker(config, max_np, ElasticWorld(join_timeout, config.parallel.host_sum), stop)
    except (UserError, LaunchError) as error:
        return refuse_alone(str(error), stop)
    try:
        return worker.run()
    except UserError as error:
        return refuse(str(error), worker.comm.rank)
    except (DriftError, NonFiniteError) as error:  # on all ranks at once
        return refuse(str(error), worker.comm.rank, EXIT_JOB_FAILED)
    except LaunchError as error:
        # A worker that has never been in a world may only have had to wait too long for one.
        exit_worker(str(error), EXIT_JOB_FAILED if worker.trainer else EXIT_FAILED)
    except BaseException:  # an environment may also raise SystemExit
        exit_worker(f"rank {worker.comm.rank} of {worker.comm.size} failed: {traceback.format_exc()}")


if __name__ == "__main__":
    sys.exit(main())
