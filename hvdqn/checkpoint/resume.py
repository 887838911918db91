"""Find the checkpoint that a run resumes from, and restore the state in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvdqn.checkpoint.contents import (
    LEARNER,
    Progress,
    check_learner,
    flat_learner,
    load_shared_state,
    rank_part,
)
from hvdqn.checkpoint.directory import Checkpoints
from hvdqn.checkpoint.files import BrokenCheckpointError, read_part
from hvdqn.checkpoint.manifest import (
    Checkpoint,
    OtherFormatError,
    UnreadablePartError,
    open_checkpoint,
)
from hvdqn.checkpoint.policy_file import POLICY, check_policy
from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.config import (
    Config,
    incidental_settings,
    same_setting,
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


def find_newest(
    config: Config, checkpoints: Checkpoints, run_dir: Path
) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that the run resumes from, or None, and a line of text for each warning.

    All ranks must call this together. It renames broken checkpoints. If no checkpoint is valid, it renames also the
    metrics and the summary of the earlier run, which the new one would overwrite.

    Raises:
        UserError: `--resume` does not allow what the directory holds, or a setting has changed that must not change.
    """
    try:
        found, broken = checkpoints.newest_valid(check_parts)
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


def check_parts(checkpoint: Checkpoint, files: Sequence[str]) -> None:
    """Check that a checkpoint has a file for each rank and the shared one, and that some of them can be read.

    Args:
        checkpoint: the checkpoint.
        files: the names of the files to read; each rank checks others.

    Raises:
        UnreadablePartError: the file of a single rank cannot be read.
        BrokenCheckpointError: a file is missing, or the one that all ranks share cannot be read.
    """
    path, ranks = checkpoint.path, checkpoint.world_size
    names = checkpoint.manifest["files"].keys()
    shared = (LEARNER, POLICY) if checkpoint.has_names else (LEARNER,)
    if len(names) != ranks + len(shared) or names != {
        f"{part}.safetensors" for part in (*shared, *map(rank_part, range(ranks)))
    }:
        raise BrokenCheckpointError(f"{path} does not have the parts of {ranks} ranks")
    for file in files:
        part = file.removesuffix(".safetensors")
        if part == LEARNER:
            _check_shared(read_part(path / file), path)
            continue
        if part == POLICY:
            check_policy(read_part(path / file), path / file)
            continue
        try:
            state = read_part(path / file)
        except BrokenCheckpointError as error:
            raise UnreadablePartError(str(error)) from None
        if not _is_rank_state(state):
            raise UnreadablePartError(f"{path / file} does not hold the state of a rank")


def _is_rank_state(state: Any) -> bool:
    """Return True if the content of a rank's file has the keys and types that `contents` gives it."""
    if not isinstance(state, dict) or not {"actor", "replay", "seconds", "torch"} <= state.keys():
        return False
    actor = state["actor"]
    return (
        isinstance(state["seconds"], dict)
        and isinstance(state["torch"], dict)
        and isinstance(state["replay"], (dict, type(None)))
        and (
            actor is None
            or (isinstance(actor, dict) and {"random", "frames", "environments"} <= actor.keys())
        )
    )


def _check_shared(state: Any, path: Path) -> None:
    """Raise BrokenCheckpointError unless the content of the shared file has the keys and types of `shared_state`."""
    check_learner(state, path)
    for name in ("counters", "clock", "progress"):
        if not isinstance(state.get(name), dict):
            raise BrokenCheckpointError(f"{path} holds no {name}")
    if not all(type(value) in (int, float) for value in state["clock"].values()):
        raise BrokenCheckpointError(f"{path}: the clock holds what is no number")


def _check_resume(resume: str, found: Checkpoint | None, broken: Mapping[str, str], run_dir: Path) -> None:
    """Raise UserError if `--resume` is "never" and there are checkpoints, or "must" and there is no valid one."""
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
        if not same_setting(name, before.get(name, now[name]), now[name]):
            raise UserError(
                f"'{run_dir}' was begun with --{name.replace('_', '-')} {before[name]}, not {now[name]}; "
                f"keep it, or choose another --run-dir"
            )


