"""Finding the checkpoint that a run resumes from, and restoring the state in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvdqn.checkpoint.contents import LEARNER, Progress, load_shared_state, rank_part
from hvdqn.checkpoint.directory import Checkpoint, Checkpoints, OtherFormatError, open_checkpoint
from hvdqn.checkpoint.files import BrokenCheckpointError
from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.config import (
    Config,
    incidental_settings,
    settings_fixed_on_resume,
    settings_of_exact_resume,
)
from hvdqn.errors import UserError
from hvdqn.faults import raise_on_all_ranks
from hvdqn.metrics import METRICS_FILE, SUMMARY_FILE
from hvdqn.rank import Parts
from hvdqn.replay import reshard
from hvdqn.run_directory import set_aside
from hvdqn.seeds import load_torch_state
from hvdqn.sync import Totals


def find_checkpoint(
    config: Config, checkpoints: Checkpoints, run_dir: Path
) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that the run resumes from, or None, and a line of text for each warning.

    This call is collective. It renames broken checkpoints and, if no checkpoint is valid, the records of the run,
    which would be overwritten.

    Raises:
        UserError: `--resume` does not allow what the directory holds, or a setting has changed that must not change.
    """
    try:
        found, broken = checkpoints.newest_valid()
    except OtherFormatError as error:
        raise UserError(
            f"{error}; resume with the version that wrote it, or choose another --run-dir"
        ) from None
    _check_resume(config.run.resume, found, broken, run_dir)
    if found is not None:
        _check_fixed(found.manifest["config"], config.flat(), run_dir)
    checkpoints.set_aside_broken(found, broken)
    lines = [f"checkpoint {name} is set aside as {name}.broken: {why}" for name, why in broken.items()]
    kept: list[str] = []
    if found is None and checkpoints.comm.rank == 0:
        with suppress(OSError):
            kept = [name for file in (METRICS_FILE, SUMMARY_FILE) if (name := set_aside(run_dir / file))]
    if found is None and (broken or kept):
        what = "no checkpoint is valid" if broken else "there is no checkpoint"
        where = f"; its records until now are in {' and '.join(kept)}" if kept else ""
        lines.append(f"{what}: the run starts from the beginning{where}")
    return found, lines


def _check_resume(resume: str, found: Checkpoint | None, broken: Mapping[str, str], run_dir: Path) -> None:
    """Compare `--resume` with what the run directory holds."""
    if resume == "never" and (found or broken):
        raise UserError(
            f"'{run_dir}' holds checkpoints and --resume is never; "
            f"resume with --resume auto, or choose another --run-dir"
        )
    if resume == "must" and found is None:
        reason = f"no valid checkpoint ({next(iter(broken.values()))})" if broken else "no checkpoint"
        raise UserError(f"--resume must, but '{run_dir}' holds {reason}; give the --run-dir of a run")


