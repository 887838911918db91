"""Decide which runs make one curve, and name the curves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from hvdqn.config import Config, did_you_mean, settings_of_same_curve
from hvdqn.errors import UserError
from hvdqn.metrics import METRICS_FILE, SUMMARY_FILE
from hvdqn.plot.runs import Run

# Runs that differ in one of these never make one curve.
BASE_KEYS = ("preset", "env", "world_size")


@dataclass(frozen=True)
class Group:
    """The runs of one environment that make one curve."""

    label: str
    runs: list[Run]

    @property
    def seeds(self) -> str:
        """The number of runs in words: "1 seed", "3 seeds", or "2 runs" if they do not have different seeds."""
        seeds = {run.settings.get("seed") for run in self.runs}
        noun = "seed" if len(seeds) == len(self.runs) and None not in seeds else "run"
        return f"{len(self.runs)} {noun}{'s' if len(self.runs) > 1 else ''}"


@dataclass(frozen=True)
class Panel:
    """One environment's curves, drawn in one matplotlib axes."""

    env: str
    groups: list[Group]
    y: str
    """The key of metrics.jsonl that is drawn."""

    @property
    def runs(self) -> list[Run]:
        """All runs of all curves."""
        return [run for group in self.groups for run in group.runs]


def arrange(runs: list[Run], group: str | None, y: str | None) -> list[Panel]:
    """Return a panel for each environment, with a curve for each combination of values of the keys in `group`.

    Panels and curves are in the order of the runs. `group` and `y` are the flags `--group` and `--y`.

    Raises:
        UserError: no run has such a key.
    """
    keys = _default_keys(runs) if group is None else _parse_keys(runs, group)
    hidden = _hidden_values(runs, keys) if group is None else {}
    panels: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        hidden_here = hidden.get(value_of(run, "preset"), {})
        shown = [key for key in keys if key != "env" and value_of(run, key) != hidden_here.get(key)]
        label = ", ".join(in_words(key, run.settings.get(key)) for key in shown)
        panels.setdefault(value_of(run, "env"), {}).setdefault(label, []).append(run)
    curves = {label for groups in panels.values() for label in groups}
    unnamed = "baseline" if len(curves) > 1 else "all runs"
    return [
        Panel(
            env,
            [Group(label or unnamed, members) for label, members in groups.items()],
            _choose_y([run for members in groups.values() for run in members], y),
        )
        for env, groups in panels.items()
    ]


def rename(panels: list[Panel], labels: str) -> list[Panel]:
    """Return the panels with other names for the curves: `labels` has them in their order, joined by commas.

    Raises:
        UserError: there are more or fewer names than curves.
    """
    names = [name.strip() for name in labels.split(",")]
    curves = list(dict.fromkeys(group.label for panel in panels for group in panel.groups))
    if len(names) != len(curves) or len(set(names)) < len(names):
        raise UserError(
            f"--labels has {len(names)} names, for the {len(curves)} curves {', '.join(map(repr, curves))}; give each "
            "a name of its own, in this order and joined by commas"
        )
    new = dict(zip(curves, names, strict=True))
    return [
        Panel(panel.env, [Group(new[group.label], group.runs) for group in panel.groups], panel.y)
        for panel in panels
    ]


def value_of(run: Run, key: str) -> str:
    """Return a setting as text, to compare runs by; "?" if it is unknown."""
    value = run.settings.get(key)
    return "?" if value is None else str(value)


def in_words(key: str, value: Any) -> str:
    """Return a setting in words for a legend, such as "no double", "n-step 3", "2 ranks" or "atari + rainbow"."""
    if key == "preset" and value:
        return str(value).replace(",", " + ")
    name = "n-step" if key == "n_step" else key.replace("_", " ")
    if key == "world_size" and value is not None:
        return "1 rank" if value == 1 else f"{value} ranks"
    if value is True:
        return name
    if value is False or value in ("", [], "{}"):
        return f"no {name}"
    if value is None:
        return f"unknown {name}"
    if isinstance(value, (int, float)):
        return f"{name} {value:,}"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _parse_keys(runs: list[Run], group: str) -> list[str]:
    """Split the comma-separated keys of `--group`, and check that runs have them."""
    known = {key for run in runs for key in run.settings}
    words = [word.strip().replace("-", "_") for word in group.split(",") if word.strip()]
    keys = ["world_size" if word == "np" else word for word in words]
    for key in keys:
        if key not in known | {"env"}:
            hint = did_you_mean(key, sorted(known)) or "; such as preset,env,np"
            raise UserError(f"--group {key} is in no run's config.yaml or {SUMMARY_FILE}{hint}")
    return keys


def _default_keys(runs: list[Run]) -> list[str]:
    """Return `BASE_KEYS`, and the settings that differ between runs whose `BASE_KEYS` are equal."""
    base = [key for key in BASE_KEYS if any(key in run.settings for run in runs)]
    candidates = [key for key in Config().flat() if key not in settings_of_same_curve()]
    return [*base, *(key for key in candidates if _differs(runs, base, key))]


def _differs(runs: list[Run], keys: list[str], key: str) -> bool:
    """Return True if some runs agree in all of `keys` but differ in `key`."""
    combinations = {tuple(value_of(run, k) for k in keys) for run in runs}
    return len({tuple(value_of(run, k) for k in (*keys, key)) for run in runs}) > len(combinations)


def _hidden_values(runs: list[Run], keys: list[str]) -> dict[str, dict[str, str]]:
    """Return the values that labels leave out, keyed by preset and setting.

    A label leaves out the value that most curves of its preset have, so that the curves of an ablation name only what
    was changed. It also leaves out the number of ranks, and that there is no preset, if all curves share them.
    """
    curves: dict[str, set[tuple[str, ...]]] = {}
    for run in runs:
        curves.setdefault(value_of(run, "preset"), set()).add(tuple(value_of(run, key) for key in keys))
    hidden: dict[str, dict[str, str]] = {preset: {} for preset in curves}
    for index, key in enumerate(keys):
        all_values = {curve[index] for members in curves.values() for curve in members}
        for preset, members in curves.items():
            value, count = Counter(curve[index] for curve in sorted(members)).most_common(1)[0]
            if key == "world_size" or (key == "preset" and value in ("", "?")):
                is_hidden = len(all_values) == 1
            else:
                is_hidden = key not in BASE_KEYS and 2 * count > len(members)
            if is_hidden:
                hidden[preset][key] = value
    return hidden


def _choose_y(runs: list[Run], y: str | None) -> str:
    """Return the key that a panel shows: `y`, or by default the evaluation or the training return.

    The evaluation return is the default if all runs have more than one, or if no run has a training return.

    Raises:
        UserError: a run has no value of this key.
    """
    if y is None:
        y = "episode_return_mean"
        has_training_returns = any(run.count(y) for run in runs)
        evaluations = [run.count("eval_return_mean") for run in runs]
        if min(evaluations) > 1 or (any(evaluations) and not has_training_returns):
            y = "eval_return_mean"
    for run in runs:
        if not run.count(y):
            known = sorted({key for record in run.records for key in record})
            hint = did_you_mean(y, known) or f"; there are {', '.join(known)}"
            raise UserError(f"{run.directory / METRICS_FILE} has no {y} to draw{hint}")
    return y
