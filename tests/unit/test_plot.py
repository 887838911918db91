"""`hvdqn plot`: statistics against hand-computed numbers, groups and labels, and the pictures of the command."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hvdqn.errors import UserError
from hvdqn.plot import COLOURS, STYLE, main
from hvdqn.plot.drawing import MAX_CURVES_WITH_BANDS, draw, legend_labels, shared_facts
from hvdqn.plot.groups import Group, Panel, arrange, in_words
from hvdqn.plot.runs import Run, read_runs
from hvdqn.plot.statistics import bootstrap_band, common_grid, interquartile_mean, smooth_share, summarize

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
    """Write a run whose return is slope * env_steps, recorded every 10 of 100 env steps."""
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
    records[0]["episode_return_mean"] = None  # no episode has ended yet
    for n in range(evaluations):
        at = 100 * (n + 1) // evaluations
        evaluation = {"eval_return_mean": 2 * slope * at, "eval_return_std": 1.0, "eval_episodes": 20}
        records.append({"env_steps": at, "updates": at, "wall_seconds": at / 10, **evaluation})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def curves(panels: list[Any]) -> list[tuple[str, list[str]]]:
    return [(panel.env, [f"{group.label} ({group.seeds})" for group in panel.groups]) for panel in panels]


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


def test_bootstrap_band_agrees_with_a_naive_bootstrap_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(8, 3)) * [1.0, 10.0, 100.0]
    low, high = bootstrap_band(values)
    means = [values[rng.integers(8, size=8)].mean(axis=0) for _ in range(20_000)]
    expected_low, expected_high = np.percentile(means, [2.5, 97.5], axis=0)
    width = expected_high - expected_low
    assert (np.abs(low - expected_low) < 0.05 * width).all()
    assert (np.abs(high - expected_high) < 0.05 * width).all()
    assert np.array_equal(bootstrap_band(values)[0], low)


def test_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    values = np.array([[1000.0], [1.0], [2.0], [-1000.0], [3.0], [4.0], [-9.0], [99.0]])
    assert interquartile_mean(values).tolist() == [2.5]  # of 1, 2, 3, 4


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([7], 7),
        ([1, 2, 6], 3),  # a quarter of 3 seeds is less than one: nothing is left out
        ([10, 0, 4, 5], 4.5),  # of 4, 5
        ([5, 1, 2, 100, 3], 10 / 3),  # of 2, 3, 5
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], 5),  # of 3 to 7
    ],
)
def test_interquartile_mean_rounds_each_quarter_down(seeds: list[float], expected: float) -> None:
    # Each point has its own order of seeds.
    values = np.array([seeds, seeds[::-1]], dtype=np.float64).T
    assert interquartile_mean(values) == pytest.approx([expected, expected])


def test_common_grid_keeps_shared_points_and_interpolates_others() -> None:
    x = np.array([1.0, 2.0, 5.0])
    grid, values = common_grid([(x, x), (x, 2 * x)])
    assert grid.tolist() == [1, 2, 5]
    assert values.tolist() == [[1, 2, 5], [2, 4, 10]]
    other = np.array([2.0, 4.0, 6.0])
    grid, values = common_grid([(x, x), (other, 10 * other)])
    assert grid.tolist() == [2, 3.5, 5]  # only the range of both: nothing is extrapolated
    assert values.tolist() == [[2, 3.5, 5], [20, 35, 50]]
    with pytest.raises(ValueError, match="one begins at 6, another ends at 5"):
        common_grid([(x, x), (other + 4, other)])


def test_smoothing_keeps_straight_lines_and_spreads_a_spike() -> None:
    line = np.arange(50.0)
    assert smooth_share(line) == pytest.approx(line)
    spike = np.zeros(40)
    spike[20] = 3.0
    assert smooth_share(spike, share=0.05)[18:23] == pytest.approx([0, 1, 1, 1, 0])


def test_summary_over_seeds() -> None:
    runs = [run_of({0: 0, 10: height}, name=f"s{height}") for height in (1, 2, 3, 100)]
    curve = summarize(Group("all", runs), "env_steps", "episode_return_mean")
    assert curve.line.tolist() == [0, 26.5]
    assert curve.dashed is not None
    assert curve.dashed.tolist() == [0, 2.5]
    assert curve.notes == (
        "mean over seeds",
        "band: bootstrap 95% interval, too narrow for so few seeds",
        "dashed: interquartile mean",
    )
    assert curve.band is not None
    assert curve.band[0][0] == curve.band[1][0] == 0
    assert curve.band[0][1] < 26.5 < curve.band[1][1]
    assert summarize(Group("all", runs[:3]), "env_steps", "episode_return_mean").dashed is None


def test_the_notes_name_the_shortest_run() -> None:
    runs = [run_of({0: 0, 50: 5, 100: 10}, name="whole"), run_of({0: 0, 50: 6}, name="killed")]
    curve = summarize(Group("cartpole", runs), "env_steps", "episode_return_mean")
    assert curve.x[-1] == 50
    assert "cartpole ends where its shortest run, killed, ends" in curve.notes


def test_runs_without_a_common_range_are_refused() -> None:
    runs = [run_of({0: 0, 10: 1}), run_of({20: 0, 30: 1})]
    with pytest.raises(UserError, match="'cartpole' have no common range of env_steps"):
        summarize(Group("cartpole", runs), "env_steps", "episode_return_mean")


def test_a_single_run_is_smoothed_or_has_a_band_of_its_evaluations() -> None:
    long = run_of({float(n): n % 2 for n in range(100)})
    curve = summarize(Group("one", [long]), "env_steps", "episode_return_mean")
    assert curve.pale is not None
    assert curve.pale.std() > 3 * curve.line.std()
    evaluations = [{"env_steps": n, "eval_return_mean": n, "eval_return_std": 2.0} for n in (1, 2, 3)]
    curve = summarize(Group("one", [Run(Path(), {}, evaluations)]), "env_steps", "eval_return_mean")
    assert curve.band is not None
    assert curve.band[0].tolist() == [-1, 0, 1]


# Grouping


def test_seeds_make_one_curve_but_ranks_and_environments_do_not(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", seed=seed)
        write_run(tmp_path / f"b{seed}", seed=seed, world_size=1)
    write_run(tmp_path / "c", env="Acrobot-v1", preset="acrobot")
    assert curves(arrange(read_runs([tmp_path]), None, None)) == [
        ("CartPole-v1", ["cartpole, 2 ranks (3 seeds)", "cartpole, 1 rank (3 seeds)"]),
        ("Acrobot-v1", ["acrobot, 2 ranks (1 seed)"]),
    ]


def test_runs_that_differ_in_a_setting_are_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", sync="parameters")
    write_run(tmp_path / "b", seed=2)
    write_run(tmp_path / "c", seed=3)
    [(_, labels)] = curves(arrange(read_runs([tmp_path]), None, None))
    assert labels == ["cartpole, sync parameters (1 seed)", "cartpole, sync gradients (2 seeds)"]
    [(_, labels)] = curves(arrange(read_runs([tmp_path]), "preset,np", None))
    assert labels == ["cartpole, 2 ranks (3 seeds)"]


def test_the_curves_of_an_ablation_name_only_what_was_removed(tmp_path: Path) -> None:
    whole = {"preset": "rainbow", "double": True, "n_step": 3}
    for name, removed in {"a": {}, "b": {"double": False}, "c": {"n_step": 1}}.items():
        write_run(tmp_path / name, **{**whole, **removed})
    [(_, labels)] = curves(arrange(read_runs([tmp_path]), None, None))
    assert [label.removesuffix(" (1 seed)") for label in labels] == [
        "rainbow",
        "rainbow, no double",
        "rainbow, n-step 1",
    ]


def test_an_unfinished_run_without_a_summary_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "going", world_size=None, preset="minatar,rainbow")
    [(_, labels)] = curves(arrange(read_runs([tmp_path / "going"]), None, None))
    assert labels == ["minatar + rainbow (1 seed)"]


def test_an_unfinished_run_is_a_seed_of_the_same_curve(tmp_path: Path) -> None:
    """Its world size is in its checkpoint, and `stall_timeout` does not make another curve."""
    write_run(tmp_path / "done", stall_timeout=600.0)
    going = write_run(tmp_path / "going", seed=2, world_size=None, stall_timeout=0.0)
    (going / "checkpoints" / "latest").mkdir(parents=True)
    manifest = {"world_size": 2, "config": {"env": "Other-v0"}}
    (going / "checkpoints" / "latest" / "manifest.json").write_text(json.dumps(manifest))
    [(_, labels)] = curves(arrange(read_runs([tmp_path]), None, None))
    assert labels == ["cartpole (2 seeds)"]


def test_the_newest_checkpoint_may_be_named_by_a_text_file(tmp_path: Path) -> None:
    """File systems without symbolic links have such files."""
    going = write_run(tmp_path / "going", world_size=None)
    (going / "checkpoints" / "000000000010").mkdir(parents=True)
    (going / "checkpoints" / "000000000010" / "manifest.json").write_text(json.dumps({"world_size": 2}))
    (going / "checkpoints" / "latest").write_text("000000000010\n")
    [run] = read_runs([going])
    assert run.settings["world_size"] == 2


def test_several_evaluations_are_preferred_to_training_returns(tmp_path: Path) -> None:
    write_run(tmp_path / "along", evaluations=5)
    write_run(tmp_path / "only-at-the-end", evaluations=1)
    assert arrange(read_runs([tmp_path / "along"]), None, None)[0].y == "eval_return_mean"
    assert arrange(read_runs([tmp_path / "only-at-the-end"]), None, None)[0].y == "episode_return_mean"
    assert arrange(read_runs([tmp_path]), None, None)[0].y == "episode_return_mean"
    assert arrange(read_runs([tmp_path]), None, "loss")[0].y == "loss"


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert len(read_runs([run, tmp_path, tmp_path / "run" / ".." / "run", run / "metrics.jsonl"])) == 1


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("preset", "pong", "pong"),
        ("preset", "minatar,rainbow", "minatar + rainbow"),
        ("preset", "", "no preset"),
        ("world_size", 1, "1 rank"),
        ("world_size", 8, "8 ranks"),
        ("world_size", None, "unknown world size"),
        ("double", False, "no double"),
        ("double", True, "double"),
        ("n_step", 3, "n-step 3"),
        ("lr", 0.00025, "lr 0.00025"),
        ("replay_capacity", 1_000_000, "replay capacity 1,000,000"),
        ("head", "c51", "head c51"),
        ("wrapper", [], "no wrapper"),
        ("hidden", [256, 256], "hidden 256 256"),
    ],
)
def test_labels_are_words(key: str, value: Any, words: str) -> None:
    assert in_words(key, value) == words


def test_labels_name_the_preset_and_not_what_all_curves_share(tmp_path: Path) -> None:
    for n_step in (1, 3):
        for seed in (1, 2):
            write_run(tmp_path / f"{n_step}-{seed}", seed=seed, n_step=n_step, preset="pong", world_size=1)
    panels = arrange(read_runs([tmp_path]), None, None)
    assert list(legend_labels(panels).values()) == ["pong, n-step 1", "pong, n-step 3"]
    assert shared_facts(panels) == ["2 seeds per curve"]


def test_labels_do_not_name_what_the_presets_set(tmp_path: Path) -> None:
    for n_step in (1, 3):
        write_run(tmp_path / f"a{n_step}", preset="dqn", n_step=n_step, lr=0.1)
    write_run(tmp_path / "b", preset="dqn", n_step=1, lr=0.2)
    write_run(tmp_path / "c", preset="rainbow", n_step=5, lr=0.3)
    panels = arrange(read_runs([tmp_path]), None, None)
    assert list(legend_labels(panels)) == ["dqn", "dqn, n-step 3", "dqn, lr 0.2", "rainbow"]


def test_without_a_preset_the_common_settings_are_the_baseline(tmp_path: Path) -> None:
    for name, lr in {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.3}.items():
        write_run(tmp_path / name, preset="''", lr=lr, sync="server" if name == "b" else "gradients")
    panels = arrange(read_runs([tmp_path]), None, None)
    assert list(legend_labels(panels)) == ["lr 0.1", "lr 0.1, sync server", "lr 0.2", "lr 0.3"]
    assert shared_facts(panels) == ["1 seed per curve", "2 ranks"]
    panels = arrange(read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "d"]), None, None)
    assert list(legend_labels(panels)) == ["baseline", "sync server", "lr 0.3"]
    assert list(legend_labels(arrange(read_runs([tmp_path / "a"]), None, None))) == ["all runs"]


def test_the_legend_has_the_number_of_seeds_if_it_differs(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", seed=seed)
    write_run(tmp_path / "b", preset="dqn")
    write_run(tmp_path / "c", env="Acrobot-v1")
    panels = arrange(read_runs([tmp_path]), None, None)
    assert list(legend_labels(panels).values()) == ["cartpole (1 to 3 runs)", "dqn (1 seed)"]
    assert shared_facts(panels) == ["2 ranks"]


# The picture


def many_curves(count: int) -> list[Panel]:
    """Return a panel of curves with two seeds and labels of usual length."""
    groups = [
        Group(
            f"minatar + rainbow, replay capacity {100_000 + n:,}",
            [run_of({0: 0, 9: n}), run_of({0: 1, 9: n})],
        )
        for n in range(count)
    ]
    return [Panel("MinAtar/Breakout-v1", groups, "episode_return_mean")]


@pytest.mark.parametrize("count", [1, 4, 10, 30])
def test_the_legend_takes_less_than_a_third_of_the_picture(count: int) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with mpl.rc_context(STYLE):
        figure = draw(many_curves(count), "env_steps", "A title")
        FigureCanvasAgg(figure).draw()
        legend = figure.legends[0].get_window_extent()
    assert legend.height < figure.bbox.height / 3
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    assert len(figure.legends[0].get_texts()) == count


def test_bands_are_drawn_only_for_few_curves() -> None:
    few, many = (draw(many_curves(MAX_CURVES_WITH_BANDS + n), "env_steps").axes[0] for n in (0, 1))
    assert len(few.collections) == MAX_CURVES_WITH_BANDS
    assert len(many.collections) == 0
    assert len(many.get_lines()) == MAX_CURVES_WITH_BANDS + 1


def test_ten_curves_have_different_colours() -> None:
    """No two have a CIE 1976 difference below 30; the two blues of Okabe and Ito's palette have 26."""

    def lab(colour: str) -> NDArray[np.float64]:
        rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = (
            np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
        )
        xyz /= [0.9505, 1.0, 1.089]  # the white point
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    lines = draw(many_curves(10), "env_steps").axes[0].get_lines()
    assert [line.get_color() for line in lines] == list(COLOURS)
    differences = [np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(COLOURS, 2)]
    assert min(differences) > 30


