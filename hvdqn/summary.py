"""What a run reports: the header at its start, `summary.json` and the last lines at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdqn import __version__
from hvdqn.checkpoint import Progress
from hvdqn.comm import Comm
from hvdqn.config import Config, unused_settings
from hvdqn.rank import Parts
from hvdqn.sync import Strategy, Totals

log = logging.getLogger(__name__)


EVALUATION = ("eval_return_mean", "eval_return_std", "eval_episodes")


def log_header(config: Config, comm: Comm, parts: Parts) -> None:
    """Log what is about to run; a collective call."""
    ranks = f"{comm.size} rank" + "s" * (comm.size > 1)
    update_every = parts.clock.global_batch / config.replay.replay_ratio
    log.info("hvdqn %s: %s, comm %s (%s)", __version__, ranks, comm.name, comm.why)
    described = comm.all_gather_object(_describe_acting(parts))
    log.info("each rank: %s", next(text for text in described if text))
    log.info(
        "network: %s parameters; global batch %d, an update every %g env steps; %s",
        f"{parts.learner.parameters.numel():,}",
        parts.clock.global_batch,
        update_every,
        parts.strategy.description,
    )
    for line in unused_settings(config):
        log.warning("%s", line)


def _describe_acting(parts: Parts) -> str:
    """Return what a rank acts in and remembers; empty for a rank that serves."""
    if parts.acting is None:
        return ""
    return f"{parts.acting.envs.description}; {parts.acting.replay.description}"


def summarize(
    config: Config,
    comm: Comm,
    parts: Parts,
    totals: Totals,
    progress: Progress,
    stopped: bool,
    acted_env_steps: int,
    seconds_before: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of `summary.json`; a collective call.

    Args:
        config: of the run.
        comm: the ranks.
        parts: of this rank.
        totals: of the run.
        progress: of the run.
        stopped: whether a signal ended it.
        acted_env_steps: of this rank, since this attempt began.
        seconds_before: by phase, of earlier attempts.
    """
    clock, seconds = parts.clock, parts.timer.seconds()
    wall_seconds = sum(seconds.values())
    worked = sum(seconds[phase] - seconds_before[phase] for phase in seconds if phase != "comm")
    return {
        "env": config.environment.env,
        "preset": config.preset,
        "seed": config.run.seed,
        "world_size": comm.size,
        "comm": comm.name,
        "sync": config.parallel.sync,
        "env_steps": clock.env_steps,
        "updates": clock.updates,
        "skipped_updates": totals.skipped_updates,
        "discarded_transitions": _discarded(comm, parts),
        "failed_checkpoints": progress.failed_checkpoints,
        "world_changes": progress.world_changes,
        **parts.strategy.counters(),
        "traffic": _traffic(parts.strategy),
        "wall_seconds": wall_seconds,
        "env_steps_per_second": clock.env_steps / wall_seconds,
        "updates_per_second": clock.updates / wall_seconds,
        **{name: progress.evaluation.get(name) for name in EVALUATION},
        "param_sha256": parts.learner.sha256(),
        "stopped_by": "signal" if stopped else "finished",
        "seconds": seconds,
        # Of each rank's own work, without waiting for others; 0 of a rank that does not act.
        "rank_env_steps_per_second": comm.all_gather_object(acted_env_steps / worked),
    }


def _discarded(comm: Comm, parts: Parts) -> int:
    """Return the transitions that all ranks discarded because they are not finite; a collective call."""
    return sum(comm.all_gather_object(parts.acting.replay.discarded if parts.acting else 0))


def _traffic(strategy: Strategy) -> dict[str, float]:
    """Return what one rank sent per update of this attempt, and what it should have sent."""
    messages, sent_bytes = strategy.expected_traffic()
    updates = max(strategy.exchanged_updates, 1)
    return {
        "messages_per_update": strategy.sent_messages / updates,
        "bytes_per_update": strategy.sent_bytes / updates,
        "expected_messages_per_update": messages,
        "expected_bytes_per_update": sent_bytes,
    }


def log_summary(run_dir: Path, env_steps: int, stopped: bool, speeds: Sequence[float]) -> None:
    """Log how the run ended, and where everything is.

    Args:
        run_dir: of the run.
        env_steps: global, at the end.
        stopped: whether a signal ended it.
        speeds: env steps per second of each rank's own work.
    """
    acting = [speed for speed in speeds if speed > 0]
    if acting and max(acting) > 2 * min(acting):
        slowest, fastest = min(acting), max(acting)
        others = "go on without it" if len(acting) < len(speeds) else "wait for it"
        log.info(
            f"rank {speeds.index(slowest)} is the slowest, {slowest:,.4g} env steps/s of its own work, and the "
            f"others {others}; the fastest, rank {speeds.index(fastest)}, makes {fastest:,.4g}"
        )
    if stopped:
        log.info(
            f"stopped by a signal at env step {env_steps:,}: start it again with --run-dir {run_dir} to resume"
        )
    log.info(f"run directory: {run_dir}   checkpoint: {run_dir / 'checkpoints' / 'latest'}")
