"""The study: all trials of all processes that tune together, in a journal file of Optuna on a shared disk."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdqn.config import CONFIG_FILE, as_yaml, preset_config, read_config_file
from hvdqn.errors import UserError
from hvdqn.metrics import replace_file
from hvdqn.tune.space import Search

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL = "journal.log"
BEST = "best.yaml"
RUN = "run"
"""Attribute of a trial: the name of its run directory in `trials/`. A trial that continues another one has its name."""


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        UserError: it is missing.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune needs optuna, which is not installed; pip install 'hvdqn[tune]'")


def open_study(folder: Path, purpose: Mapping[str, Any], prune: bool) -> Study:
    """Open the study in a folder, or begin it.

    Args:
        folder: of the study; it exists.
        purpose: what is tuned, as JSON data. All processes of a study must tune the same.
        prune: whether trials are stopped early.

    Raises:
        UserError: the study is about something else.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock_of(folder / JOURNAL)))
    with locked(folder):
        study = optuna.create_study(
            storage=storage,
            study_name="hvdqn",
            direction="maximize",
            load_if_exists=True,
            sampler=make_sampler(),
            pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        )
        before = study.user_attrs
        for name, value in purpose.items():
            if name in before and before[name] != value:
                raise UserError(
                    f"the study in '{folder}' was begun with {name} {before[name]}, not {value}; keep it, or choose "
                    "another folder"
                )
            study.set_user_attr(name, value)
    return study


def make_sampler() -> BaseSampler:
    """Return Optuna's TPE sampler, told that other processes run trials at the same time."""
    import optuna

    with warnings.catch_warnings():
        # Optuna 4 calls both options experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, constant_liar=True)


def lock_of(path: Path) -> Any:
    """Return a lock that works between hosts, also on NFS: a file that only one process can create."""
    from optuna.storages.journal import JournalFileOpenLock

    return JournalFileOpenLock(str(path))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one process of a study at a time run the body."""
    lock = lock_of(folder / "study")
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def next_trial(study: Study, folder: Path, trials: int) -> Trial | None:
    """Return a new trial, or one that was interrupted; None if the study has all its trials."""
    from optuna.trial import TrialState

    with locked(folder):
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        if not waiting and len(study.get_trials(deepcopy=False, states=counted)) >= trials:
            return None
        return study.ask()


def suggest(trial: Trial, space: Sequence[Search]) -> dict[str, str]:
    """Return the values that a trial tries, by setting, as on a command line."""
    values = {}
    for search in space:
        if search.choices:
            value: Any = trial.suggest_categorical(search.name, search.choices)
        elif search.whole:
            value = trial.suggest_int(search.name, int(search.low), int(search.high), log=search.log)
        else:
            value = trial.suggest_float(search.name, search.low, search.high, log=search.log)
        values[search.name] = str(value)
    return values


def put_back(study: Study, trial: Trial, run: str) -> None:
    """Let another process, or the next start of this one, continue a trial that was interrupted."""
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.FAIL)
    study.enqueue_trial(trial.params, user_attrs={RUN: run})


def run_name(trial: Trial | FrozenTrial) -> str:
    """Return the name of the run directory of a trial."""
    return str(trial.user_attrs.get(RUN, f"{trial.number:04d}"))


def best_trial(study: Study) -> FrozenTrial | None:
    """Return the trial with the highest return; None before the first one is complete."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: -math.inf if trial.value is None else trial.value, default=None)


def write_best(study: Study, folder: Path) -> FrozenTrial | None:
    """Write all settings of the best trial as `best.yaml`, and return the trial.

    Raises:
        OSError: it cannot be written.
        UserError: the settings of the trial cannot be read.
    """
    with locked(folder):
        best = best_trial(study)
        if best is not None:
            settings = read_config_file(str(folder / "trials" / run_name(best) / CONFIG_FILE))
            config = preset_config(settings.pop("preset", "")).replace(**settings)
            head = f"# trial {best.number} of {folder}: mean return {best.value:g}\n"
            replace_file(folder / BEST, (head + as_yaml(config)).encode())
    return best


def describe(trial: FrozenTrial) -> str:
    """Return the values that a trial tried, in one line."""
    return ", ".join(f"{name} {value}" for name, value in trial.params.items())
