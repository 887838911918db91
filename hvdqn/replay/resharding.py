"""Replay shards dealt anew, for a run that resumes with another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hvdqn.replay.frames import Array, Rows
from hvdqn.replay.storage import BOUNDARY, Ring, State


def reshard(states: Sequence[Mapping[str, Array]], ring: Ring, rank: int, size: int) -> State:
    """This rank's equal share of all shards, as a state for `ring`.

    All old rings are laid end to end, each from its oldest row to its newest, and cut into as many pieces as
    there are rings now; a piece that is too long loses its oldest rows. Episodes that go on are not among the
    things dealt, so `start` must follow. Random states are not dealt either: a rank keeps its own.

    Args:
        states: `Replay.state` of every rank of the old run, in order of rank; may be memory-mapped.
        ring: the ring of this rank, which the state is to fill.
        rank: this rank.
        size: ranks there are now.
    """
    old = [(state, env, _by_age(state, env)) for state in states for env in range(state["serial"].size)]
    ends = np.cumsum([len(order) for *_, order in old])
    cuts = np.arange(size * ring.envs + 1) * int(ends[-1]) // (size * ring.envs)
    fields = [name.removeprefix("0/") for name in states[0] if name.startswith("0/")]
    dealt: State = {"serial": np.empty(ring.envs, np.int64)}
    if "largest" in states[0]:
        dealt["largest"] = np.max([state["largest"] for state in states], axis=0)
    for env in range(ring.envs):
        end = int(cuts[rank * ring.envs + env + 1])
        begin = max(int(cuts[rank * ring.envs + env]), end - ring.rows_per_env)
        parts = []
        for (state, old_env, order), last in zip(old, ends, strict=True):
            first = int(last) - len(order)
            rows = order[max(begin - first, 0) : max(end - first, 0)]
            parts.append(_part(state, old_env, rows, fields))
        whole = {field: np.concatenate([part[field] for part in parts]) for field in fields}
        whole["kind"][-1:] = BOUNDARY  # it takes the place of the open row
        dealt["serial"][env] = end - begin - 1
        dealt.update({f"{env}/{field}": values for field, values in whole.items()})
    return dealt


def _by_age(state: Mapping[str, Array], env: int) -> Rows:
    """The rows in use of one old ring, from the oldest to the open one."""
    used = len(state[f"{env}/kind"])
    serial = int(state["serial"][env])
    return np.arange(serial + 1 - used, serial + 1) % max(used, 1)


def _part(state: Mapping[str, Array], env: int, rows: Rows, fields: Sequence[str]) -> dict[str, Array]:
    """Some consecutive rows of one old ring; those whose frame stack begins before them start no transition."""
    part = {field: state[f"{env}/{field}"][rows] for field in fields}
    part["kind"][part["reach"] > np.arange(rows.size)] = BOUNDARY
    return part
