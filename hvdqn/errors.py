"""Exceptions and exit codes that the whole package shares. This module imports nothing of the project."""

from __future__ import annotations

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_JOB_FAILED = 70
"""All ranks of an elastic job failed together. launch/elastic.sh ends the job with `EXIT_FAILED`."""
EXIT_REQUEUE = 75
"""Stopped by a signal after a checkpoint: start it again with the same run directory and it goes on."""


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what is wrong, and what would be right. Exit code 2."""


class FoundAloneError(RuntimeError):
    """The user's input is wrong, and only this rank knows it: it must end the others. One line, exit code 2."""


class LaunchError(ValueError):
    """The processes of this job cannot be connected as they were started. The message names the remedy."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were skipped because their gradient was not finite. Raised on all ranks at once."""


class DriftError(RuntimeError):
    """Replicas that must be equal bit for bit are not. Raised on all ranks at once."""


class StoppedError(RuntimeError):
    """A signal stopped a measurement before it was done. Raised on all ranks at once."""