def test_the_axes_have_titles_and_labels(tmp_path: Path) -> None:
    write_run(tmp_path / "a", evaluations=5)
    write_run(tmp_path / "b", evaluations=5, env="Acrobot-v1")
    panels = arrange(read_runs([tmp_path]), None, None)
    first, second = draw(panels, "wall_seconds").axes
    assert (first.get_title("left"), second.get_title("left")) == ("CartPole-v1", "Acrobot-v1")
    assert first.get_ylabel() == "Evaluation return (mean of 20 episodes)"
    assert first.get_xlabel() == "Wall time (seconds)"
    assert first.xaxis.get_major_formatter()(1_500_000.0) == "1,500,000"


def test_wall_time_has_a_suitable_unit() -> None:
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


def test_the_same_runs_give_the_same_picture(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s{seed}", seed=seed, slope=seed)
    assert main([str(tmp_path), "-o", str(tmp_path / "a.svg")]) == 0
    assert main([str(tmp_path), "-o", str(tmp_path / "b.svg")]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_picture_of_one_run_is_in_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run / "metrics.jsonl")]) == 0
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == 2 * f"{run}/curves.png\n"
    assert (run / "curves.png").read_bytes().startswith(PNG)


def test_a_run_with_an_incomplete_last_line_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 110, "episode_ret')
    assert len(read_runs([run])[0].records) == 10


