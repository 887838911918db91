"""Report on a run: log the header at its start and the last lines at its end, and compile `summary.json`."""

from __future__ import annotations

import logging
import textwrap
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

HEADER_COLUMNS = 100

EVALUATION = ("eval_return_mean", "eval_return_std", "eval_episodes")


def log_header(config: Config, comm: Comm, parts: Parts, run_dir: Path) -> None:
    """Log the ranks, environments, network and strategy of the run, in lines of at most 100 columns.

    All ranks must call it together.
    """
    ranks = f"{comm.size} rank" + "s" * (comm.size > 1)
    update_every = parts.clock.global_batch / parts.clock.replay_ratio
    described = comm.all_gather_object((str(parts.device), _describe_acting(parts)))
    devices = sorted({device for device, _ in described})
    environments, replay = next(acting for _, acting in described if acting)
    lines = [
        f"hvdqn {__version__}: {ranks}, comm {comm.name} ({comm.why})",
        f"each rank: {environments}",
        f"each rank: {replay}; device {' or '.join(devices)}",
        f"network: {parts.learner.online.num_parameters:,} parameters; global batch {parts.clock.global_batch}, "
        f"an update every {update_every:g} env steps",
        f"strategy: {parts.strategy.description}",
    ]
    if comm.size > 1:
        lines.append(f"sums over ranks: {comm.path}")
    for line in lines:
        for piece in textwrap.wrap(
            line, HEADER_COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        ):
            log.info("%s", piece)
    log.info("run directory: %s", run_dir)  # not wrapped, so that it can be copied
    for line in unused_settings(config):
        log.warning("%s", line)


def _describe_acting(parts: Parts) -> tuple[str, str] | None:
    """Return one line on the rank's environments and one on its replay; None for a rank that has neither."""
    if parts.acting is None:
        return None
    return parts.acting.envs.description, parts.acting.replay.description


def summarize(
    config: Config,
    comm: Comm,
    parts: Parts,
    totals: Totals,
    progress: Progress,
    stopped_by: str,
    acted_env_steps: int,
    seconds_before: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of `summary.json` but for the launches, which `Recorder.finish` adds; a collective call.

    Args:
        config: the configuration of the run.
        comm: the collectives over all ranks.
        parts: this rank's parts.
        totals: sums of the ranks' statistics; this reads the skipped updates.
        progress: the last evaluation, and counts of failures.
        stopped_by: what ended the run: "finished", "signal", "return" or "callback".
        acted_env_steps: env steps of this rank since this process started or resumed the run.
        seconds_before: this rank's seconds by phase before that.
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
        "param_sha256": parts.strategy.param_sha256(),
        "stopped_by": stopped_by,
        "seconds": seconds,
        # Each rank's env steps per second of its own work, waits for others not counted; 0 if the rank does not act.
        "rank_env_steps_per_second": comm.all_gather_object(acted_env_steps / worked),
    }


def _discarded(comm: Comm, parts: Parts) -> int:
    """Return how many transitions all ranks discarded because they are not finite. All ranks must call it together."""
    return sum(comm.all_gather_object(parts.acting.replay.discarded if parts.acting else 0))


def _traffic(strategy: Strategy) -> dict[str, float]:
    """Return how many messages and bytes this rank sent per update, and how many it should have sent."""
    messages, sent_bytes = strategy.expected_traffic()
    updates = max(strategy.exchanged_updates, 1)
    return {
        "messages_per_update": strategy.sent_messages / updates,
        "bytes_per_update": strategy.sent_bytes / updates,
        "expected_messages_per_update": messages,
        "expected_bytes_per_update": sent_bytes,
    }


def log_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Log how the run ended, which rank was slow, and where the files are.

    Args:
        run_dir: the run directory.
        summary: what `summarize` returned.
    """
    env_steps: int = summary["env_steps"]
    speeds: Sequence[float] = summary["rank_env_steps_per_second"]  # of each rank's own work
    acting = [speed for speed in speeds if speed > 0]
    if acting and max(acting) > 2 * min(acting):
        slowest, fastest = min(acting), max(acting)
        others = "go on without it" if len(acting) < len(speeds) else "wait for it"
        log.info(
            f"rank {speeds.index(slowest)} is the slowest, {slowest:,.4g} env steps/s of its own work, and the "
            f"others {others}; the fastest, rank {speeds.index(fastest)}, makes {fastest:,.4g}"
        )
    if summary["stopped_by"] == "return":
        log.info(
            f"stopped at env step {env_steps:,}: the evaluation reached --stop-at-return "
            f"({summary['eval_return_mean']:.2f})"
        )
    if (what := summary["stopped_by"]) in ("signal", "callback"):
        log.info(
            f"stopped by a {what} at env step {env_steps:,}: start it again with --run-dir {run_dir} to resume"
        )
    log.info(f"run directory: {run_dir}   checkpoint: {run_dir / 'checkpoints' / 'latest'}")
