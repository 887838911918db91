"""Environments that start processes, set signal handlers, leave by sys.exit, or lose their worker process.

Importing this module registers them; `--env tests.unit.unruly_envs:Helped-v0` works from the repository's root.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counting(gym.Env[np.ndarray, int]):
    """Counts its steps; an episode has ten."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int):
        self.count += 1
        return np.full(2, self.count / 10, np.float32), 1.0, self.count >= 10, False, {}


def add_one(pipe: Connection, stubborn: bool) -> None:
    """Answer each number with the next one. A stubborn helper ignores SIGTERM."""
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pipe.send(pipe.recv() + 1)


class Helped(Counting):
    """Counts in a helper process, which `close` terminates; one that is left is for Python to end.

    Args:
        left: leave the helper, which ignores SIGTERM, at the end.
    """

    def __init__(self, left: bool = False) -> None:
        super().__init__()
        self.left = left
        self.pipe, theirs = multiprocessing.Pipe()
        self.helper = multiprocessing.Process(target=add_one, args=(theirs, left), daemon=True)
        self.helper.start()

    def step(self, action: int):
        self.pipe.send(self.count)
        self.count = self.pipe.recv() - 1
        return super().step(action)

    def close(self) -> None:
        if not self.left:
            self.helper.terminate()
            self.helper.join()


class Leaving(Counting):
    """Leaves by sys.exit(0) in one of its methods.

    Args:
        where: the method: init, reset, step or close.
        instance: the first instance that leaves, from 1.
    """

    made = 0

    def __init__(self, where: str = "step", instance: int = 1) -> None:
        super().__init__()
        Leaving.made += 1
        self.where = where if Leaving.made >= instance else ""
        self.leave("init")

    def leave(self, where: str) -> None:
        if self.where == where:
            sys.exit(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.leave("reset")
        return super().reset(seed=seed)

    def step(self, action: int):
        self.leave("step")
        return super().step(action)

    def close(self) -> None:
        self.leave("close")


class Handling(Counting):
    """Sets signal handlers of its own.

    Args:
        how: "default", "own", or "wakeup", which removes the wakeup descriptor.
        late: set them in the first step, not before.
    """

    def __init__(self, how: str = "own", late: bool = False) -> None:
        super().__init__()
        self.how, self.late = how, late
        if not late:
            self.set_handlers()

    def set_handlers(self) -> None:
        if self.how == "wakeup":
            signal.set_wakeup_fd(-1)
        else:
            handler = signal.SIG_DFL if self.how == "default" else (lambda *_: sys.exit(0))
            signal.signal(signal.SIGTERM, handler)
            signal.signal(signal.SIGINT, handler)

    def step(self, action: int):
        if self.late:
            self.set_handlers()
            self.late = False
        return super().step(action)


class TwoArgumentsError(Exception):
    """Cannot be made from its message alone."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Losing(Counting):
    """Ends its process, or fails, in the third step, or cannot be made; see `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "no file":
            raise FileNotFoundError("no such level: maze.dat")
        if how == "killed when made":
            os.kill(os.getpid(), signal.SIGKILL)
        self.how = how

    def step(self, action: int):
        if self.count == 2:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "end":
                os._exit(0)
            elif self.how == "hang":
                time.sleep(1000)
            elif self.how == "exit":
                sys.exit(0)
            elif self.how == "two arguments":
                raise TwoArgumentsError(1, 2)
            elif self.how == "local":

                class LocalError(Exception):
                    """Cannot be pickled."""

                raise LocalError("no pickle")
        return super().step(action)


for _kind in (Helped, Leaving, Handling, Losing):
    gym.register(f"{_kind.__name__}-v0", _kind)
