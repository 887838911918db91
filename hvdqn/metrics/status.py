"""The state of a run as text, the same for the progress bar and the plain lines."""

from __future__ import annotations

import math
from collections import deque

from hvdqn.metrics.writers import Record


class Status:
    """Hold what the consoles show: the newest counters, the last value of each quantity, and the recent speed."""

    _SHOWN = (
        ("return", "episode_return_mean"),
        ("eval return", "eval_return_mean"),
        ("loss", "loss"),
        ("epsilon", "epsilon"),
    )
    _SPEED_WINDOW_SECONDS = 10.0

    def __init__(self, total_env_steps: int) -> None:
        self.total_env_steps = total_env_steps
        self.env_steps = 0
        self.activity = ""  # what the ranks do besides training
        self._updates = 0
        self._values: dict[str, float] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._speed = math.nan

    def update(self, record: Record) -> None:
        """Take over the values of a record. A quantity that is missing or not finite keeps its last value."""
        moved = record.env_steps != self.env_steps
        self.env_steps, self._updates = record.env_steps, record.updates
        self._values.update({name: v for name, v in record.values.items() if math.isfinite(v)})
        if not moved:  # such as an evaluation, whose time does not count for the speed
            self._recent.clear()
        self._recent.append((record.wall_seconds, record.env_steps))
        while (
            len(self._recent) > 2 and record.wall_seconds - self._recent[1][0] >= self._SPEED_WINDOW_SECONDS
        ):
            self._recent.popleft()
        (first_seconds, first), (last_seconds, last) = self._recent[0], self._recent[-1]
        if last_seconds > first_seconds:
            self._speed = (last - first) / (last_seconds - first_seconds)
        elif math.isnan(self._speed):
            self._speed = self._values.get("env_steps_per_second", math.nan)

    def progress(self) -> str:
        """Return the env steps done, such as `12,800/50,000 (25%)`."""
        percent = 100 * self.env_steps // max(1, self.total_env_steps)
        return f"{self.env_steps:,}/{self.total_env_steps:,} ({percent}%)"

    def speed(self) -> str:
        """Return the env steps per second of the last seconds, such as `8,912/s`."""
        return f"{number(self._speed)}/s"

    def time_left(self) -> str:
        """Return the time left at the recent speed, such as `left 0:00:04`."""
        env_steps_left = max(0, self.total_env_steps - self.env_steps)
        if env_steps_left and not self._speed > 0:
            return "left ?"
        seconds = math.ceil(env_steps_left / self._speed) if env_steps_left else 0
        return f"left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def activities(self) -> list[str]:
        """Return what the ranks do besides training, such as `evaluation: 3 of 10 episodes`."""
        return [self.activity] if self.activity else []

    def learning(self) -> list[str]:
        """Return the last values of updates, return, loss and epsilon, such as `return 143.2` and `loss 0.0213`."""
        known = [
            f"{label} {number(self._values[name])}" for label, name in self._SHOWN if name in self._values
        ]
        return [f"updates {self._updates:,}", *known]


def number(value: float) -> str:
    """Format a number for people: three digits if it is below 1, else four, with commas between thousands."""
    if not math.isfinite(value):
        return "?"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