def best_evaluation(run_dir: Path) -> float:
    """Return the mean return of the best evaluation so far, from `checkpoints/best`; -inf if there is none."""
    try:
        best = open_checkpoint(run_dir / "checkpoints" / "best")
        about = best.read(POLICY)[POLICY] if best.has_names else best.read(LEARNER)
        return float(about["eval_return_mean"])
    except (BrokenCheckpointError, OSError, KeyError, TypeError, ValueError):
        return -math.inf


def reset_environments(parts: Parts, seed: int | None = None) -> None:
    """Reset the environments and store their first observations in replay, if this rank has environments.

    Args:
        parts: of this rank.
        seed: of the environments; without it they continue their random streams.
    """
    if parts.acting is not None:
        first = parts.acting.actor.start(seed)
        parts.acting.replay.start(first, parts.acting.envs.action_mask)


def restore(
    parts: Parts, checkpoint: Checkpoint, config: Config, comm: Comm, totals: Totals
) -> tuple[Progress, list[str]]:
    """Load a checkpoint into the parts of this rank. All ranks must call this together.

    If the number of ranks or the size of their replays has changed, this distributes the stored transitions over the
    ranks anew, and the environments and random generators start afresh. An unfinished rollout is dropped then.

    Returns:
        The progress of the run, and lines for the log: where it resumes, and everything that differs from before.

    Raises:
        UserError: on all ranks, if the settings make a network with another number of parameters, or the checkpoint
            does not fit these settings.
    """
    same_shapes = _same_shapes(checkpoint, config, comm)
    loaded = raise_on_all_ranks(
        comm, lambda: _load(parts, checkpoint, totals, comm.rank, same_shapes), parts.timer
    )
    shared, progress, own = loaded
    has_replay = _has_replay(shared, checkpoint, parts.clock, same_shapes)
    exact = False
    if own is not None:
        exact = parts.acting is None or parts.acting.actor.load_state(own["actor"])
    raise_on_all_ranks(comm, lambda: None if exact else reset_environments(parts), parts.timer)
    exact = all(comm.all_gather_object(exact))
    lines = _describe_resume(checkpoint, shared, parts.clock, comm.size, has_replay, exact)
    return progress, lines + _changed_settings(checkpoint.manifest["config"], config.flat())


def _load(
    parts: Parts, checkpoint: Checkpoint, totals: Totals, rank: int, same_shapes: bool
) -> tuple[Mapping[str, Any], Progress, Mapping[str, Any] | None]:
    """Load all state of a checkpoint but that of the environments.

    If `same_shapes`, this rank loads its own file unchanged. Else it loads its share of all ranks' replays.

    Returns:
        The content of the shared file; the progress; and the content of this rank's file if its environments may
        continue from it, else None.

    Raises:
        UserError: the checkpoint does not fit these settings.
    """
    try:
        shared = _read_shared(parts, checkpoint)
        has_replay = _has_replay(shared, checkpoint, parts.clock, same_shapes)
        progress = load_shared_state(shared, parts, totals, refill=not has_replay)
        if checkpoint.unreadable:
            return shared, progress, None
        # The files are memory-mapped, so a rank reads from disk only what it uses of the other ranks' replays.
        ranks = [rank] if same_shapes else range(checkpoint.world_size)
        shards = [checkpoint.read(rank_part(index)) for index in ranks]
        parts.timer.load(shards[0]["seconds"])
        if not has_replay:
            return shared, progress, None
        if not same_shapes:
            _reshard_replay(parts, shards)
            return shared, progress, None
        _load_rank_state(parts, shards[0])
        return shared, progress, shards[0]
    except UserError:
        raise
    except (
        BrokenCheckpointError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"'{checkpoint.path}' does not fit this run ({reason}); rename it to resume from the one before it"
        ) from error


