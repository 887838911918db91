"""Run horovodrun in elastic mode, and end the job as soon as one worker has ended by itself.

    python -m hvdqn.elastic.driver FLAGS... COMMAND...

The flags are those of horovodrun. Three things differ from it:

- When a worker ends with one of the exit codes in `JOB_EXIT_CODES`, the job ends with that code. horovodrun would
  replace the worker, or report a finished job as failed because another worker died last.
- When the job has ended, the driver no longer waits for all workers to report. It would wait forever.
- The driver prints no traceback when a worker dies during a request to it.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from typing import Any, ClassVar

from horovod.runner import gloo_run
from horovod.runner.http.http_server import RendezvousHTTPServer
from horovod.runner.launch import run_commandline

from hvdqn.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_JOB_FAILED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
)

# Exit code of a worker -> exit code of the job. A worker with any other code was lost and may be replaced.
JOB_EXIT_CODES = {
    EXIT_FINISHED: EXIT_FINISHED,
    EXIT_USER_ERROR: EXIT_USER_ERROR,
    EXIT_JOB_FAILED: EXIT_FAILED,
    EXIT_REQUEUE: EXIT_REQUEUE,
}


class Driver(gloo_run.ElasticDriver):  # type: ignore[misc]
    """Horovod's driver, which starts and replaces workers.

    Attributes:
        job_exit_code: the exit code of the job; None while no worker has ended it.
    """

    job_exit_code: ClassVar[int | None] = None

    def _handle_worker_exit(self, slot_info: Any, exit_code: int, timestamp: float) -> None:
        if exit_code in JOB_EXIT_CODES and Driver.job_exit_code is None:
            Driver.job_exit_code = JOB_EXIT_CODES[exit_code]
            self.stop()
        if Driver.job_exit_code is not None:
            self._worker_registry._barrier.abort()
        with contextlib.suppress(threading.BrokenBarrierError):
            super()._handle_worker_exit(slot_info, exit_code, timestamp)


def main() -> None:
    """Run horovodrun with this program's arguments; exit with the code of the job."""
    RendezvousHTTPServer.handle_error = lambda *_: None
    gloo_run.ElasticDriver = Driver
    sys.argv[0] = "horovodrun"  # the name in its usage message
    try:
        run_commandline()
    except Exception as error:
        if Driver.job_exit_code is None:
            found = re.search(r"Exit code: (\d+)", str(error))
            sys.exit(int(found[1]) if found else f"elastic.sh: error: {error}")
    sys.exit(Driver.job_exit_code)


if __name__ == "__main__":
    main()
