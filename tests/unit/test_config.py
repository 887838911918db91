"""Precedence, round trips and one-line errors of the command line."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import yaml

from hvdqn.config import Config, as_yaml, check_world, parse, preset_config, unused_settings
from hvdqn.errors import UserError
from hvdqn.presets import PRESETS


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


def test_every_setting_is_documented():
    for section in dataclasses.fields(Config):
        if isinstance(section.default_factory, type):
            source = inspect.getsource(section.default_factory)
            for setting in dataclasses.fields(section.default_factory):
                after = source[source.index(f"    {setting.name}: ") :].splitlines()[1]
                assert after.strip().startswith('"""'), f"--{setting.name} has no help text"


@pytest.mark.parametrize("names", ["minatar,rainbow,smoke", "smoke, rainbow,minatar"])
def test_an_algorithm_holds_over_an_environment_and_smoke_over_both(names):
    joined = preset_config(names)
    assert joined.preset == names.replace(" ", "")
    assert joined.environment.env == PRESETS["minatar"]["env"]
    assert joined.network.head == "c51"
    assert joined.network.layer_norm, "what holds where both are named"
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


@pytest.mark.parametrize("written", ["1000000", "1_000_000", "1e6", "1.0E6"])
def test_whole_numbers_as_people_write_them(written, tmp_path):
    assert parse(["--total-env-steps", written]).run.total_env_steps == 1_000_000
    (tmp_path / "run.yaml").write_text(f"total_env_steps: {written}\nhidden: [{written}, 8]\n")
    config = parse(["--config", str(tmp_path / "run.yaml")])
    assert (config.run.total_env_steps, config.network.hidden) == (1_000_000, (1_000_000, 8))


def test_a_file_as_people_write_it(tmp_path):
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
        (["--preset", "rainbow", "--head", "qr"], []),  # what is c51's is the preset's, not the user's
        (
            ["--exploration", "ladder", "--epsilon-end", "0.2", "--ladder-alpha", "3", "--optimizer", "sgd"],
            ["--epsilon-end does nothing without --exploration linear or --exploration softmax"],
        ),
    ],
)
def test_what_a_run_does_not_heed_is_said(argv, lines):
    assert unused_settings(parse(argv)) == lines


def test_shards_shrink_with_the_world():
    config = Config().replace(replay_capacity=1_200, batch_per_rank=400)
    check_world(config, size=2)
    with pytest.raises(UserError, match="300"):
        check_world(config, size=4)
