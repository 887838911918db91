"""Fill replay with transitions of other origin, which `hvdqn/prefill.py` reads.

A file of transitions holds one array per key, with a row for each transition, in the order in which they happened:

    observations        [transitions, *shape], as the environment returns them; Dict and Tuple spaces flattened
    actions             [transitions], numbers of the environment's actions
    rewards             [transitions]
    next_observations   [transitions, *shape]
    terminations        [transitions], True where the episode reached its end
    truncations         [transitions], True where it was cut short; optional

Where a next observation is not the observation of the following row, the episode is taken as cut, so that single
transitions in any order are welcome too.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdqn.errors import UserError
from hvdqn.replay.replay import Replay
from hvdqn.step import Step

KEYS = ("observations", "actions", "rewards", "next_observations", "terminations")
"""Of a file, without `truncations`, which may be missing."""


@dataclass
class Transitions:
    """Transitions in order, as replay stores them; see the top of this file."""

    observation: NDArray[Any]
    action: NDArray[np.int64]
    reward: NDArray[np.float32]
    next_observation: NDArray[Any]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]

    def segments(self) -> list[tuple[int, int]]:
        """Return the first row of each uninterrupted piece of an episode, and the row after its last one."""
        ends = self.terminated | self.truncated
        same = self.observation[1:] == self.next_observation[:-1]
        ends[:-1] |= ~same.reshape(len(same), -1).all(axis=1)
        ends[-1:] = True
        cuts = np.flatnonzero(ends) + 1
        return list(zip([0, *cuts[:-1].tolist()], cuts.tolist(), strict=True))


def make_transitions(
    source: str, arrays: dict[str, NDArray[Any]], replay: Replay, actions: int, first_action: int
) -> Transitions:
    """Return the transitions in arrays as `replay` stores them.

    Args:
        source: what the user named, for messages.
        arrays: by their keys in a file, of equal length.
        replay: whose observations they must match.
        actions: number of actions.
        first_action: number of the environment's first action.

    Raises:
        UserError: they do not fit.
    """
    shape, dtype = replay.observation.shape[1:], replay.observation.dtype
    size = int(np.prod(shape, dtype=np.int64))
    for key in ("observations", "next_observations"):
        array = arrays[key]
        if array[0].size != size or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise UserError(
                f"--prefill '{source}': {key} have shape {list(array.shape[1:])} and dtype {array.dtype}, and replay "
                f"holds {list(shape)} of {dtype}; record them from this environment"
            )
    action = arrays["actions"]
    if action.dtype.kind not in "iu" or action.ndim != 1:
        raise UserError(f"--prefill '{source}': actions must be whole numbers [transitions]")
    action = action.astype(np.int64) - first_action
    if action.min() < 0 or action.max() >= actions:
        first, last = first_action, first_action + actions - 1
        raise UserError(f"--prefill '{source}': an action is outside of {first} to {last}")
    return Transitions(
        arrays["observations"].astype(dtype, copy=False).reshape(-1, *shape),
        action,
        arrays["rewards"].astype(np.float32).reshape(-1),
        arrays["next_observations"].astype(dtype, copy=False).reshape(-1, *shape),
        arrays["terminations"].astype(np.bool_).reshape(-1),
        arrays["truncations"].astype(np.bool_).reshape(-1),
    )


def share(lengths: list[int], index: int, envs: int, of: int) -> list[list[int]]:
    """Divide segments among the rings of all ranks, each to the ring that has the fewest transitions so far.

    Args:
        lengths: of all segments.
        index: this rank, among those that have a replay.
        envs: rings of one rank.
        of: number of ranks that have a replay.

    Returns:
        The numbers of the segments of each ring of this rank.
    """
    heap = [(0, ring) for ring in range(of * envs)]
    rings: list[list[int]] = [[] for _ in heap]
    for number, length in enumerate(lengths):
        filled, ring = heap[0]
        rings[ring].append(number)
        heapq.heapreplace(heap, (filled + length, ring))
    return rings[index * envs : (index + 1) * envs]


def fill(replay: Replay, known: Transitions, index: int, of: int, clip_rewards: bool) -> int:
    """Add this rank's share of transitions to its empty replay; return how many it holds then.

    Rings that are too short keep the newest ones. Call `Replay.start` before the first env step.
    """
    segments = known.segments()
    shares = share([end - first for first, end in segments], index, replay.envs, of)
    rows = [[row for number in ring for row in range(*segments[number])] for ring in shares]
    last = {segments[number][1] - 1 for ring in shares for number in ring}
    first = np.array([ring[0] if ring else 0 for ring in rows])
    replay.start(known.observation[first])
    reward = np.clip(known.reward, -1.0, 1.0) if clip_rewards else known.reward
    for time in range(max(map(len, rows))):
        valid = np.array([time < len(ring) for ring in rows])
        now = np.array([ring[min(time, len(ring) - 1)] if ring else 0 for ring in rows])
        after = np.array([ring[min(time + 1, len(ring) - 1)] if ring else 0 for ring in rows])
        ends = valid & np.array([row in last for row in now.tolist()])
        fresh = ends & (after != now)
        terminated = valid & known.terminated[now]
        following = known.next_observation[now]
        shaped = fresh.reshape(-1, *(1 for _ in following.shape[1:]))
        observation = np.where(shaped, known.observation[after], following)
        step = Step(reward[now], terminated, ends & ~terminated, following, observation, fresh, valid)
        replay.add(known.action[now], step)
    return len(replay)