# Wrong input


def test_a_run_without_records_does_not_hide_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "going")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").touch()
    assert [run.directory.name for run in read_runs([tmp_path])] == ["going"]
    with pytest.raises(UserError, match=r"begun/metrics\.jsonl has no records yet"):
        read_runs([tmp_path / "begun"])


def with_closed_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make folders named `closed` unreadable; file permissions do not apply to root."""
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
        (["empty"], "empty contains no metrics.jsonl with records"),
        (["torn"], "torn/metrics.jsonl is damaged: line 2 is no JSON object; delete that line"),
        (["mapless"], "mapless/config.yaml cannot be read as a mapping"),
        (["nameless"], "nameless/config.yaml cannot be read as a mapping"),
        (["words"], "words/metrics.jsonl has a loss that is not a number; fix it"),
        (["closed"], "cannot read closed: Permission denied; make it readable"),
        (
            ["run", "-o", "curve.bmp"],
            "curve.bmp is not a supported file format; use a name that ends in .png or .svg",
        ),
        (["run", "-o", "run/config.yaml/curve.png"], "cannot write run/config.yaml/curve.png: "),
        (["run", "--y", "episode_return"], "did you mean 'episode_return_mean'"),
        (["run", "--group", "presets"], "did you mean 'preset'"),
        (["run", "--x", "hours"], "'hours'"),
        (["run", "--smoothing"], "unknown argument '--smoothing'"),
        (["run", "--smooth", "-1"], "--smooth is -1; give a number of points"),
        (["run", "--labels", "a,b"], "--labels has 2 names, for the 1 curves"),
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
