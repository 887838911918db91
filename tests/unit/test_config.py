"""Settings: precedence, round trips, what their annotations declare, and one-line errors of flags and YAML."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hvdqn.config import (
    Config,
    as_yaml,
    check_world,
    incidental_settings,
    parse,
    preset_config,
    same_setting,
    settings_fixed_on_resume,
    settings_of_exact_resume,
    settings_of_same_curve,
    unused_settings,
)
from hvdqn.config.fields import above, at_least, at_most, between
from hvdqn.config.names import OTHER_NAMES
from hvdqn.config.presets import PRESETS
from hvdqn.config.settings import SETTINGS
from hvdqn.config.validation import TORSOS
from hvdqn.errors import UserError


def test_precedence_defaults_preset_file_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: cartpole\nlr: 0.5\ngamma: 0.9\nhidden: [7]\n")
    config = parse(["--config", str(file), "--lr", "0.25"])
    assert config.preset == "cartpole"
    assert config.learning.lr == 0.25  # flag over file
    assert config.learning.gamma == 0.9  # file over preset
    assert config.network.hidden == (7,)
    assert config.replay.replay_ratio == PRESETS["cartpole"]["replay_ratio"]  # preset over default
    assert config.learning.loss == Config().learning.loss


@pytest.mark.parametrize("preset", PRESETS)
def test_written_config_repeats_the_run(preset, tmp_path):
    config = parse(["--preset", preset, "--seed", "7", "--wrapper", "a:b", "--wrapper", "c:d", "--no-double"])
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_repeated_flag_counts_once_and_a_repeated_wrapper_is_added():
    config = parse(["--lr", "1", "--lr=2", "--wrapper", "a:b", "--wrapper=c:d"])
    assert config.learning.lr == 2
    assert config.environment.wrapper == ("a:b", "c:d")


def test_underscores_count_as_hyphens_and_negative_numbers_as_values():
    config = parse(
        ["--total_env_steps", "3000", "--head", "c51", "--v_min", "-1e1", "--v-max=-.5", "--hidden"]
    )
    assert config.run.total_env_steps == 3000
    assert (config.network.v_min, config.network.v_max, config.network.hidden) == (-10.0, -0.5, ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1, 2]", ["--lr is [1, 2]", "a number"]),
        ("lr: true", ["--lr is True", "a number"]),
        ("seed: true", ["--seed", "True is no whole number"]),
        ("seed: 1.5", ["--seed", "1.5 is no whole number"]),
        ("seed: {a: 1}", ["--seed", "no whole number"]),
        ("hidden: [64, wide]", ["--hidden", "'wide' is no whole number"]),
        ("hidden: 64,64", ["--hidden", "blanks between", "64 64"]),
        ("dueling: 1", ["dueling is 1", "true or false"]),
        ("loss: hubert", ["--loss is 'hubert'", "huber, mse"]),
        ("env: [CartPole-v1]", ["env is ['CartPole-v1']", "text"]),
        ("run_dir: on", ["run_dir is True", "in quotes"]),
        ("env_kwargs: {day: 2024-01-31}", ["env_kwargs", "JSON", "in quotes"]),
        ("preset: [cartpole, 1]", ["unknown preset '1'"]),
        ("preset: [cartpole, [rainbow]]", ["preset is ['rainbow']", "text"]),
        ("total_env_steps: .inf", ["--total-env-steps", "no whole number"]),
        ("total_env_steps: .nan", ["--total-env-steps", "no whole number"]),
        ("preset: cartpol", ["unknown preset 'cartpol'", "'cartpole'"]),
        ("batch_per_rank: 0", ["in the config file", "--batch-per-rank is 0", "at least 1"]),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_the_remedy(text, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        parse(["--config", str(file)])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_flag_replaces_a_value_that_is_out_of_range_in_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("gamma: 1.5\n")
    assert parse(["--config", str(tmp_path / "run.yaml"), "--gamma", "0.9"]).learning.gamma == 0.9


def test_help_shows_the_values_of_the_preset_and_of_the_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("batch_per_rank: 77\n")
    with pytest.raises(SystemExit) as left:
        parse(["--preset", "cartpole", "--config", str(tmp_path / "run.yaml"), "--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Rewards summed before bootstrapping. (default: 3)" in said
    assert "Global batch = size x batch_per_rank. (default: 77)" in said


def test_nothing_here_imports_torch():
    code = "import sys; from hvdqn.config import parse; parse(['--preset', 'atari']); print('torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout == "False\n"


def test_every_setting_is_documented():
    for section in dataclasses.fields(Config):
        if isinstance(section.default_factory, type):
            source = inspect.getsource(section.default_factory)
            for setting in dataclasses.fields(section.default_factory):
                after = source[source.index(f"    {setting.name}: ") :].splitlines()[1]
                assert after.strip().startswith('"""'), f"--{setting.name} has no help text"


