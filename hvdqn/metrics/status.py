"""The state of a run as text, the same for the progress bar and the plain lines."""

from __future__ import annotations

import math
from collections import deque

from hvdqn.metrics.writers import Record


class Status:
    """Hold what both consoles show: the newest counters, the last value of each quantity, the recent speed."""

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
        self._updates = 0
        self._values: dict[str, float] = {}
        self._recent: deque[tuple[float, int]] = deque()

    def update(self, record: Record) -> None:
        """Add one record. A value that it does not have, or that is not finite, keeps its last number."""
        if record.env_steps <= self.env_steps:  # an evaluation: its time is not that of the env steps
            self._recent.clear()
        self.env_steps, self._updates = record.env_steps, record.updates
        self._values.update({name: v for name, v in record.values.items() if math.isfinite(v)})
        self._recent.append((record.wall_seconds, record.env_steps))
        while (
            len(self._recent) > 2 and record.wall_seconds - self._recent[1][0] >= self._SPEED_WINDOW_SECONDS
        ):
            self._recent.popleft()

    def progress(self) -> str:
        """Return the env steps done, such as `12,800/50,000 (25%)`."""
        percent = 100 * self.env_steps // max(1, self.total_env_steps)
        return f"{self.env_steps:,}/{self.total_env_steps:,} ({percent}%)"

    def speed(self) -> str:
        """Return the env steps per second of the last seconds, such as `8,912/s`."""
        return f"{number(self._env_steps_per_second())}/s"

    def time_left(self) -> str:
        """Return the time left at the recent speed, such as `left 0:00:04`."""
        env_steps_per_second = self._env_steps_per_second()
        if self.env_steps >= self.total_env_steps:
            return "left 0:00:00"
        if not env_steps_per_second > 0:
            return "left ?"
        seconds = math.ceil((self.total_env_steps - self.env_steps) / env_steps_per_second)
        return f"left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def learning(self) -> list[str]:
        """Return the known values of learning, such as `updates 1,421`, `return 143.2` and `loss 0.0213`."""
        known = [
            f"{label} {number(self._values[name])}" for label, name in self._SHOWN if name in self._values
        ]
        return [f"updates {self._updates:,}", *known]

    def _env_steps_per_second(self) -> float:
        if not self._recent:
            return math.nan
        (first_seconds, first), (last_seconds, last) = self._recent[0], self._recent[-1]
        if last_seconds > first_seconds:
            return (last - first) / (last_seconds - first_seconds)
        return self._values.get("env_steps_per_second", math.nan)


def number(value: float) -> str:
    """Format a number for people: three digits if it is below 1, else four, with commas between thousands."""
    if not math.isfinite(value):
        return "?"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
