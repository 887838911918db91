"""Replay with observations on a device, here the CPU as a device: it must return the same minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hvdqn.bench.training import acting_parts, update
from hvdqn.comm.local import LocalComm
from hvdqn.config import parse
from hvdqn.errors import UserError
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts, replay_memory
from hvdqn.replay import HOST_MEMORY, Memory, PrioritizedReplay, Replay
from hvdqn.replay.device import DeviceMemory, PinnedMemory
from tests.unit.replay_naive import ScriptedEnvs, check_replay, make_replay
from tests.unit.test_replay import SCRIPT

ON_DEVICE = DeviceMemory(torch.device("cpu"))
CLASSES = (Replay, PrioritizedReplay)


def replays(
    replay_class: type[Replay], memories: Sequence[Memory] = (HOST_MEMORY, ON_DEVICE)
) -> list[Replay]:
    """Return the same transitions in replays of these memories: one on the host and one on the device."""
    envs = ScriptedEnvs(SCRIPT, "same_step")
    made = [make_replay(envs, 3 * 13, 2, 3, replay_class=replay_class, memory=memory) for memory in memories]
    first = envs.reset()
    for replay in made:
        replay.start(first)
    for _ in range(40):
        step = envs.step()
        for replay in made:
            replay.add(*step)
    return made


@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("n_step", [1, 3])
def test_every_transition_equals_that_of_a_naive_loop(n_step: int, frame_stack: int) -> None:
    envs = ScriptedEnvs(SCRIPT, "next_step")
    replay = make_replay(envs, 3 * 13, frame_stack, n_step, memory=ON_DEVICE)
    replay.start(envs.reset())
    for _ in range(70):
        replay.add(*envs.step())
        check_replay(replay, envs)


@pytest.mark.parametrize("replay_class", CLASSES)
def test_minibatches_are_those_of_the_host(replay_class: type[Replay]) -> None:
    made = replays(replay_class)
    for _ in range(5):
        host, device = (replay.sample(16) for replay in made)
        assert isinstance(device.observation, torch.Tensor)
        for field in host.__slots__:
            np.testing.assert_array_equal(np.asarray(getattr(device, field)), getattr(host, field))
        for replay in made:
            replay.update_priorities(host.row_ids, np.linspace(0.1, 2.0, 16))


def test_a_batch_stays_valid_until_the_second_next_sample() -> None:
    _, replay = replays(Replay)
    first = replay.sample(16)
    assert isinstance(first.observation, torch.Tensor)
    kept = first.observation.clone()
    replay.sample(16)
    assert torch.equal(first.observation, kept)
    assert replay.sample(16) is first


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float32])
def test_a_state_can_be_loaded_on_the_device_and_back(dtype: Any) -> None:
    def make(memory: Memory, size: int = 4) -> Replay:
        return Replay(2, 8, (size,), dtype, np.random.default_rng(0), memory=memory)

    host, device, back = make(HOST_MEMORY), make(ON_DEVICE), make(HOST_MEMORY)
    host.start(np.arange(8).reshape(2, 4).astype(dtype))
    device.load_state(host.state())
    back.load_state(device.state())
    assert device.observation.dtype == dtype
    assert device.observation[0:1].tolist() == host.observation[0:1].tolist()
    for name, array in host.state().items():
        np.testing.assert_array_equal(back.state()[name], array)
    with pytest.raises(ValueError, match=r"0/observation is .*\[1, 4\], this ring holds .*\[1, 5\]"):
        make(ON_DEVICE, size=5).load_state(host.state())


def test_the_description_says_where_observations_are() -> None:
    host, device = replays(Replay)
    assert device.description == host.description + ", observations on cpu"


def test_updates_do_not_depend_on_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seed, the parameters are equal bit for bit."""
    learned = []
    for memory in (HOST_MEMORY, ON_DEVICE):
        monkeypatch.setattr("hvdqn.parts.HOST_MEMORY", memory)
        parts = build_parts(parse(["--preset", "minatar,rainbow"]), LocalComm(), PhaseTimer())
        acting = acting_parts(parts)
        acting.replay.start(acting.actor.start())
        for _ in range(20):
            actions = acting.actor.choose(1.0)
            acting.replay.add(actions, acting.actor.step(actions))
        for _ in range(3):
            batch = acting.replay.sample(32)
            update(parts, batch)
            acting.replay.update_priorities(batch.row_ids, parts.learner.td_errors.numpy())
        acting.envs.close()
        learned.append(parts.learner.parameters)
        assert acting.replay.memory is memory
    assert torch.equal(*learned)


def test_observations_go_to_the_gpu_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks share a GPU with 10 MB free; a MinAtar Breakout observation has 400 bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000, 20_000_000))
    parts = build_parts(parse(["--preset", "minatar"]), LocalComm(), PhaseTimer())
    envs = acting_parts(parts).envs
    envs.close()

    def placed(*flags: str, device: str = "cuda") -> Memory:
        config = parse(["--preset", "minatar", *flags])
        return replay_memory(config, parts.role, envs, torch.device(device), sharing=2)

    assert isinstance(placed("--replay-capacity", "6250"), DeviceMemory)
    assert isinstance(placed("--replay-capacity", "6251"), PinnedMemory)
    assert isinstance(placed("--replay-capacity", "6250", "--replay-device", "cpu"), PinnedMemory)
    assert isinstance(placed("--replay-capacity", "6251", "--replay-device", "cuda"), DeviceMemory)
    assert placed(device="cpu") is HOST_MEMORY
    with pytest.raises(UserError, match="--replay-device cuda, but the networks live on the CPU"):
        placed("--replay-device", "cuda", device="cpu")