def _has_replay(shared: Mapping[str, Any], checkpoint: Checkpoint, clock: Clock, same_shapes: bool) -> bool:
    """Return True if the ranks can go on with the transitions in a checkpoint; they never reshard a rollout."""
    kept = bool(shared["progress"]["keeps_replay"]) and not checkpoint.unreadable
    return kept and (same_shapes or clock.rollout_steps == 0)


def _read_shared(parts: Parts, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the part that all ranks share, with flat tensors.

    Raises:
        UserError: the network of the checkpoint is another one.
    """
    shared: dict[str, Any] = checkpoint.read(LEARNER)
    no_parameters = {POLICY, *parts.learner.online.state_buffers()}
    named = (
        {name: array for name, array in checkpoint.read(POLICY).items() if name not in no_parameters}
        if checkpoint.has_names
        else {}
    )
    before = sum(array.size for array in named.values()) if named else shared["learner"]["online"].size
    now = parts.learner.online.num_parameters
    if before != now:
        raise UserError(
            f"'{checkpoint.path}' holds {before:,} parameters, these settings make {now:,}; keep the network's "
            "settings, or choose another --run-dir"
        )
    if named:
        shared["learner"] = flat_learner(shared["learner"], named, parts.learner.online)
    return shared


def _same_shapes(checkpoint: Checkpoint, config: Config, comm: Comm) -> bool:
    """Return True if each rank can load its own file unchanged: as many ranks, and the same settings, as before."""
    before, now = checkpoint.manifest["config"], config.flat()
    return checkpoint.world_size == comm.size and all(
        before.get(name, now[name]) == now[name] for name in settings_of_exact_resume()
    )


def _load_rank_state(parts: Parts, state: Mapping[str, Any]) -> None:
    """Load the content of this rank's own file, except the state of its environments."""
    parts.clock.load_own_state(state.get("clock", {}))
    try:
        load_torch_state(state["torch"], parts.device)
    except RuntimeError as error:
        raise ValueError(f"torch's generator: {error}") from None
    if parts.acting is not None:
        parts.acting.replay.load_state(state["replay"])


def _reshard_replay(parts: Parts, shards: Sequence[Mapping[str, Any]]) -> None:
    """Load into this rank's replay its share of the transitions of all old ranks.

    Args:
        parts: this rank's parts.
        shards: the content of the file of each old rank.
    """
    if parts.acting is None:
        return
    states = [shard["replay"] for shard in shards if shard["replay"] is not None]
    replay, role = parts.acting.replay, parts.role
    replay.load_state(reshard(states, replay, role.index, role.of))


def _describe_resume(
    checkpoint: Checkpoint, shared: Mapping[str, Any], clock: Clock, size: int, has_replay: bool, exact: bool
) -> list[str]:
    """Return lines for the log: where the run resumes, and what differs from before; settings come separately."""
    lines = [f"resumed from {checkpoint.path} at env step {clock.env_steps:,}"]
    fills = f"fills for {clock.learning_starts:,} env steps before the next update"
    if checkpoint.world_size != size:
        ranks = "rank" + "s" * (checkpoint.world_size > 1)
        resharded = "replay is resharded, " if has_replay else ""
        lines.append(
            f"{checkpoint.world_size} {ranks} before, {size} now: {resharded}the global batch was "
            f"{shared['clock']['global_batch']}, is {clock.global_batch}; clock and schedules continue"
        )
    if checkpoint.unreadable:
        lines.append(
            f"{checkpoint.unreadable}. {'A rollout begins' if clock.rollout_steps else f'Replay {fills}'}"
        )
    elif not has_replay:
        without = (
            "a new rollout begins" if clock.rollout_steps else f"the checkpoint holds no replay: it {fills}"
        )
        lines.append(without)
    if not exact:
        lines.append("environments begin new episodes: this resume is not bit for bit")
    return lines


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for the log for each setting whose value differs from that in the checkpoint."""
    unreported = incidental_settings()
    return [
        f"--{name.replace('_', '-')} was {before[name]}, is {value}"
        for name, value in now.items()
        if name in before and name not in unreported and not same_setting(name, before[name], value)
    ]
