"""The command line of `hvdqn tune`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hvdqn.config import Config, parse, parse_flags
from hvdqn.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from hvdqn.paths import absolute, folder_remembered
from hvdqn.tune.space import Search, read_space
from hvdqn.tune.study import (
    BEST,
    check_optuna,
    describe,
    next_trial,
    open_study,
    put_back,
    run_name,
    suggest,
    write_best,
)
from hvdqn.tune.trial import (
    InterruptedTrialError,
    PrunedError,
    StopFlag,
    TrialFailedError,
    command_of,
    run_trial,
)

if TYPE_CHECKING:
    from optuna import Study, Trial

MOST_FAILURES = 3  # in a row, before this process gives up


@dataclass(frozen=True)
class TuneOptions:
    """Search for settings with a high return: flags of training for all trials follow after --.

    Any number of processes may work on the same study at the same time, on any hosts that share its folder.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """Folder of the study: its journal, the run directories of its trials, and best.yaml."""
    search: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A setting and the values to try: `lr=1e-5:1e-3:log`, `n_step=1:5` or `hidden=64 64,256`. May be repeated."""
    trials: int = 50
    """Trials of the whole study, of all processes together."""
    launcher: str = ""
    """Put before the command of each trial, as "mpirun -np 4"."""
    prune: bool = True
    """End a trial early if at an evaluation its return is below the median of the trials before."""


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn tune` command; return its exit code, 75 if a signal stopped it before the end."""
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    try:
        options = parse_flags(TuneOptions, words[:split], "hvdqn tune")
        return tune(options, words[split + 1 :])
    except UserError as error:
        print(f"hvdqn tune: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


@folder_remembered()
def tune(options: TuneOptions, flags: Sequence[str]) -> int:
    """Run trials until the study has enough of them; return the exit code.

    Args:
        options: of the command.
        flags: of training, for all trials.

    Raises:
        UserError: something in them is wrong.
    """
    if options.trials < 1:
        raise UserError(f"--trials is {options.trials}; it must be at least 1")
    space = read_space(options.search)
    config = check_flags(flags)
    check_optuna()
    folder = absolute(options.study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{folder}': {error.strerror}; choose another folder") from None
    if options.prune and config.run.eval_every == 0:
        print("no trial is ended early: --eval-every is 0", flush=True)
    purpose = {"search": sorted(options.search), "flags": shlex.join(flags)}
    study = open_study(folder, purpose, options.prune)
    code = run_trials(study, folder, options, space, flags)
    best = write_best(study, folder)
    if best is not None:
        print(f"best: trial {best.number}, mean return {best.value:.2f}, {describe(best)}")
        print(f"its settings: {folder / BEST}", flush=True)
    return code


def check_flags(flags: Sequence[str]) -> Config:
    """Return the settings that all trials have in common.

    Raises:
        UserError: they are wrong, or name a run directory.
    """
    config = parse(flags)
    if config.run.run_dir:
        raise UserError("each trial has a --run-dir of its own; leave it out")
    return config


def run_trials(
    study: Study, folder: Path, options: TuneOptions, space: Sequence[Search], flags: Sequence[str]
) -> int:
    """Run one trial after the other until the study has enough; return the exit code."""
    stop, failures = StopFlag(), 0
    while not stop.requested:
        trial = next_trial(study, folder, options.trials)
        if trial is None:
            return EXIT_FINISHED
        values = suggest(trial, space)
        run_dir = folder / "trials" / run_name(trial)
        command = command_of(options.launcher, flags, values, run_dir)
        print(f"trial {trial.number}: {', '.join(map(' '.join, values.items()))}", flush=True)
        try:
            failures = 0 if finish(study, trial, command, run_dir, stop) else failures + 1
        except InterruptedTrialError:
            put_back(study, trial, run_name(trial))
            print(f"trial {trial.number} was interrupted: the next process continues it", flush=True)
            return EXIT_REQUEUE
        if failures == MOST_FAILURES:
            print(f"hvdqn tune: error: {failures} trials in a row failed", file=sys.stderr, flush=True)
            return EXIT_FAILED
        write_best(study, folder)
    return EXIT_REQUEUE


def finish(study: Study, trial: Trial, command: Sequence[str], run_dir: Path, stop: StopFlag) -> bool:
    """Run a trial and record its result; return False if it failed.

    Raises:
        InterruptedTrialError: this process was asked to stop.
    """
    from optuna.trial import TrialState

    try:
        value = run_trial(command, run_dir, trial, stop)
    except PrunedError as pruned:
        study.tell(trial, state=TrialState.PRUNED)
        print(f"trial {trial.number} was ended early: {pruned}", flush=True)
    except (TrialFailedError, OSError) as error:
        study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number} failed: {error}", flush=True)
        return False
    else:
        study.tell(trial, value)
        print(f"trial {trial.number}: mean return {value:.2f}", flush=True)
    return True
