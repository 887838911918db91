"""Distribute saved replays over another number of ranks."""

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
    """Return an equal share of all saved replays, as a state that `replay` can load.

    All old rings are put end to end, each from its oldest row to its newest, and cut into one piece per new ring. A
    piece that is too long loses its oldest rows. Episodes that were going on are cut off, so call `Replay.start` next.
    Random states are not distributed: a rank keeps its own.

    The new rings are streams that read the old ones piece by piece while they are loaded: there is no copy of a ring in
    memory besides the one that is filled.

    Args:
        states: `Replay.state` of every rank of the old run, in order of rank; may be memory-mapped.
        replay: the empty replay of this rank.
        rank: this rank, among those that have a replay.
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
    """The rows in use of one saved ring, numbered by age: 0 is the oldest.

    Args:
        state: of the rank that the ring belongs to.
        env: its environment.
    """

    def __init__(self, state: Mapping[str, Array], env: int) -> None:
        self.state, self.env = state, env
        self.rows = len(state[f"{env}/kind"])
        self.oldest_serial = int(state["serial"][env]) + 1 - self.rows

    def read(self, field: str, ages: Rows) -> Array:
        """Return these rows of a field."""
        array: Array = self.state[f"{self.env}/{field}"][(self.oldest_serial + ages) % self.rows]
        return array


@dataclass(frozen=True)
class Part:
    """Consecutive rows of an old ring, of ages `first` up to `end`, that become part of a new ring."""

    ring: OldRing
    first: int
    end: int

    def read(self, field: str, first: int, end: int) -> Array:
        """Return rows of a field, counted from the beginning of this part."""
        ages = np.arange(self.first + first, self.first + end)
        array = self.ring.read(field, ages)
        if field == "kind":
            # No transition begins where the frame stack needs rows before this part.
            array[self.ring.read("reach", ages) > np.arange(first, end)] = NO_TRANSITION
        return array


def _read(parts: Sequence[Part], field: str, first: int, end: int) -> Array:
    """Return the rows from `first` up to `end` of a new ring that consists of these parts."""
    found, begin = [], 0
    for part in parts:
        rows = part.end - part.first
        low, high = max(first - begin, 0), min(end - begin, rows)
        if low < high:
            found.append(part.read(field, low, high))
        begin += rows
    array = found[0] if len(found) == 1 else np.concatenate(found)
    if field == "kind" and end == begin:
        array[-1:] = NO_TRANSITION  # the newest row of a ring is that of the current observation
    return array
