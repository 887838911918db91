"""Distribute the replays of a checkpoint over another number of ranks, when a run resumes with more or fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hvdqn.replay.batch import Rows
from hvdqn.replay.memory import Array
from hvdqn.replay.replay import NO_TRANSITION, Replay, State
from hvdqn.replay.streamed import StreamedArray


def reshard(states: Sequence[Mapping[str, Array]], replay: Replay, rank: int, size: int) -> State:
    """Return this rank's share of all saved replays, as large as every other rank's; `replay` can load it.

    This puts all saved rings (one per environment) end to end, each from its oldest row to its newest, and cuts the
    result into one piece per new ring. A piece that is too long loses its oldest rows. The last episode of each saved
    ring gets no end, so call `Replay.start` next. A rank keeps its own random state.

    The arrays returned read the saved ones piece by piece while `replay` loads them, so that memory never holds a
    second copy of a ring.

    Args:
        states: `Replay.state` of every rank of the old run, in order of rank; may be memory-mapped.
        replay: the empty replay of this rank.
        rank: the number of this rank among those that have a replay.
        size: number of ranks that have a replay now.
    """
    old = [OldRing(state, env) for state in states for env in range(state["serial"].size)]
    ends = np.cumsum([ring.rows for ring in old])
    cuts = np.arange(size * replay.envs + 1) * int(ends[-1]) // (size * replay.envs)
    fields = [name.removeprefix("0/") for name in states[0] if name.startswith("0/")]
    serial = np.empty(replay.envs, np.int64)
    new: State = {"serial": serial}
    if "largest" in states[0]:
        new["largest"] = np.max([state["largest"] for state in states], axis=0)
    for env in range(replay.envs):
        end = int(cuts[rank * replay.envs + env + 1])
        begin = max(int(cuts[rank * replay.envs + env]), end - replay.rows_per_env)
        parts = []
        for ring, last in zip(old, ends.tolist(), strict=True):
            first = last - ring.rows
            if begin < last and first < end:
                parts.append(Part(ring, max(begin - first, 0), min(end - first, ring.rows)))
        serial[env] = end - begin - 1
        for field in fields:
            example = states[0][f"0/{field}"]
            shape = (end - begin, *example.shape[1:])
            new[f"{env}/{field}"] = StreamedArray(shape, example.dtype, partial(_read, parts, field))
    return new


class OldRing:
    """Reads the rows of one saved ring by age: number 0 is the oldest row.

    Args:
        state: what `Replay.state` returned on the rank that had this ring.
        env: the number of the ring's environment on that rank.
    """

    def __init__(self, state: Mapping[str, Array], env: int) -> None:
        self.state, self.env = state, env
        self.rows = len(state[f"{env}/kind"])
        self.oldest_serial = int(state["serial"][env]) + 1 - self.rows

    def read(self, field: str, ages: Rows) -> Array:
        """Return the rows of these ages [n] of the array `field`, as `[n, ...]`."""
        array: Array = self.state[f"{self.env}/{field}"][(self.oldest_serial + ages) % self.rows]
        return array


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a saved ring, from age `first` up to but not including `end`; they go into one new ring."""

    ring: OldRing
    first: int
    end: int

    def read(self, field: str, first: int, end: int) -> Array:
        """Return the rows [first, end) of the array `field`; this part's first row has number 0."""
        ages = np.arange(self.first + first, self.first + end)
        array = self.ring.read(field, ages)
        if field == "kind":
            # A row whose frame stack needs rows from before this part cannot begin a transition.
            array[self.ring.read("reach", ages) > np.arange(first, end)] = NO_TRANSITION
        return array


def _read(parts: Sequence[Part], field: str, first: int, end: int) -> Array:
    """Return the rows [first, end) of the array `field` of a new ring that consists of `parts`, in this order."""
    found, begin = [], 0
    for part in parts:
        rows = part.end - part.first
        low, high = max(first - begin, 0), min(end - begin, rows)
        if low < high:
            found.append(part.read(field, low, high))
        begin += rows
    array = found[0] if len(found) == 1 else np.concatenate(found)
    if field == "kind" and end == begin:
        array[-1:] = NO_TRANSITION  # a ring's newest row holds the current observation, without an action yet
    return array