@pytest.mark.parametrize("names", ["minatar,rainbow,smoke", "smoke, rainbow,minatar"])
def test_an_algorithm_wins_over_an_environment_and_smoke_over_both(names):
    joined = preset_config(names)
    assert joined.preset == names.replace(" ", "")
    assert joined.environment.env == PRESETS["minatar"]["env"]
    assert joined.network.head == "c51"
    assert joined.network.layer_norm, "set only for the pair of them"
    assert joined.run.total_env_steps == PRESETS["smoke"]["total_env_steps"]


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"smoke"}))
def test_every_preset_can_be_tried_for_seconds(preset):
    assert parse(["--preset", f"{preset},smoke"]).run.total_env_steps == 2_000


def test_a_written_config_names_no_run_directory(tmp_path):
    """Fed back, it would only resume the run that it was written in."""
    (tmp_path / "config.yaml").write_text(as_yaml(parse(["--run-dir", "there", "--resume", "must"])))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == Config()


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in PRESETS)


@pytest.mark.parametrize("written", ["1000000", "1_000_000", "1e6", "1.0E6", "1.0e+6", "1000000.0"])
def test_spellings_of_whole_numbers(written, tmp_path):
    assert parse(["--total-env-steps", written]).run.total_env_steps == 1_000_000
    (tmp_path / "run.yaml").write_text(f"total_env_steps: {written}\nhidden: [{written}, 8]\n")
    config = parse(["--config", str(tmp_path / "run.yaml")])
    assert (config.run.total_env_steps, config.network.hidden) == (1_000_000, (1_000_000, 8))


def test_a_file_with_values_of_other_yaml_types(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("wrapper: a:b\nrun_dir:\ncheckpoint_replay: no\ndouble: no\nlr: 1\n")
    config = parse(["--config", str(file)])
    assert config.environment.wrapper == ("a:b",)
    assert config.run.run_dir == ""
    assert config.run.checkpoint_replay == "no"
    assert not config.learning.double
    assert config.learning.lr == 1.0


def test_flags_replace_the_files_wrappers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("wrapper: [a:b]\n")
    assert parse(["--config", str(file)]).environment.wrapper == ("a:b",)
    assert parse(["--config", str(file), "--wrapper=c:d"]).environment.wrapper == ("c:d",)


@pytest.mark.parametrize("written", ["total_env_steps: 3.0e+3", "total_env_steps: '3000.0'"])
def test_floats_that_are_whole_numbers_in_a_file(written, tmp_path):
    (tmp_path / "run.yaml").write_text(written)
    steps = parse(["--config", str(tmp_path / "run.yaml")]).run.total_env_steps
    assert (steps, type(steps)) == (3_000, int)


def test_a_list_of_presets_in_a_file_joins_them(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: [cartpole, rainbow]\n")
    assert parse(["--config", str(tmp_path / "run.yaml")]) == parse(["--preset", "cartpole,rainbow"])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', True),
        ("", "{}", True),
        ('{"a": 1}', '{"a": 2}', False),
        ("no JSON", "no JSON", True),
        ("no JSON", "{}", False),
    ],
)
def test_arguments_of_an_environment_are_compared_by_their_content(one, other, same):
    assert same_setting("env_kwargs", one, other) == same


