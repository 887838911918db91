"""Frames that lie on a device, here the CPU as a device: the same ring, the same minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hvdqn.comm.local import LocalComm
from hvdqn.config import parse
from hvdqn.errors import UserError
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts, place_frames
from hvdqn.replay import PrioritizedSampler, Replay, Ring, UniformSampler
from hvdqn.replay.frames import DeviceFrames, HostFrames, MakeFrames, PinnedFrames
from hvdqn.trailer import REPORTED
from tests.unit.replay_naive import ScriptedEnvs, check_ring, ring_for
from tests.unit.test_replay import SCRIPT

ON_DEVICE = partial(DeviceFrames, device=torch.device("cpu"))
SAMPLERS = {"uniform": UniformSampler, "prioritized": PrioritizedSampler}


def replays(
    sampler: str, kinds: Sequence[MakeFrames] = (HostFrames, ON_DEVICE)
) -> tuple[ScriptedEnvs, list[Replay]]:
    """The same environments recorded in rings of these kinds: one on the host and one on the device."""
    envs = ScriptedEnvs(SCRIPT, "same_step")
    rings = [ring_for(envs, 3 * 13, 2, 3, frames=kind) for kind in kinds]
    made = [Replay(ring, SAMPLERS[sampler](ring, np.random.default_rng(0))) for ring in rings]
    first = envs.reset()
    for replay in made:
        replay.start(first)
    for _ in range(40):
        step = envs.step()
        for replay in made:
            replay.add(*step)
    return envs, made


@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("n_step", [1, 3])
def test_every_start_gives_what_a_naive_loop_gives(n_step: int, frame_stack: int) -> None:
    envs = ScriptedEnvs(SCRIPT, "next_step")
    ring = ring_for(envs, 3 * 13, frame_stack, n_step, frames=ON_DEVICE)
    ring.start(envs.reset())
    for _ in range(70):
        ring.add(*envs.step())
        check_ring(ring, envs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_minibatches_are_those_of_the_host(sampler: str) -> None:
    _, made = replays(sampler)
    for _ in range(5):
        host, device = (replay.sample(16) for replay in made)
        assert isinstance(device.observation, torch.Tensor)
        for field in host.__slots__:
            np.testing.assert_array_equal(np.asarray(getattr(device, field)), getattr(host, field))
        for replay in made:
            replay.update(host.rows, np.linspace(0.1, 2.0, 16))


def test_a_minibatch_lasts_until_the_second_next() -> None:
    _, (_, replay) = replays("uniform")
    first = replay.sample(16)
    assert isinstance(first.observation, torch.Tensor)
    kept = first.observation.clone()
    replay.sample(16)
    assert torch.equal(first.observation, kept)
    assert replay.sample(16) is first


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float32])
def test_a_state_goes_from_the_host_to_the_device_and_back(dtype: Any) -> None:
    def ring(kind: Any) -> Ring:
        return Ring(2, 8, (4,), dtype, frames=kind)

    host, device, back = ring(HostFrames), ring(ON_DEVICE), ring(HostFrames)
    host.start(np.arange(8).reshape(2, 4).astype(dtype))
    device.load_state(host.state())
    back.load_state(device.state())
    assert device.observation.dtype == dtype
    assert device.observation[0:1].tolist() == host.observation[0:1].tolist()
    for name, array in host.state().items():
        np.testing.assert_array_equal(back.state()[name], array)
    with pytest.raises(ValueError, match=r"0/observation is .*\[1, 4\], this ring holds .*\[1, 5\]"):
        Ring(2, 8, (5,), dtype, frames=ON_DEVICE).load_state(host.state())


def test_an_update_takes_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same seed: the parameters are equal, bit for bit."""
    learned = []
    for kind in (HostFrames, ON_DEVICE):
        monkeypatch.setattr("hvdqn.parts.HostFrames", kind)
        parts = build_parts(parse(["--preset", "minatar,rainbow"]), LocalComm(), PhaseTimer())
        parts.replay.start(parts.actor.start())
        for _ in range(20):
            actions = parts.actor.choose(1.0)
            parts.replay.add(actions, parts.actor.step(actions))
        for _ in range(3):
            parts.learner.begin_update(parts.replay.sample(32), (0.0,) * len(REPORTED))
            parts.replay.update(*parts.learner.finish_update())
        parts.envs.close()
        learned.append(parts.learner.parameters)
        assert isinstance(parts.replay.ring.observation, HostFrames if kind is HostFrames else DeviceFrames)
    assert torch.equal(*learned)


def test_frames_go_to_the_gpu_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks share a GPU with 10 MB free; a MinAtar Breakout observation has 400 bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000, 20_000_000))
    parts = build_parts(parse(["--preset", "minatar"]), LocalComm(), PhaseTimer())
    parts.envs.close()

    def placed(*flags: str, device: str = "cuda") -> Any:
        config = parse(["--preset", "minatar", *flags])
        return place_frames(config, 1, parts.envs, torch.device(device), sharing=2)

    def on_gpu(made: Any) -> bool:
        return isinstance(made, partial) and made.func is DeviceFrames

    assert on_gpu(placed("--replay-capacity", "6250"))
    assert placed("--replay-capacity", "6251") is PinnedFrames
    assert placed("--replay-capacity", "6250", "--replay-device", "cpu") is PinnedFrames
    assert on_gpu(placed("--replay-capacity", "6251", "--replay-device", "cuda"))
    assert placed(device="cpu") is HostFrames
    with pytest.raises(UserError, match="--replay-device cuda, but the networks live on the CPU"):
        placed("--replay-device", "cuda", device="cpu")
