"""Learning curves: the statistics against numbers known by hand, and the pictures as a user makes them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdqn.errors import UserError
from hvdqn.plot import (
    Group,
    Run,
    arrange,
    bootstrap_band,
    common_grid,
    draw,
    interquartile_mean,
    main,
    read_runs,
    smoothed,
    summarise,
)

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(
    directory: Path,
    *,
    seed: int = 1,
    world_size: int | None = 2,
    slope: float = 1.0,
    evaluations: int = 0,
    **config: Any,
) -> Path:
    """A run whose return is slope * env_steps, recorded every 10 of 100 env steps."""
    directory.mkdir(parents=True)
    settings = {"env": "CartPole-v1", "preset": "cartpole", "seed": seed, "sync": "gradients", **config}
    (directory / "config.yaml").write_text("\n".join(f"{key}: {value}" for key, value in settings.items()))
    if world_size is not None:
        summary = {"world_size": world_size, "comm": "horovod" if world_size > 1 else "local"}
        (directory / "summary.json").write_text(json.dumps(summary))
    records: list[dict[str, float | None]] = [
        {"env_steps": n, "updates": n, "wall_seconds": n / 10, "loss": 0.5, "episode_return_mean": slope * n}
        for n in range(10, 101, 10)
    ]
    records[0]["episode_return_mean"] = None  # no episode had ended yet
    for n in range(evaluations):
        at = 100 * (n + 1) // evaluations
        evaluation = {"eval_return_mean": 2 * slope * at, "eval_return_std": 1.0, "eval_episodes": 20}
        records.append({"env_steps": at, "updates": at, "wall_seconds": at / 10, **evaluation})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def curves(panels: list[Any]) -> list[tuple[str, list[str]]]:
    return [(panel.env, [group.legend for group in panel.groups]) for panel in panels]


def run_of(points: dict[float, float], name: str = "run", **settings: Any) -> Run:
    return Run(Path(name), settings, [{"env_steps": x, "episode_return_mean": y} for x, y in points.items()])


# Statistics


def test_bootstrap_band_of_two_seeds_is_their_range() -> None:
    # Means of two draws from {0, 1} are 0, 1/2, 1 with probability 1/4, 1/2, 1/4: both tails exceed 2.5%.
    low, high = bootstrap_band(np.array([[0.0, 3.0], [1.0, 3.0]]))
    assert low.tolist() == [0.0, 3.0]
    assert high.tolist() == [1.0, 3.0]


def test_bootstrap_band_has_the_quantiles_of_the_binomial() -> None:
    # Five zeros and five ones: 10 times a resampled mean is Binomial(10, 1/2), and
    # P(X <= 1) = 0.0107 < 0.025 < P(X <= 2) = 0.0547, so the band is [2, 8] / 10. At 80%: [3, 7] / 10.
    values = np.array([[0.0]] * 5 + [[1.0]] * 5)
    assert [edge[0] for edge in bootstrap_band(values)] == pytest.approx([0.2, 0.8])
    assert [edge[0] for edge in bootstrap_band(values, confidence=0.8)] == pytest.approx([0.3, 0.7])


def test_bootstrap_band_agrees_with_scipy_and_is_the_same_each_time() -> None:
    from scipy import stats

    values = np.random.default_rng(1).normal(size=(8, 3)) * [1.0, 10.0, 100.0]
    low, high = bootstrap_band(values)
    reference = stats.bootstrap((values,), np.mean, axis=0, method="percentile", n_resamples=20_000)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert (np.abs(low - reference.confidence_interval.low) < 0.05 * width).all()
    assert (np.abs(high - reference.confidence_interval.high) < 0.05 * width).all()
    assert np.array_equal(bootstrap_band(values)[0], low)


def test_interquartile_mean_leaves_out_a_quarter_at_either_end() -> None:
    values = np.array([[1000.0], [1.0], [2.0], [-1000.0], [3.0], [4.0], [-9.0], [99.0]])
    assert interquartile_mean(values).tolist() == [2.5]  # of 1, 2, 3, 4


def test_common_grid_keeps_shared_points_and_interpolates_others() -> None:
    x = np.array([1.0, 2.0, 5.0])
    grid, values = common_grid([(x, x), (x, 2 * x)])
    assert grid.tolist() == [1, 2, 5]
    assert values.tolist() == [[1, 2, 5], [2, 4, 10]]
    other = np.array([2.0, 4.0, 6.0])
    grid, values = common_grid([(x, x), (other, 10 * other)])
    assert grid.tolist() == [2, 3.5, 5]  # only where both are: nothing is extrapolated
    assert values.tolist() == [[2, 3.5, 5], [20, 35, 50]]
    with pytest.raises(ValueError, match="one begins at 6, another ends at 5"):
        common_grid([(x, x), (other + 4, other)])


def test_smoothing_is_a_centred_mean_that_keeps_straight_lines() -> None:
    line = np.arange(50.0)
    assert smoothed(line) == pytest.approx(line)
    spike = np.zeros(40)
    spike[20] = 3.0
    assert smoothed(spike, share=0.05)[18:23] == pytest.approx([0, 1, 1, 1, 0])


def test_summary_over_seeds() -> None:
    runs = [run_of({0: 0, 10: height}, name=f"s{height}") for height in (1, 2, 3, 100)]
    curve = summarise(Group("all", runs), "env_steps", "episode_return_mean")
    assert curve.line.tolist() == [0, 26.5]
    assert curve.dashed is not None
    assert curve.dashed.tolist() == [0, 2.5]
    assert "mean over seeds with bootstrap 95% band, too narrow for so few seeds" in curve.notes
    assert curve.band is not None
    assert curve.band[0][0] == curve.band[1][0] == 0
    assert curve.band[0][1] < 26.5 < curve.band[1][1]
    assert summarise(Group("all", runs[:3]), "env_steps", "episode_return_mean").dashed is None


def test_a_short_run_is_named_as_the_end_of_its_group() -> None:
    runs = [run_of({0: 0, 50: 5, 100: 10}, name="whole"), run_of({0: 0, 50: 6}, name="killed")]
    curve = summarise(Group("cartpole", runs), "env_steps", "episode_return_mean")
    assert curve.x[-1] == 50
    assert "cartpole ends where killed, its shortest run, ends" in curve.notes


def test_runs_that_share_nothing_are_refused() -> None:
    runs = [run_of({0: 0, 10: 1}), run_of({20: 0, 30: 1})]
    with pytest.raises(UserError, match="'cartpole' share no stretch of env_steps"):
        summarise(Group("cartpole", runs), "env_steps", "episode_return_mean")


def test_a_single_run_is_raw_and_smoothed_or_has_the_spread_of_its_evaluations() -> None:
    long = run_of({float(n): n % 2 for n in range(100)})
    curve = summarise(Group("one", [long]), "env_steps", "episode_return_mean")
    assert curve.pale is not None
    assert curve.pale.std() > 3 * curve.line.std()
    evaluations = [{"env_steps": n, "eval_return_mean": n, "eval_return_std": 2.0} for n in (1, 2, 3)]
    curve = summarise(Group("one", [Run(Path(), {}, evaluations)]), "env_steps", "eval_return_mean")
    assert curve.band is not None
    assert curve.band[0].tolist() == [-1, 0, 1]


# Grouping


def test_seeds_make_one_curve_and_ranks_and_environments_do_not(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", seed=seed)
        write_run(tmp_path / f"b{seed}", seed=seed, world_size=1)
    write_run(tmp_path / "c", env="Acrobot-v1", preset="acrobot")
    assert curves(arrange(read_runs([tmp_path]), None, None)) == [
        ("CartPole-v1", ["cartpole, np 2 (3 seeds)", "cartpole, np 1 (3 seeds)"]),
        ("Acrobot-v1", ["acrobot, np 2 (1 seed)"]),
    ]


def test_runs_that_differ_in_a_setting_are_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", sync="parameters")
    write_run(tmp_path / "b", seed=2)
    write_run(tmp_path / "c", seed=3)
    (panel,) = arrange(read_runs([tmp_path]), None, None)
    assert [group.legend for group in panel.groups] == [
        "cartpole, np 2, sync parameters (1 seed)",
        "cartpole, np 2, sync gradients (2 seeds)",
    ]
    (panel,) = arrange(read_runs([tmp_path]), "preset,np", None)
    assert [group.legend for group in panel.groups] == ["cartpole, np 2 (3 seeds)"]


def test_of_an_ablation_a_curve_names_only_what_was_removed(tmp_path: Path) -> None:
    whole = {"preset": "rainbow", "double": True, "n_step": 3}
    for name, removed in {"a": {}, "b": {"double": False}, "c": {"n_step": 1}}.items():
        write_run(tmp_path / name, **{**whole, **removed})
    [(_, labels)] = curves(arrange(read_runs([tmp_path]), None, None))
    assert [label.removesuffix(" (1 seed)") for label in labels] == [
        "rainbow, np 2",
        "rainbow, np 2, double False",
        "rainbow, np 2, n step 1",
    ]


def test_a_run_that_is_still_going_has_no_summary_and_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "going", world_size=None, preset="minatar,rainbow")
    (panel,) = arrange(read_runs([tmp_path / "going"]), None, None)
    assert [group.legend for group in panel.groups] == ["minatar + rainbow (1 seed)"]


def test_a_seed_that_is_still_going_belongs_to_the_others(tmp_path: Path) -> None:
    """Its checkpoint knows how many ranks it has; and for how long it may stall is no experiment."""
    write_run(tmp_path / "done", stall_timeout=600.0)
    going = write_run(tmp_path / "going", seed=2, world_size=None, stall_timeout=0.0)
    (going / "checkpoints" / "latest").mkdir(parents=True)
    manifest = {"world_size": 2, "config": {"env": "Other-v0"}}
    (going / "checkpoints" / "latest" / "manifest.json").write_text(json.dumps(manifest))
    (panel,) = arrange(read_runs([tmp_path]), None, None)
    assert [group.legend for group in panel.groups] == ["cartpole, np 2 (2 seeds)"]


def test_evaluations_along_the_way_are_preferred(tmp_path: Path) -> None:
    write_run(tmp_path / "along", evaluations=5)
    write_run(tmp_path / "only-at-the-end", evaluations=1)
    assert arrange(read_runs([tmp_path / "along"]), None, None)[0].y == "eval_return_mean"
    assert arrange(read_runs([tmp_path / "only-at-the-end"]), None, None)[0].y == "episode_return_mean"
    assert arrange(read_runs([tmp_path]), None, None)[0].y == "episode_return_mean"
    assert arrange(read_runs([tmp_path]), None, "loss")[0].y == "loss"


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert len(read_runs([run, tmp_path, tmp_path / "run" / ".." / "run", run / "metrics.jsonl"])) == 1


# The picture


def test_axes_say_what_they_show(tmp_path: Path) -> None:
    write_run(tmp_path / "a", evaluations=5)
    write_run(tmp_path / "b", evaluations=5, env="Acrobot-v1")
    panels = arrange(read_runs([tmp_path]), None, None)
    first, second = draw(panels, "wall_seconds").axes
    assert (first.get_title("left"), second.get_title("left")) == ("CartPole-v1", "Acrobot-v1")
    assert first.get_ylabel() == "Evaluation return (mean of 20 episodes)"
    assert first.get_xlabel() == "Wall time (seconds)"
    assert first.xaxis.get_major_formatter()(1_500_000.0) == "1,500,000"


def test_wall_time_is_in_the_unit_that_fits() -> None:
    records = [{"wall_seconds": 7200.0 * n, "episode_return_mean": n} for n in range(1, 4)]
    (axes,) = draw(arrange([Run(Path(), {"env": "E"}, records)], None, None), "wall_seconds").axes
    assert axes.get_xlabel() == "Wall time (hours)"
    assert np.array_equal(axes.get_lines()[0].get_xdata(), [2, 4, 6])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_draws_a_picture_and_never_loads_torch(tmp_path: Path, suffix: str) -> None:
    for seed in (1, 2, 3, 4):
        write_run(tmp_path / f"runs/s{seed}", seed=seed, slope=seed)
    write_run(tmp_path / "runs/other", preset="dqn", evaluations=3)
    code = (
        "import sys; from hvdqn.plot import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules; sys.exit(code)"
    )
    out = tmp_path / "pictures" / f"curves{suffix}"
    words = [str(tmp_path / "runs"), "-o", str(out), "--title", r"From $5 to $6: \foo$"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    picture = out.read_bytes()
    assert len(picture) > 10_000
    if suffix == ".png":
        assert picture.startswith(PNG)
        assert int.from_bytes(picture[16:20], "big") >= 1200  # pixels across
    else:
        assert b"<svg" in picture[:1000]


def test_one_set_of_runs_gives_one_picture(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s{seed}", seed=seed, slope=seed)
    assert main([str(tmp_path), "-o", str(tmp_path / "a.svg")]) == 0
    assert main([str(tmp_path), "-o", str(tmp_path / "b.svg")]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_picture_of_one_run_lies_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run / "metrics.jsonl")]) == 0
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == 2 * f"{run}/curves.png\n"
    assert (run / "curves.png").read_bytes().startswith(PNG)


def test_a_run_killed_in_mid_write_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 110, "episode_ret')
    assert len(read_runs([run])[0].records) == 10


# Wrong input


def test_a_run_that_has_only_begun_does_not_hide_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "going")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").touch()
    assert [run.directory.name for run in read_runs([tmp_path])] == ["going"]
    with pytest.raises(UserError, match=r"begun/metrics\.jsonl holds no records yet"):
        read_runs([tmp_path / "begun"])


def with_closed_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """`closed` is what a folder is to a user who may not enter it; root may enter any."""
    stat = os.stat

    def refuse(path: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **kwargs)

    monkeypatch.setattr("os.stat", refuse)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no RUN given"),
        (["missing"], "missing does not exist; give the run directory"),
        (["empty"], "empty holds no metrics.jsonl with records"),
        (["torn"], "torn/metrics.jsonl is damaged: line 2 is no JSON object; delete that line"),
        (["mapless"], "mapless/config.yaml cannot be read as a mapping"),
        (["nameless"], "nameless/config.yaml cannot be read as a mapping"),
        (["words"], "words/metrics.jsonl holds a loss that is no number; mend it"),
        (["closed"], "cannot read closed: Permission denied; make it readable"),
        (["run", "-o", "curve.bmp"], "curve.bmp is no picture that can be drawn; end it in .png or .svg"),
        (["run", "-o", "run/config.yaml/curve.png"], "cannot write run/config.yaml/curve.png: "),
        (["run", "--y", "episode_return"], "did you mean 'episode_return_mean'"),
        (["run", "--group", "presets"], "did you mean 'preset'"),
        (["run", "--x", "hours"], "'hours'"),
        (["run", "--smooth"], "unknown argument '--smooth'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    write_run(Path("torn"))
    Path("torn/metrics.jsonl").write_text('{"env_steps": 1}\n{"env_st\n{"env_steps": 3}\n')
    write_run(Path("mapless"))
    Path("mapless/config.yaml").write_text("just words")
    Path("empty").mkdir()
    write_run(Path("nameless"))
    Path("nameless/config.yaml").write_text("1: 2")
    write_run(Path("words"))
    Path("words/metrics.jsonl").write_text('{"env_steps": 1, "loss": "low"}\n')
    with_closed_folders(monkeypatch)
    assert main([*words, "--y", "loss"] if words == ["words"] else words) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.startswith("hvdqn plot: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_missing_package_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(write_run(tmp_path / "run"))]) == 2
    assert (
        "plot needs matplotlib, which is not installed; pip install 'hvdqn[plot]'" in capsys.readouterr().err
    )