def test_env_kwargs_may_be_a_mapping_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("env_kwargs: {sutton_barto_reward: true}\n")
    assert yaml.safe_load(parse(["--config", str(file)]).environment.env_kwargs) == {
        "sutton_barto_reward": True
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--presett", "x"], ["'--presett'", "did you mean", "'--preset'"]),
        (["--lr"], ["--lr"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--loss", "hubert"], ["--loss", "huber", "mse"]),
        (["--preset", "cartpol"], ["cartpol", "'cartpole'"]),
        (["stray"], ["stray"]),
        (["--epsilon-end", "1.5"], ["--epsilon-end", "[0, 1]"]),
        (["--lr", "nan"], ["--lr", "finite"]),
        (["--hidden", "8", "0"], ["--hidden", "at least 1"]),
        (["--target-every", "0"], ["--target-every", "--target-tau"]),
        (["--batch-per-rank", "--lr", "1"], ["--batch-per-rank needs a value", "such as 32"]),
        (["--env"], ["--env needs a value"]),
        (["--seed", "1_0.5"], ["--seed", "'1_0.5' is no whole number", "1e6"]),
        (["--no-doubl"], ["unknown argument '--no-doubl'", "did you mean '--no-double'"]),
        (["-x", "1"], ["unknown argument '-x'"]),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(argv, words):
    with pytest.raises(UserError) as refused:
        parse(argv)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["--sync-every", "8"], ["--sync-every does nothing without --sync parameters"]),
        (["--sync", "parameters", "--sync-every", "8"], []),
        (
            ["--preset", "rainbow", "--munchausen-clip", "-2"],
            ["--munchausen-clip does nothing without --munchausen"],
        ),
        (["--preset", "rainbow", "--head", "qr"], []),  # the settings of c51 are the preset's, not the user's
        (
            ["--exploration", "ladder", "--epsilon-end", "0.2", "--ladder-alpha", "3", "--optimizer", "sgd"],
            ["--epsilon-end does nothing without --exploration linear or --exploration softmax"],
        ),
        (
            ["--replay", "none", "--n-step", "3"],
            ["--n-step does nothing without --replay uniform or --replay prioritized"],
        ),
        (["--epochs", "3"], ["--epochs does nothing without --replay none"]),
    ],
)
def test_settings_without_effect_are_reported(argv, lines):
    assert unused_settings(parse(argv)) == lines


def test_shards_shrink_with_the_number_of_ranks():
    config = Config().replace(replay_capacity=1_200, batch_per_rank=400)
    check_world(config, ranks=2)
    with pytest.raises(UserError, match="300"):
        check_world(config, ranks=4)


def test_a_run_is_longer_than_a_rollout_of_all_ranks():
    """8 environments take 32 steps each: 256 env steps on one rank, 512 on two."""
    config = parse(["--replay", "none", "--total-env-steps", "512"])
    check_world(config, ranks=1)
    with pytest.raises(UserError, match="follows a rollout of 512"):
        check_world(config, ranks=2)


def test_the_minibatch_follows_from_the_rollout():
    flags = "--replay none --envs-per-rank 6 --rollout-steps 10 --minibatches 3 --batch-per-rank 7"
    config = parse(flags.split())
    assert config.batch_per_rank == 20
    assert parse(["--batch-per-rank", "7"]).batch_per_rank == 7


# What the annotations of settings declare


def test_settings_that_a_resume_must_keep():
    assert set(settings_fixed_on_resume()) == {
        "seed", "env", "env_kwargs", "wrapper", "frame_stack", "torso", "hidden", "head", "dueling", "noisy",
        "layer_norm", "center_images", "torso_width", "torso_pool", "spectral_norm", "atoms", "v_min", "v_max",
        "quantiles", "iqn_embedding", "optimizer", "replay",
        "sync", "outer_lr", "outer_momentum", "action_bins", "normalize_observations",
    }  # fmt: skip