def _check_fixed(before: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    for name in settings_fixed_on_resume():
        if before.get(name, now[name]) != now[name]:
            raise UserError(
                f"'{run_dir}' was begun with --{name.replace('_', '-')} {before[name]}, not {now[name]}; "
                f"keep it, or choose another --run-dir"
            )


def best_evaluation(run_dir: Path) -> float:
    """Return the mean return of the evaluation whose weights `checkpoints/best` holds; -inf without one."""
    try:
        return float(open_checkpoint(run_dir / "checkpoints" / "best").read(LEARNER)["eval_return_mean"])
    except (BrokenCheckpointError, OSError):
        return -math.inf


def reset_environments(parts: Parts) -> None:
    """Reset the environments and add their first observations to replay, on a rank that acts."""
    if parts.acting is not None:
        parts.acting.replay.start(parts.acting.actor.start())


def restore(
    parts: Parts, checkpoint: Checkpoint, config: Config, comm: Comm, totals: Totals
) -> tuple[Progress, list[str]]:
    """Load a checkpoint into the parts of this rank; a collective call.

    If the number of ranks or the shape of their replay has changed, the stored transitions are resharded, and the
    environments and random streams start anew.

    Returns:
        The progress of the run, and lines of text: where it resumes, and everything that differs from before.

    Raises:
        UserError: the settings make a network with another number of parameters.
    """
    shared = checkpoint.read(LEARNER)
    _check_parameters(shared["learner"]["online"].size, parts.learner.parameters.numel(), checkpoint.path)
    same_shapes = _same_shapes(checkpoint, config, comm)
    # The files are memory-mapped: a rank reads from disk only what it uses of the other ranks' shards.
    ranks = [comm.rank] if same_shapes else range(checkpoint.world_size)
    shards = [checkpoint.read(rank_part(rank)) for rank in ranks]
    has_replay = bool(shared["progress"]["keeps_replay"])
    progress = load_shared_state(shared, parts, totals, refill=not has_replay)
    parts.timer.load(shards[0]["seconds"])
    exact = False
    if has_replay and same_shapes:
        exact = _load_rank_state(parts, shards[0])
    elif has_replay:
        _reshard_replay(parts, shards)
    raise_on_all_ranks(comm, lambda: None if exact else reset_environments(parts), parts.timer)
    exact = all(comm.all_gather_object(exact))
    lines = _describe_resume(checkpoint, shared, parts.clock, comm.size, has_replay, exact)
    return progress, lines + _changed_settings(checkpoint.manifest["config"], config.flat())


def _check_parameters(before: int, now: int, path: Path) -> None:
    if before != now:
        raise UserError(
            f"'{path}' holds {before:,} parameters, these settings make {now:,}; keep the network's settings, or "
            f"choose another --run-dir"
        )


def _same_shapes(checkpoint: Checkpoint, config: Config, comm: Comm) -> bool:
    """Return True if each rank can load its own shard as it is."""
    before, now = checkpoint.manifest["config"], config.flat()
    return checkpoint.world_size == comm.size and all(
        before[name] == now[name] for name in settings_of_exact_resume()
    )


def _load_rank_state(parts: Parts, state: Mapping[str, Any]) -> bool:
    """Load what this rank wrote itself; return False if its environments must be reset."""
    parts.clock.load_own_state(state.get("clock", {}))
    load_torch_state(state["torch"], parts.device)
    if parts.acting is None:
        return True
    parts.acting.replay.load_state(state["replay"])
    return parts.acting.actor.load_state(state["actor"])


def _reshard_replay(parts: Parts, shards: Sequence[Mapping[str, Any]]) -> None:
    """Load this rank's share of the transitions in all shards."""
    if parts.acting is None:
        return
    states = [shard["replay"] for shard in shards if shard["replay"] is not None]
    replay, role = parts.acting.replay, parts.role
    replay.load_state(reshard(states, replay, role.index, role.of))


def _describe_resume(
    checkpoint: Checkpoint, shared: Mapping[str, Any], clock: Clock, size: int, has_replay: bool, exact: bool
) -> list[str]:
    """Return lines of text: where the run resumes, and what differs from before, settings aside."""
    lines = [f"resumed from {checkpoint.path} at env step {clock.env_steps:,}"]
    if checkpoint.world_size != size:
        ranks = "rank" + "s" * (checkpoint.world_size > 1)
        lines.append(
            f"{checkpoint.world_size} {ranks} before, {size} now: replay is resharded, the global batch was "
            f"{shared['clock']['global_batch']}, is {clock.global_batch}; clock and schedules continue"
        )
    if not has_replay:
        lines.append(
            f"the checkpoint holds no replay: it fills for {clock.learning_starts:,} env steps before the next update"
        )
    if not exact:
        lines.append("environments begin new episodes: this resume is not bit for bit")
    return lines


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line of text for each setting that differs from before."""
    unreported = incidental_settings()
    return [
        f"--{name.replace('_', '-')} was {before[name]}, is {value}"
        for name, value in now.items()
        if name in before and name not in unreported and before[name] != value
    ]
