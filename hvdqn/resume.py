"""What a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvdqn.checkpoint import (
    LEARNER,
    BrokenCheckpointError,
    Checkpoint,
    Checkpoints,
    OtherFormatError,
    open_checkpoint,
    rank_part,
)
from hvdqn.comm import Comm
from hvdqn.config import Config, acting_place, acting_ranks
from hvdqn.errors import UserError
from hvdqn.metrics import METRICS_FILE, SUMMARY_FILE
from hvdqn.parts import Parts
from hvdqn.replay import reshard
from hvdqn.seeds import load_torch_state, torch_state

# What a run is of cannot change between its attempts: its seed, its environment, its network and its optimizer.
FIXED = (
    "seed", "env", "env_kwargs", "wrapper", "frame_stack", "torso", "hidden", "head", "dueling", "noisy", "layer_norm",
    "center_images", "atoms", "v_min", "v_max", "quantiles", "iqn_embedding", "optimizer", "replay", "sync", "outer_lr",
    "outer_momentum",
)  # fmt: skip
# Nor can these, if it is to go on bit for bit.
SHAPES = ("envs_per_rank", "replay_capacity", "vectorization")
# These say where and how a run is started, not what it is.
INCIDENTAL = {"run_dir", "resume", "preset"}


@dataclass
class Progress:
    """What a run has counted besides its clock: it goes on counting when it is resumed."""

    failed_checkpoints: int = 0
    evaluated_at_env_steps: int = -1
    evaluation: dict[str, float] = field(default_factory=dict)
    keeps_replay: bool | None = None  # not decided yet
    world_changes: int = 0  # of elastic runs


def contents(parts: Parts, comm: Comm, progress: Progress) -> dict[str, Any]:
    """What this rank writes into a checkpoint."""
    written: dict[str, Any] = {
        rank_part(comm.rank): {
            "actor": parts.actor.state(),
            "clock": parts.clock.own_state(),
            "replay": parts.replay.state() if progress.keeps_replay else None,
            "seconds": parts.timer.seconds(),
            "torch": torch_state(parts.device),
        }
    }
    if comm.rank == 0:
        written[LEARNER] = {
            "learner": parts.learner.state(),
            "counters": parts.learner.counters(),
            "clock": parts.clock.state(),
            "progress": asdict(progress),
        }
    return written


def find_checkpoint(
    config: Config, checkpoints: Checkpoints, run_dir: Path
) -> tuple[Checkpoint | None, list[str]]:
    """Where to go on, and what is wrong with newer checkpoints, which are set aside; a collective call.

    Raises:
        UserError: `--resume` forbids what is there, or asks for what is not.
    """
    try:
        found, broken = checkpoints.newest_whole()
    except OtherFormatError as error:
        raise UserError(
            f"{error}; go on with the version that wrote it, or choose another --run-dir"
        ) from None
    if config.run.resume == "never" and (found or broken):
        raise UserError(
            f"'{run_dir}' holds checkpoints and --resume is never; "
            f"go on with --resume auto, or choose another --run-dir"
        )
    if found is None and config.run.resume == "must":
        reason = f"none is whole ({next(iter(broken.values()))})" if broken else "there is none"
        raise UserError(
            f"--resume must, but of checkpoints in '{run_dir}' {reason}; give the --run-dir of a run"
        )
    if found is not None:
        _check_fixed(found.manifest["config"], config.flat(), run_dir)
    checkpoints.fall_back(found, broken)
    lines = [
        f"warning: checkpoint {name} is set aside as {name}.broken: {why}" for name, why in broken.items()
    ]
    kept: list[str] = []
    if found is None and checkpoints.comm.rank == 0:
        with suppress(OSError):
            kept = [name for file in (METRICS_FILE, SUMMARY_FILE) if (name := set_aside(run_dir / file))]
    if found is None and (broken or kept):
        what = "no checkpoint is whole" if broken else "there is no checkpoint"
        where = f"; its records until now are in {' and '.join(kept)}" if kept else ""
        lines.append(f"warning: {what}: the run begins anew{where}")
    return found, lines


def set_aside(path: Path) -> str:
    """Rename a file that would be overwritten; its new name, or "" where there is nothing in it.

    Raises:
        OSError: it cannot be renamed.
    """
    if not path.is_file() or not path.stat().st_size:
        return ""
    old, number = path.with_name(f"{path.name}.old"), 1
    while old.exists():
        number += 1
        old = path.with_name(f"{path.name}.old{number}")
    return path.rename(old).name


def _check_fixed(before: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    for name in FIXED:
        if before.get(name, now[name]) != now[name]:
            raise UserError(
                f"'{run_dir}' was begun with --{name.replace('_', '-')} {before[name]}, not {now[name]}; "
                f"keep it, or choose another --run-dir"
            )


def best_evaluation(run_dir: Path) -> float:
    """Mean return of the evaluation whose weights `checkpoints/best` holds; -inf without one."""
    try:
        return float(open_checkpoint(run_dir / "checkpoints" / "best").read(LEARNER)["eval_return_mean"])
    except (BrokenCheckpointError, OSError):
        return -math.inf


def begin(parts: Parts) -> None:
    """Begin a run: reset the environments, put their observations into replay."""
    parts.replay.start(parts.actor.start())


def restore(parts: Parts, checkpoint: Checkpoint, config: Config, comm: Comm) -> tuple[Progress, list[str]]:
    """Put every part where the checkpoint was taken.

    Returns:
        What the run had counted; and one line for the place, and one for each thing that is not as it was.

    Raises:
        UserError: the settings now make a network of another size.
    """
    shared = checkpoint.read(LEARNER)
    weights = {name: torch.tensor(array) for name, array in shared["learner"].items()}
    had, has = weights["online"].numel(), parts.learner.parameters.numel()
    if had != has:
        raise UserError(
            f"'{checkpoint.path}' holds {had:,} parameters, these settings make {has:,}; keep the network's "
            f"settings, or choose another --run-dir"
        )
    parts.learner.load_state(weights)
    parts.learner.load_counters(shared["counters"])
    kept, exact = _restore_shard(parts, checkpoint, shared["clock"], config, comm)
    if not exact:
        begin(parts)
    exact = all(comm.all_gather_object(exact))
    lines = [f"resumed from {checkpoint.path} at env step {parts.clock.env_steps:,}"]
    if checkpoint.world_size != comm.size:
        ranks = "rank" + "s" * (checkpoint.world_size > 1)
        lines.append(
            f"{checkpoint.world_size} {ranks} before, {comm.size} now: replay is dealt anew, the global batch was "
            f"{shared['clock']['global_batch']}, is {parts.clock.global_batch}; clock and schedules go on"
        )
    if not kept:
        lines.append(
            f"the checkpoint holds no replay: it fills for {parts.clock.learning_starts:,} env steps before the "
            f"next update"
        )
    if not exact:
        lines.append("environments begin new episodes: this resume is not bit for bit")
    lines += _changed_settings(checkpoint.manifest["config"], config.flat())
    return Progress(**shared["progress"]), lines


def _restore_shard(
    parts: Parts, checkpoint: Checkpoint, clock: Mapping[str, Any], config: Config, comm: Comm
) -> tuple[bool, bool]:
    """What is each rank's own; whether replay was kept, and whether the environments go on where they were."""
    before, now = checkpoint.manifest["config"], config.flat()
    same_world = checkpoint.world_size == comm.size
    same_shapes = same_world and all(before[name] == now[name] for name in SHAPES)
    ranks = [comm.rank] if same_shapes else range(checkpoint.world_size)
    # Mapped from their files: what a rank does not need of them is not read.
    shards = [checkpoint.read(rank_part(rank)) for rank in ranks]
    parts.timer.load(shards[0]["seconds"])
    kept = all(shard["replay"] is not None for shard in shards)
    parts.clock.resume(clock, refill=not kept)
    if kept and same_shapes:
        parts.clock.load_own_state(shards[0].get("clock", {}))
        parts.replay.load_state(shards[0]["replay"])
    elif kept and not (config.parallel.sync == "server" and comm.rank == 0):  # who serves does not learn
        place = acting_place(config, comm.rank), acting_ranks(config, comm.size)
        resharded = reshard([shard["replay"] for shard in shards], parts.replay, *place)
        parts.replay.load_state(resharded)
    if not (kept and same_shapes):
        return kept, False
    load_torch_state(shards[0]["torch"], parts.device)
    return kept, parts.actor.load_state(shards[0]["actor"])


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} was {before[name]}, is {value}"
        for name, value in now.items()
        if name in before and name not in INCIDENTAL and before[name] != value
    ]