def test_settings_that_an_exact_resume_must_keep():
    assert set(settings_of_exact_resume()) == {
        "envs_per_rank", "replay_capacity", "rollout_steps", "epochs", "minibatches", "vectorization", "model_parallel",
    }  # fmt: skip


def test_settings_whose_change_a_resume_does_not_report():
    beginning = {"init_from", "init_torso_only", "prefill"}
    assert set(incidental_settings()) == {"run_dir", "resume", "preset", "track", *beginning}


def test_settings_in_which_runs_of_one_curve_may_differ():
    assert set(settings_of_same_curve()) == {
        "seed", "run_dir", "resume", "device", "comm", "threads_per_rank", "log_every", "checkpoint_every", "log_info",
        "checkpoint_keep", "checkpoint_replay", "eval_every", "eval_episodes", "stall_timeout", "replay_device",
        "cuda_graphs", "host_sum", "model_parallel", "callback", "stop_at_return", "track",
    }  # fmt: skip


def test_a_dependency_names_a_setting_and_values_that_it_can_have():
    for field in SETTINGS.values():
        for needs in field.needs:
            chooser = SETTINGS[needs.setting]
            choices = TORSOS if chooser.name == "torso" else chooser.choices or (True, False)
            assert set(needs.values) <= set(choices), field.name


