"""One rank of tests/distributed/test_library.py: trains through the Python API and prints what it has seen."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

import hvdqn
from tests.unit.library_envs import Recording, Rich, StopsEarly


class FailsOnRank1(hvdqn.Callback):
    def on_log(self, run: hvdqn.Run, values: Any) -> None:
        if run.rank == 1:
            raise ArithmeticError("a bug in a callback")


def main() -> None:
    case, run_dir, *flags = sys.argv[1:]
    settings: dict[str, Any] = {
        "preset": "smoke",
        "total_env_steps": 2000,
        "eval_episodes": 2,
        "run_dir": run_dir,
    }
    settings |= dict(flag.split("=") for flag in flags)
    seen = Recording()
    callbacks = [seen, *([StopsEarly()] if case == "stop" else [FailsOnRank1()] if case == "fail" else [])]
    try:
        result = hvdqn.train(
            env=partial(Rich, length=10), callbacks=callbacks, log_info=["distance"], **settings
        )
    except hvdqn.UserError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
        return
    q = hvdqn.load(result.run_dir).q_values(Rich.observation_space.sample())
    told = {
        "stopped_by": result.summary["stopped_by"],
        "env_steps": result.summary["env_steps"],
        "returns": result.returns,
        "episodes": len(seen.episodes),
        "distance": [values.get("info/distance") for values in seen.logs],
        "success": [values["info/is_success"] for values in seen.logs if "info/is_success" in values],
        "own_success": [episode.info["is_success"] for episode in seen.episodes],
        "checkpoints": [path.name for path in seen.checkpoints],
        "actions": len(q),
    }
    # In one call, so that lines of ranks do not mix.
    os.write(1, ("\nTOLD " + json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main()
