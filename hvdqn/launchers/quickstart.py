"""Print the evaluation at the end of launch/quickstart.sh, and exit with 1 if the agent plays too badly.

python -m hvdqn.launchers.quickstart SUMMARY_JSON [MIN_RETURN]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def report(summary: dict[str, Any], min_return: str) -> str:
    """Print the evaluation of a run; return an error message if its mean return is below `min_return`.

    Args:
        summary: what summary.json holds.
        min_return: the mean return that counts as solved, as the user sees it; "" accepts any.
    """
    mean, std, episodes = (summary[f"eval_{name}"] for name in ("return_mean", "return_std", "episodes"))
    print(f"Greedy evaluation  mean {mean:.1f}, standard deviation {std:.1f} over {episodes} episodes")
    if not min_return or mean >= float(min_return):
        return ""
    return (
        f"quickstart.sh: a mean return of {mean:.1f} is below {min_return}, "
        f"where {summary['env']} counts as solved"
    )


if __name__ == "__main__":
    _, path, *rest = sys.argv
    sys.exit(report(json.loads(Path(path).read_text()), *rest or [""]) or 0)
