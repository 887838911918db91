"""Compare the parameters that two checkouts learn: a refactoring must not change a bit of them.

    python -m tests.compare_checkouts ../before .                  every run, in both checkouts
    python -m tests.compare_checkouts ../before . -k server        only runs with "server" in their name
    python -m tests.compare_checkouts ../before --json before.json  record one checkout
    python -m tests.compare_checkouts before.json .                 compare with what was recorded

Each run is short and repeatable. Rounding differs between processors, so both checkouts must run on one machine.
Exit code: 0 if `param_sha256` and the final evaluation of every run are equal, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launchers import launch

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Run:
    """One short run: its launcher, its ranks, its flags, and those of a second attempt that resumes it."""

    launcher: str
    np: int
    flags: str = ""
    resumed_with: str | None = None
    resumed_np: int = 0


MINATAR = "--preset minatar,smoke --env MinAtar/Breakout-v1 --total-env-steps 1500"
RUNS: dict[str, Run] = {
    "local": Run("python", 1),
    "prioritized": Run("python", 1, "--replay prioritized"),
    "n-step": Run("python", 1, "--n-step 3"),
    "c51": Run("python", 1, "--head c51"),
    "qr": Run("python", 1, "--head qr --quantiles 25"),
    "iqn": Run("python", 1, "--head iqn --total-env-steps 1000"),
    "noisy": Run("python", 1, "--noisy --exploration noisy"),
    "munchausen": Run("python", 1, "--munchausen --no-double"),
    "mse-rmsprop": Run("python", 1, "--loss mse --optimizer rmsprop"),
    "ladder-repeat": Run("python", 1, "--exploration ladder --epsilon-repeat 2"),
    "softmax": Run("python", 1, "--exploration softmax"),
    "cartpole": Run("python", 1, "--preset cartpole,smoke"),
    "resume": Run("python", 1, "--total-env-steps 1000", "--total-env-steps 2000"),
    "resume-prioritized": Run(
        "python",
        1,
        "--total-env-steps 1000 --replay prioritized",
        "--total-env-steps 2000 --replay prioritized",
    ),
    "frame-stack": Run("python", 1, f"{MINATAR} --frame-stack 2"),
    "rainbow": Run(
        "python", 1, "--preset minatar,rainbow,smoke --env MinAtar/Freeway-v1 --total-env-steps 1000"
    ),
    "bf16": Run("python", 1, f"{MINATAR} --precision bf16"),
    "mpi-2": Run("mpirun", 2, "--comm mpi"),
    "mpi-2-no-overlap": Run("mpirun", 2, "--comm mpi --no-overlap"),
    "mpi-2-prioritized-n-step": Run("mpirun", 2, "--comm mpi --replay prioritized --n-step 3"),
    "mpi-2-frame-stack": Run("mpirun", 2, f"--comm mpi {MINATAR} --frame-stack 2"),
    "mpi-2-from-1": Run("python", 1, "--total-env-steps 1000", "--total-env-steps 2000", 2),
    "horovod-mpi-2": Run("horovodrun-mpi", 2),
    "horovod-gloo-2": Run("horovodrun-gloo", 2),
    "torch-2": Run("torchrun", 2),
    "parameters-1": Run("mpirun", 2, "--comm mpi --sync parameters --sync-every 1"),
    "parameters-10": Run("horovodrun-mpi", 2, "--sync parameters --sync-every 10"),
    "parameters-outer": Run(
        "mpirun", 2, "--comm mpi --sync parameters --sync-every 20 --outer-lr 0.7 --outer-momentum 0.9"
    ),
    "parameters-tau": Run("torchrun", 2, "--sync parameters --sync-every 10 --target-tau 0.01"),
    "server-1-worker": Run("mpirun", 2, "--comm mpi --sync server"),
}


def outcome(checkout: Path, name: str, run: Run, folder: Path) -> dict[str, object]:
    """Train in a checkout; return what has to be equal."""
    attempts = [(run.launcher, run.np, run.flags)]
    if run.resumed_with is not None:
        np = run.resumed_np or run.np
        attempts.append(("mpirun" if np > 1 else run.launcher, np, run.resumed_with))
    for launcher, np, flags in attempts:
        preset = [] if "--preset" in flags else ["--preset", "smoke"]
        words = ["-m", "hvdqn.train", *preset, "--run-dir", str(folder), *flags.split()]
        result = launch(
            launcher, np, words, TIMEOUT_SECONDS, {"PYTHONPATH": str(checkout)}, cwd=folder.parent
        )
        if result.returncode != 0:
            raise SystemExit(f"{name} in {checkout} failed: {result}")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("param_sha256", "eval_return_mean", "env_steps", "updates")}


def outcomes(place: Path, pattern: str) -> dict[str, dict[str, object]]:
    """What every run of a checkout came to, or what was recorded of it."""
    if place.is_file():
        recorded: dict[str, dict[str, object]] = json.loads(place.read_text(encoding="utf-8"))
        return recorded
    found = {}
    for name, run in RUNS.items():
        if pattern in name:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = outcome(place.resolve(), name, run, Path(folder) / "run")
            print(f"{place}: {name}: {found[name]['param_sha256']}", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout, or a file that --json wrote")
    parser.add_argument("after", type=Path, nargs="?", help="another checkout")
    parser.add_argument("-k", default="", metavar="TEXT", help="only runs with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results of the first checkout")
    options = parser.parse_args(argv)
    before = outcomes(options.before, options.k)
    if options.json:
        options.json.write_text(json.dumps(before, indent=1), encoding="utf-8")
    if options.after is None:
        return 0
    after = outcomes(options.after, options.k)
    differing = [name for name, found in after.items() if found != before[name]]
    for name, found in after.items():
        print(f"{'DIFFERS' if name in differing else 'equal  '}  {name:26}{found['param_sha256']}")
    print(f"{len(after) - len(differing)} of {len(after)} runs are equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
