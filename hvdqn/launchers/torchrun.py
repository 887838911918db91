"""Run torchrun, but end a failed job with the rank's own exit code and one line in place of torchrun's long report.

python -m hvdqn.launchers.torchrun FLAGS... COMMAND...

The flags are those of torchrun, which ends every failed job with exit code 1.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Mapping
from typing import Any

from hvdqn.errors import EXIT_REQUEUE, EXIT_USER_ERROR


def first_failure(failures: Mapping[int, Any]) -> tuple[int, int]:
    """Return the rank that failed first and its exit code: 128 + n if it was killed by signal n.

    A killed rank comes before all others: ranks that lose their connection to it fail at the same moment.

    Args:
        failures: rank -> torch's `ProcessFailure`, which has `exitcode` (negative if killed) and `timestamp`.
    """
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    code: int = failure.exitcode
    return rank, code if code >= 0 else 128 - code


def main() -> None:
    """Run torchrun with this program's arguments; exit with the code of the job."""
    # Imported here so that other programs and tests can use this module without the seconds that torch takes.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, code = first_failure(error.failures)
        if code not in (EXIT_USER_ERROR, EXIT_REQUEUE):  # hvdqn has printed why
            print(f"torchrun.sh: rank {rank} on {socket.gethostname()} ended with {code}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
