"""Run environments in worker processes that may have child processes, and report how a worker ended if one dies."""

from __future__ import annotations

import atexit
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from hvdqn.errors import UserError

# How long to wait for a worker process to end after its pipe has closed.
_SECONDS_TO_END = 2.0
_vectors: weakref.WeakSet[WorkerVector] = weakref.WeakSet()


class WorkerVector(AsyncVectorEnv):
    """Steps each environment in a worker process, which may start helper processes of its own.

    Args:
        makers: functions that build one environment each, called in the worker processes.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        self._rank_pid = os.getpid()
        _vectors.add(self)
        # At exit, Python waits for child processes that are not daemons, and these are not, so that they may have
        # children.
        atexit.register(self.kill)
        try:
            super().__init__(makers, daemon=False, worker=_work, autoreset_mode=AutoresetMode.SAME_STEP)
        except BaseException as error:
            # Before there are workers, the error comes from building an environment here to learn its spaces.
            if isinstance(error, (EOFError, OSError)) and vars(self).get("processes"):
                self._raise_lost_worker()
            self.kill()
            raise

    def kill(self) -> None:
        """Kill the worker processes by SIGKILL: they ignore SIGTERM, and one that hangs does not read its pipe."""
        atexit.unregister(self.kill)
        if os.getpid() == self._rank_pid:  # and not in a child that inherited this object
            for process in getattr(self, "processes", ()):
                process.kill()

    def reset(self, **options: Any) -> Any:
        """See `AsyncVectorEnv`. Raises RuntimeError if a worker process has ended."""
        try:
            return super().reset(**options)
        except (EOFError, OSError):
            self._raise_lost_worker()

    def step_async(self, actions: Any) -> None:
        """See `AsyncVectorEnv`. Raises RuntimeError if a worker process has ended."""
        try:
            super().step_async(actions)
        except (EOFError, OSError):
            self._raise_lost_worker()

    def step_wait(self, timeout: float | None = None) -> Any:
        """See `AsyncVectorEnv`. Raises RuntimeError if a worker process has ended."""
        try:
            return super().step_wait(timeout)
        except (EOFError, OSError):
            self._raise_lost_worker()

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """See `AsyncVectorEnv`. Raises RuntimeError if a worker process has ended."""
        try:
            results: tuple[Any, ...] = super().call(name, *args, **kwargs)
        except (EOFError, OSError):
            self._raise_lost_worker()
        return results

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ask the worker processes to end, then kill those that still run; kill all at once if `terminate`."""
        if terminate:
            self.kill()
        try:
            with suppress(EOFError, OSError):  # a worker has ended already
                super().close_extras(timeout, terminate)
        finally:
            self.kill()
            for process in self.processes:
                process.join()

    def _raise_lost_worker(self) -> NoReturn:
        """Kill all worker processes, and raise a RuntimeError that says how those that had already ended did so."""
        processes = getattr(self, "processes", [])
        deadline = time.monotonic() + _SECONDS_TO_END
        while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        ends = [_describe_end(index, process.exitcode) for index, process in enumerate(processes)]
        self._state = AsyncState.DEFAULT
        self.kill()
        raise RuntimeError(
            "; ".join(filter(None, ends)) or "a worker process of the environments does not answer"
        ) from None

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Raise one error with the traceback of the first worker that failed.

        Gymnasium prints all tracebacks, and creates the exception anew from its message alone, which fails for classes
        that take other arguments.
        """
        failed = [index for index, success in enumerate(successes) if not success]
        if not failed:
            return
        reports = [self.error_queue.get() for _ in failed]
        for index in failed:
            self.parent_pipes[index].close()
            self.parent_pipes[index] = None  # type: ignore[call-overload]
        self._state = AsyncState.DEFAULT
        for _, kind, message, _ in reports:
            if kind is UserError:
                raise UserError(message)
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise RuntimeError(f"in env {reports[0][0]}{others}: {reports[0][3].strip()}")


def kill_all_workers() -> None:
    """Kill the worker processes of all async vectors of this process that have not been closed."""
    for vector in list(_vectors):
        if not vector.closed:
            vector.kill()


def _describe_end(index: int, code: int | None) -> str:
    """Return a sentence on how the worker process of environment `index` ended; "" if it still runs.

    `code` is its exit code, negative for a signal, None while it runs.
    """
    worker = f"the worker process of env {index}"
    if code is None:
        return ""
    if code >= 0:
        return f"{worker} ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"{worker} was killed by {name}{hint}"


class _Errors:
    """Wraps Gymnasium's queue and sends exceptions through it as text, because not every exception can be pickled."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, report: tuple[int, type[BaseException], BaseException, str]) -> None:
        index, kind, error, trace = report
        self._queue.put(
            (index, UserError if issubclass(kind, UserError) else RuntimeError, str(error), trace)
        )


def _work(index: int, maker: Any, pipe: Any, parent: Any, memory: Any, errors: Any, *rest: Any) -> None:
    """Run the loop of a worker process: Gymnasium's own, but with `_Errors` as its queue for exceptions."""
    _async_worker(index, maker, pipe, parent, memory, _Errors(errors), *rest)  # type: ignore[arg-type]
