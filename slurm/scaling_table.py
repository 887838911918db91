"""Print one table from the runs of `scaling.sbatch`: python slurm/scaling_table.py DIRECTORY."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEADER = ("ranks", "env steps/s", "updates/s", "efficiency", "in comm")


def table(directory: Path) -> str:
    """The runs below `directory`, fewest ranks first.

    Efficiency is the rate per rank over that of the smallest run; `in comm` is the share of rank 0's wall time that
    it waited for other ranks.

    Raises:
        SystemExit: no run has finished.
    """
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*/summary.json")]
    if not summaries:
        sys.exit(
            f"scaling_table.py: no run below '{directory}' has a summary.json; give the directory of all runs"
        )
    summaries.sort(key=lambda summary: summary["world_size"])
    single = summaries[0]["env_steps_per_second"] / summaries[0]["world_size"]
    rows = [HEADER]
    for summary in summaries:
        ranks, rate, seconds = summary["world_size"], summary["env_steps_per_second"], summary["seconds"]
        rows.append(
            (
                f"{ranks}",
                f"{rate:,.0f}",
                f"{summary['updates_per_second']:,.1f}",
                f"{rate / (ranks * single):.0%}",
                f"{seconds['comm'] / sum(seconds.values()):.0%}",
            )
        )
    return "\n".join("  ".join(f"{cell:>11}" for cell in row) for row in rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(Path(sys.argv[1])))
