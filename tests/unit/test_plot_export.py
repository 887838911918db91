"""`hvdqn plot --csv`, `--json`, `--labels` and `--smooth`, against naive loops."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from hvdqn.plot import main
from hvdqn.plot.statistics import moving_mean
from tests.unit.test_plot import write_run


def test_the_moving_mean_is_that_of_a_naive_loop() -> None:
    y = np.random.default_rng(0).normal(size=12)
    naive = []
    for index in range(len(y)):
        radius = min(index, len(y) - 1 - index, 2)
        naive.append(np.mean(y[index - radius : index + radius + 1]))
    np.testing.assert_allclose(moving_mean(y, 2), naive)


def write_study(folder: Path) -> None:
    """Write three runs of two settings in each of two environments; the return of a run is its slope * env steps."""
    for env, factor in (("A-v0", 1.0), ("B-v0", 10.0)):
        for double, base in ((True, 1.0), (False, 2.0)):
            for seed in (1, 2, 3):
                slope = factor * (base + seed / 10)
                write_run(
                    folder / f"{env}-{double}-{seed}",
                    env=env,
                    double=double,
                    seed=seed,
                    slope=slope,
                    evaluations=4,
                )


def test_json_has_an_array_of_runs_tasks_and_points(tmp_path: Path) -> None:
    write_study(tmp_path)
    assert main([str(tmp_path), "--labels", "one,two", "--json", str(tmp_path / "scores.json")]) == 0
    assert not list(tmp_path.rglob("*.png"))
    read = json.loads((tmp_path / "scores.json").read_text())
    assert read["tasks"] == ["A-v0", "B-v0"]
    assert read["x"] == {task: [25.0, 50.0, 75.0, 100.0] for task in read["tasks"]}
    scores = {name: np.array(values) for name, values in read["scores"].items()}
    base = {"one": 2.0, "two": 1.0}  # in the order of the folders: False comes first
    for name, values in scores.items():
        assert values.shape == (3, 2, 4)
        for run in range(3):
            for task, factor in enumerate((1.0, 10.0)):
                for point, at in enumerate((25, 50, 75, 100)):
                    assert values[run, task, point] == pytest.approx(
                        2 * factor * (base[name] + (run + 1) / 10) * at
                    )


def test_json_needs_as_many_runs_in_each_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", env="A-v0")
    write_run(tmp_path / "b", env="B-v0", seed=1)
    write_run(tmp_path / "c", env="B-v0", seed=2)
    assert main([str(tmp_path), "--json", str(tmp_path / "scores.json")]) == 2
    assert "has 1 in A-v0, 2 in B-v0" in capsys.readouterr().err


def test_csv_has_a_row_for_each_point_of_a_curve(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed=seed, slope=seed)
    out = tmp_path / "curves.csv"
    assert main([str(tmp_path), "--labels", "DQN", "--csv", str(out), "--smooth", "3"]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["env_steps"]) for row in rows] == list(range(20, 101, 10))
    assert {(row["env"], row["curve"], row["runs"]) for row in rows} == {("CartPole-v1", "DQN", "2")}
    for row in rows:  # lines stay lines under a moving mean
        assert float(row["mean"]) == pytest.approx(1.5 * float(row["env_steps"]))
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])


@pytest.mark.parametrize("labels", ["a,b", "a,a", ""])
def test_labels_that_do_not_fit_are_refused(
    labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a")
    if labels == "a,a":
        write_run(tmp_path / "b", world_size=4)
    flags = [str(tmp_path), "--labels", labels, "--csv", str(tmp_path / "c.csv")]
    code = main(flags)
    if labels == "":  # one empty name for one curve
        assert code == 0
    else:
        assert code == 2
        assert "give each a name of its own" in capsys.readouterr().err


def test_a_picture_with_labels_and_smoothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    out = tmp_path / "x.svg"
    assert main([str(tmp_path), "--labels", "my curve", "--smooth", "4", "-o", str(out)]) == 0
    assert "moving mean over 4 points" in out.read_text().replace("&#160;", " ") or out.stat().st_size > 5000
    assert main([str(tmp_path), "--smooth", "-1", "-o", str(out)]) == 2