def test_every_default_lies_in_its_range():
    for field in SETTINGS.values():
        numbers = field.default if isinstance(field.default, tuple) else (field.default,)
        assert all(number in allowed for allowed in field.ranges for number in numbers), field.name


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (at_least(1), [1, 2, 10**30], [0, -1], "at least 1"),
        (at_least(0), [0, 0.5], [-0.1], "0 or more"),
        (at_most(255), [255, -3], [256], "at most 255"),
        (above(0), [1e-300], [0, -1], "above 0"),
        (between(0, 1), [0, 0.5, 1], [-0.1, 1.1], "within [0, 1]"),
        (between(0, 1, excluded=(0,)), [1e-9, 1], [0, 0.0, 1.1], "within (0, 1]"),
        (between(0, 1, excluded=(1,)), [0, 0.9], [1, 1.0], "within [0, 1)"),
    ],
)
def test_ranges(allowed, inside, outside, words):
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)
    assert allowed.words == words


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("learning-rate", "lr"),
        ("total-timesteps", "total-env-steps"),
        ("buffer_size", "replay-capacity"),
        ("batch-size", "batch-per-rank"),
        ("num-envs", "envs-per-rank"),
        ("target-network-frequency", "target-every"),
        ("exploration-fraction", "exploration-env-steps"),
        ("tau", "target-tau"),
        ("eval-freq", "eval-every"),
        ("output-dir", "run-dir"),
        ("algo", "preset"),
    ],
)
def test_names_of_other_libraries_lead_to_ours(other, ours, tmp_path):
    with pytest.raises(UserError, match=f"; did you mean '--{ours}'\\?"):
        parse([f"--{other}", "1"])
    (tmp_path / "run.yaml").write_text(f"{other}: 1\n")
    with pytest.raises(UserError, match=f"; did you mean '{ours.replace('-', '_')}'\\?"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_names_of_other_libraries_are_not_ours():
    assert not set(OTHER_NAMES) & set(SETTINGS)
    assert set(OTHER_NAMES.values()) - set(SETTINGS) == {"episodes"}, "which is a flag of `hvdqn eval`"


# The settings of a run that is resumed


def written(folder, *flags):
    """Write the config.yaml of a run; return the flag that names its directory."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(as_yaml(parse(flags)))
    return ["--run-dir", str(folder)]


def test_precedence_preset_run_file_flags(tmp_path):
    run_dir = written(
        tmp_path / "run", "--preset", "cartpole", "--lr", "0.5", "--gamma", "0.5", "--seed", "5"
    )
    (tmp_path / "file.yaml").write_text("gamma: 0.6\nseed: 6\n")
    config = parse(["--preset", "cartpole", *run_dir, "--config", str(tmp_path / "file.yaml"), "--seed", "7"])
    assert (config.preset, config.learning.lr, config.learning.gamma) == ("cartpole", 0.5, 0.6)
    assert config.run.seed == 7
    assert config.network.dueling, "the preset of the run is not its own"


def test_a_run_directory_named_in_a_file_counts_and_resume_never_does_not(tmp_path):
    run_dir = written(tmp_path / "run", "--lr", "0.5")
    (tmp_path / "file.yaml").write_text(f"run_dir: {run_dir[1]}\n")
    assert parse(["--config", str(tmp_path / "file.yaml")]).learning.lr == 0.5
    assert parse([*run_dir, "--resume", "never"]).learning.lr == Config().learning.lr
    assert parse(["--run-dir", str(tmp_path)]).learning.lr == Config().learning.lr, "there is no config.yaml"


def test_a_home_directory_is_found_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "run", "--lr", "0.5")
    assert parse(["--run-dir", "~/run"]).learning.lr == 0.5


@pytest.mark.parametrize(
    ("presets", "words"),
    [
        (
            ("cartpole", None, "smoke"),
            "was begun with --preset smoke, not --preset cartpole; keep it, or choose",
        ),
        (("cartpole", None, ""), "was begun with no preset, not --preset cartpole"),
        ((None, "", "smoke"), "was begun with --preset smoke, not no preset"),
        (("rainbow", "cartpole", None), "holds the settings of --preset cartpole; leave one of them out"),
        (("rainbow", "", None), "holds the settings of no preset; leave one of them out"),
        (("smoke,minatar", "minatar,smoke", "smoke,minatar"), None),
        ((None, "cartpole", "cartpole"), None),
        ((None, None, "cartpole"), None),
    ],
)
def test_the_preset_that_is_recorded_is_the_one_that_the_settings_are_of(presets, words, tmp_path):
    flag, in_file, of_run = presets
    argv = ["--preset", flag] if flag else []
    if in_file is not None:
        written(tmp_path / "other", "--preset", in_file)
        argv += ["--config", str(tmp_path / "other" / "config.yaml")]
    if of_run is not None:
        argv += written(tmp_path / "run", "--preset", of_run)
    if words is None:
        config = parse(argv)
        assert config.replace(run_dir="") == preset_config(config.preset)
        return
    with pytest.raises(UserError, match=words):
        parse(argv)


@pytest.mark.parametrize("columns", [72, 100])
def test_help_breaks_lines_only_where_they_are_full(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    indent = max(len(line) - len(line.lstrip()) for line in lines)
    for line, after in itertools.pairwise(lines):
        is_flag_alone = len(line.split()) <= 2 and line.lstrip().startswith("--")
        is_text = line.strip() and line[indent - 1 : indent] == " " and not is_flag_alone
        if is_text and after.startswith(" " * indent):
            assert len(line) + 1 + len(after.split()[0]) > columns, f"{line!r} goes on with {after!r}"


def test_a_resumed_run_chooses_its_engine_and_device_anew(tmp_path: Path) -> None:
    """Another launcher may resume it, on other hosts."""
    flags = [
        "--run-dir",
        str(tmp_path),
        "--comm",
        "mpi",
        "--device",
        "cpu",
        "--threads-per-rank",
        "3",
        "--lr",
        "0.01",
    ]
    (tmp_path / "config.yaml").write_text(as_yaml(parse(flags)))
    resumed = parse(["--run-dir", str(tmp_path)])
    assert (resumed.parallel.comm, resumed.parallel.device, resumed.parallel.threads_per_rank) == (
        "auto",
        "auto",
        0,
    )
    assert resumed.learning.lr == 0.01
