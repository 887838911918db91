"""`hvdqn presets`, `--print-config`, and the hint at a preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdqn import presets
from hvdqn.config import PRESETS, Config, fitting_preset, parse, preset_config


def test_the_list_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert presets.main([]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert [word for word in words if word in PRESETS] == list(PRESETS)


@pytest.mark.parametrize("names", [*PRESETS, "minatar,rainbow"])
def test_a_preset_is_printed_as_a_config_file(
    names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert presets.main([names]) == 0
    file = tmp_path / "preset.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]).replace(preset=names) == preset_config(names).replace(
        preset=names, config=""
    )
    keys = [line.split(":")[0] for line in file.read_text().splitlines()[1:]]
    usual, settings = Config().flat(), preset_config(names).flat()
    assert keys == [name for name in usual if name != "preset" and settings[name] != usual[name]]


def test_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert presets.main(["cartpol"]) == 2
    assert capsys.readouterr().err.startswith("hvdqn presets: error: unknown preset 'cartpol'; did you mean")


@pytest.mark.parametrize(
    ("env", "preset"),
    [
        ("CartPole-v1", "cartpole"),
        ("LunarLander-v3", "lunarlander"),
        ("MinAtar/Seaquest-v1", "minatar"),
        ("ALE/Pong-v5", "atari"),
        ("ALE/Breakout-v5", "atari"),
        ("Taxi-v3", ""),
        ("mine:CartPole-v1", ""),
    ],
)
def test_the_preset_that_fits_an_environment(env: str, preset: str) -> None:
    assert fitting_preset(env) == preset


def test_print_config_prints_all_settings_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--preset", "cartpole", "--lr", "0.5", "--print-config"])
    assert left.value.code == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    expected = preset_config("cartpole").replace(lr=0.5)
    assert parse(["--config", str(file)]).flat() == expected.flat()
