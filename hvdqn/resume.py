"""What a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvdqn.checkpoint import (
    LEARNER,
    BrokenCheckpointError,
    Checkpoint,
    Checkpoints,
    open_checkpoint,
    rank_part,
)
from hvdqn.comm import Comm
from hvdqn.config import Config, UserError
from hvdqn.parts import Parts
from hvdqn.replay import deal

# What a network and its optimizer are made of cannot change between the attempts of one run.
FIXED = ("env", "env_kwargs", "wrapper", "frame_stack", "torso", "hidden", "optimizer")
# Nor can these, if it is to go on bit for bit.
SHAPES = ("envs_per_rank", "replay_capacity")
# These say where and how a run is started, not what it is.
INCIDENTAL = {"run_dir", "resume", "preset"}


def contents(parts: Parts, comm: Comm, keep_replay: bool) -> dict[str, Any]:
    """What this rank writes into a checkpoint."""
    written: dict[str, Any] = {
        rank_part(comm.rank): {
            "actor": parts.actor.state(),
            "replay": parts.replay.state() if keep_replay else None,
        }
    }
    if comm.rank == 0:
        written[LEARNER] = {
            "learner": parts.learner.state(),
            "clock": parts.clock.state(),
            "seconds": parts.timer.seconds(),
        }
    return written


def find_checkpoint(config: Config, comm: Comm, run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Where to go on, and what is wrong with newer checkpoints; a collective call.

    Raises:
        UserError: `--resume` forbids what is there, or asks for what is not.
    """
    found, wrong = Checkpoints(run_dir / "checkpoints", comm, config.run.checkpoint_keep).newest_whole()
    if config.run.resume == "never" and (found or wrong):
        raise UserError(
            f"'{run_dir}' holds checkpoints and --resume is never; "
            f"go on with --resume auto, or choose another --run-dir"
        )
    if found is None and config.run.resume == "must":
        reason = f"none is whole ({wrong[0]})" if wrong else "there is none"
        raise UserError(
            f"--resume must, but of checkpoints in '{run_dir}' {reason}; give the --run-dir of a run"
        )
    if found is not None:
        _check_fixed(found.manifest["config"], config.flat(), run_dir)
    return found, wrong


def _check_fixed(before: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    for name in FIXED:
        if before[name] != now[name]:
            raise UserError(
                f"'{run_dir}' was begun with --{name.replace('_', '-')} {before[name]}, not {now[name]}; "
                f"keep it, or choose another --run-dir"
            )


def best_evaluation(run_dir: Path) -> float:
    """Mean return of the evaluation whose weights `checkpoints/best` holds; -inf without one."""
    try:
        return float(open_checkpoint(run_dir / "checkpoints" / "best").read(LEARNER)["eval_return_mean"])
    except BrokenCheckpointError:
        return -math.inf


def begin(parts: Parts) -> None:
    """Begin a run: reset the environments, put their observations into replay."""
    parts.replay.start(parts.actor.start())


def restore(parts: Parts, checkpoint: Checkpoint, config: Config, comm: Comm) -> list[str]:
    """Put every part where the checkpoint was taken.

    Returns:
        One line for the place, and one for each thing that is not as it was.
    """
    shared = checkpoint.read(LEARNER)
    parts.learner.load_state({name: torch.from_numpy(array) for name, array in shared["learner"].items()})
    parts.timer.load(shared["seconds"])
    before, now = checkpoint.manifest["config"], config.flat()
    same_world = checkpoint.world_size == comm.size
    same_shapes = same_world and all(before[name] == now[name] for name in SHAPES)
    ranks = [comm.rank] if same_shapes else range(checkpoint.world_size)
    shards = [checkpoint.read(rank_part(rank)) for rank in ranks]
    kept = all(shard["replay"] is not None for shard in shards)
    parts.clock.resume(shared["clock"], refill=not kept)
    if kept and same_shapes:
        parts.replay.load_state(shards[0]["replay"])
    elif kept:
        dealt = deal([shard["replay"] for shard in shards], parts.replay.ring, comm.rank, comm.size)
        parts.replay.load_state(dealt)
    exact = same_shapes and kept and parts.actor.load_state(shards[0]["actor"])
    if not exact:
        begin(parts)
    lines = [f"resumed from {checkpoint.path} at env step {parts.clock.env_steps:,}"]
    if not same_world:
        lines.append(
            f"{checkpoint.world_size} ranks before, {comm.size} now: replay is dealt anew, the global batch is "
            f"{parts.clock.global_batch}; clock and schedules go on"
        )
    if not kept:
        lines.append(
            f"the checkpoint holds no replay: it fills for {parts.clock.learning_starts:,} env steps before the "
            f"next update"
        )
    if not exact:
        lines.append("environments begin new episodes: this resume is not bit for bit")
    lines += [
        f"--{name.replace('_', '-')} was {before[name]}, is {now[name]}"
        for name in now
        if name in before and name not in INCIDENTAL and before[name] != now[name]
    ]
    return lines
