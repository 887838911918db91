"""Distribute saved replays over another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hvdqn.replay.batch import Rows
from hvdqn.replay.memory import Array
from hvdqn.replay.replay import NO_TRANSITION, Replay, State


def reshard(states: Sequence[Mapping[str, Array]], replay: Replay, rank: int, size: int) -> State:
    """Return an equal share of all saved replays, as a state that `replay` can load.

    All old rings are put end to end, each from its oldest row to its newest, and cut into one piece per new ring. A
    piece that is too long loses its oldest rows. Episodes that were going on are cut off, so call `Replay.start` next.
    Random states are not distributed: a rank keeps its own.

    Args:
        states: `Replay.state` of every rank of the old run, in order of rank; may be memory-mapped.
        replay: the empty replay of this rank.
        rank: this rank, among those that have a replay.
        size: number of ranks that have a replay now.
    """
    old = [(state, env, _by_age(state, env)) for state in states for env in range(state["serial"].size)]
    ends = np.cumsum([len(order) for *_, order in old])
    cuts = np.arange(size * replay.envs + 1) * int(ends[-1]) // (size * replay.envs)
    fields = [name.removeprefix("0/") for name in states[0] if name.startswith("0/")]
    new: State = {"serial": np.empty(replay.envs, np.int64)}
    if "largest" in states[0]:
        new["largest"] = np.max([state["largest"] for state in states], axis=0)
    for env in range(replay.envs):
        end = int(cuts[rank * replay.envs + env + 1])
        begin = max(int(cuts[rank * replay.envs + env]), end - replay.rows_per_env)
        parts = []
        for (state, old_env, order), last in zip(old, ends, strict=True):
            first = int(last) - len(order)
            rows = order[max(begin - first, 0) : max(end - first, 0)]
            parts.append(_part(state, old_env, rows, fields))
        ring = {field: np.concatenate([part[field] for part in parts]) for field in fields}
        ring["kind"][-1:] = NO_TRANSITION  # the newest row of a ring is that of the current observation
        new["serial"][env] = end - begin - 1
        new.update({f"{env}/{field}": values for field, values in ring.items()})
    return new


def _by_age(state: Mapping[str, Array], env: int) -> Rows:
    """Return the rows in use of one old ring, from the oldest to the newest."""
    used = len(state[f"{env}/kind"])
    serial = int(state["serial"][env])
    return np.arange(serial + 1 - used, serial + 1) % max(used, 1)


def _part(state: Mapping[str, Array], env: int, rows: Rows, fields: Sequence[str]) -> dict[str, Array]:
    """Return consecutive rows of one old ring. No transition begins where the frame stack needs earlier rows."""
    part = {field: state[f"{env}/{field}"][rows] for field in fields}
    part["kind"][part["reach"] > np.arange(rows.size)] = NO_TRANSITION
    return part
