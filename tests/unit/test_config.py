"""Precedence, round trips and one-line errors of the command line."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import yaml

from hvdqn.config import Config, UserError, check_world, parse, preset_config, write_config
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
    write_config(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_every_setting_is_documented():
    for section in dataclasses.fields(Config):
        if isinstance(section.default_factory, type):
            source = inspect.getsource(section.default_factory)
            for setting in dataclasses.fields(section.default_factory):
                after = source[source.index(f"    {setting.name}: ") :].splitlines()[1]
                assert after.strip().startswith('"""'), f"--{setting.name} has no help text"


def test_later_presets_win():
    both = preset_config("cartpole,smoke")
    assert both.run.total_env_steps == PRESETS["smoke"]["total_env_steps"]
    assert both.network.hidden == PRESETS["cartpole"]["hidden"]


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


def test_shards_shrink_with_the_world():
    config = Config().replace(replay_capacity=1_200, batch_per_rank=400)
    check_world(config, size=2)
    with pytest.raises(UserError, match="300"):
        check_world(config, size=4)
