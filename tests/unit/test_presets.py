"""Every preset can be started, with any number of ranks that users are likely to choose."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from hvdqn.bench.training import acting_parts
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, check_world, parse
from hvdqn.config.presets import PRESETS
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts

NEEDS = {
    "lunarlander": "Box2D",
    "mujoco": "mujoco",
    "minatar": "minatar",
    "atari": "ale_py",
    "pong": "ale_py",
    "bench-pong": "ale_py",
}


@pytest.mark.parametrize("name", PRESETS)
def test_it_parses_and_sets_its_values(name):
    config = parse(["--preset", name])
    assert config.preset == name
    flat = config.flat()
    for setting, value in PRESETS[name].items():
        assert flat[setting] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_it_fits_any_number_of_ranks(name, ranks):
    check_world(parse(["--preset", name]), ranks)


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_consistent(name):
    run = parse(["--preset", name])
    assert run.replay.learning_starts < run.run.total_env_steps
    assert run.exploration.exploration_env_steps <= run.run.total_env_steps
    assert run.learning.target_every <= run.run.total_env_steps
    assert run.run.checkpoint_every <= run.run.total_env_steps


@pytest.mark.parametrize("name", PRESETS)
def test_its_parts_are_built_and_its_environments_step(name):
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: the preset {name} is NOT tested")
    # A million Atari frames do not fit into the memory of every machine that runs tests.
    preset = parse(["--preset", name])
    config = preset.replace(
        envs_per_rank=2, replay_capacity=min(preset.replay.replay_capacity, 10_000), learning_starts=100
    )
    parts = build_parts(config, LocalComm(), PhaseTimer())
    try:
        acting = acting_parts(parts)
        acting.replay.start(acting.actor.start())
        for _ in range(8):
            actions = acting.actor.choose(1.0)
            acting.replay.add(actions, acting.actor.step(actions))
        statistics = parts.learner.compute_gradient(acting.replay.sample(config.replay.batch_per_rank))
        assert statistics.isfinite().all()
        assert parts.learner.gradient.abs().sum() > 0
    finally:
        acting_parts(parts).envs.close()


def test_one_atari_transition_takes_at_most_7500_bytes():
    """One 84 x 84 frame takes 7,056 bytes; a buffer of stacked pairs of observations would take 56 kB."""
    if find_spec("ale_py") is None:
        pytest.skip("ale_py is not installed: replay memory of Atari is NOT tested")
    config = parse(["--preset", "atari"]).replace(replay_capacity=8_000, learning_starts=1_000)
    assert ring_bytes(config) <= 7_500 * config.replay.replay_capacity


def ring_bytes(config: Config) -> int:
    parts = build_parts(config, LocalComm(), PhaseTimer())
    acting_parts(parts).envs.close()
    return acting_parts(parts).replay.nbytes
