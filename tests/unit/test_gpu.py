"""Tests that need a GPU. Without one test_graphs.py, test_sync_gradients.py and test_replay_device.py run this code."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from hvdqn.comm.gpus import visible_gpus
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, NetworkConfig, parse
from hvdqn.devices import choose_device
from hvdqn.errors import UserError
from hvdqn.graphs import record_cuda_graph
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.replay import HOST_MEMORY, Replay
from hvdqn.replay.device import DeviceMemory, PinnedMemory
from hvdqn.seeds import load_torch_state, torch_state
from hvdqn.train import main
from tests.unit.test_graphs import LEARNERS, LR
from tests.unit.test_learner import make_batch
from tests.unit.test_replay_device import CLASSES, replays
from tests.unit.test_sync_gradients import REPORT, Rank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: torch sees no GPU here")

GPU = torch.device("cuda")
RANDOM = {
    "noisy": NetworkConfig(hidden=(32,), noisy=True),
    "iqn": NetworkConfig(hidden=(32,), head="iqn", iqn_samples=4, iqn_target_samples=4, iqn_policy_samples=4),
}


def train(rank, seeds):
    """Take updates on random minibatches with importance weights; that of seed 3 has a reward that is not finite."""
    for seed in seeds:
        batch = make_batch(seed=seed)
        batch.weight[:] = np.linspace(0.5, 0.9, len(batch.weight))
        if seed == 3:
            batch.reward[3] = np.nan
        rank.update(batch)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("settings", LEARNERS.values(), ids=LEARNERS)
def test_updates_equal_those_of_the_cpu(settings, graphs):
    """Parameters, moments, target, the mean loss and the norm of the last gradient, after 20 updates."""
    record = record_cuda_graph if graphs else None
    host, device = Rank(lr=LR, **settings), Rank(lr=LR, **settings, device=GPU, record=record)
    tolerance = {"rtol": 0.1, "atol": 5e-3} if "autocast" in settings else {"rtol": 1e-3, "atol": 1e-5}
    for rank in (host, device):
        train(rank, range(20))
        assert rank.totals.skipped_updates == 1
    for name, tensor in host.learner.state().items():
        torch.testing.assert_close(device.learner.state()[name].cpu(), tensor, **tolerance, msg=name)
    relative = 0.1 if "autocast" in settings else 1e-3
    assert device.totals.pop()["loss"] == pytest.approx(host.totals.pop()["loss"], rel=relative)
    assert device.learner.grad_norm == pytest.approx(host.learner.grad_norm, rel=relative)


@pytest.mark.parametrize("network", RANDOM.values(), ids=RANDOM)
def test_a_graph_draws_new_numbers_at_each_replay_and_resumes_from_a_checkpoint(network):
    whole = Rank(network=network, device=GPU, record=record_cuda_graph)
    train(whole, range(5))
    state = {name: tensor.clone() for name, tensor in whole.learner.state().items()}
    random_state = torch_state(GPU)
    batch, losses = make_batch(seed=5), set()
    for _ in range(3):
        losses.add(float(whole.learner.compute_gradient(batch)[0]))
    assert len(losses) == 3
    resumed = Rank(network=network, device=GPU, record=record_cuda_graph)
    ends = []
    for rank in (whole, resumed):
        rank.learner.load_state(state)
        load_torch_state(random_state, GPU)
        train(rank, range(5, 10))
        ends.append(rank.learner.parameters.clone())
    assert torch.equal(*ends)


def test_each_gpu_has_a_name_of_its_own():
    assert len(set(visible_gpus())) == torch.cuda.device_count()
    assert choose_device(Config(), LocalComm(), PhaseTimer()) == (torch.device("cuda", 0), 1)


def test_a_replay_that_does_not_fit_on_the_gpu_is_an_error():
    """It would take 700 GB for Pong."""
    flags = ["--preset", "atari", "--replay-capacity", "100_000_000", "--replay-device", "cuda"]
    with pytest.raises(UserError, match="lower --replay-capacity"):
        build_parts(parse(flags), LocalComm(), PhaseTimer())


MEMORIES = (HOST_MEMORY, PinnedMemory(), DeviceMemory(GPU))


@pytest.mark.parametrize("replay_class", CLASSES)
def test_minibatches_equal_those_of_the_host(replay_class):
    made = replays(replay_class, MEMORIES)
    for _ in range(5):
        host, pinned, device = (replay.sample(16) for replay in made)
        for field in host.__slots__:
            expected = getattr(host, field)
            np.testing.assert_array_equal(getattr(pinned, field), expected)
            np.testing.assert_array_equal(torch.as_tensor(getattr(device, field)).cpu(), expected)
        assert torch.from_numpy(pinned.reward).is_pinned()
        assert device.observation.is_cuda
        for replay in made:
            replay.update_priorities(host.row_ids, np.linspace(0.1, 2.0, 16))


def test_observations_can_be_loaded_from_the_gpu_to_the_host():
    host, pinned, device = replays(Replay, MEMORIES)
    rows = slice(0, 13)
    np.testing.assert_array_equal(device.observation[rows], host.observation[rows])
    pinned.observation[rows] = 0
    pinned.load_state(device.state())
    np.testing.assert_array_equal(pinned.observation[rows], host.observation[rows])


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("preset", ["minatar,rainbow", "atari"])
def test_updates_do_not_depend_on_the_memory_of_replay(place, preset):
    """Up to rounding, because the choice of kernels may differ."""
    flags = ["--preset", preset, "--device", "cuda", "--replay-capacity", "4000", "--learning-starts", "200"]
    learned = []
    for where in (place, "cuda"):
        parts = build_parts(parse([*flags, "--replay-device", where]), LocalComm(), PhaseTimer())
        actor, replay, learner = parts.acting.actor, parts.acting.replay, parts.learner
        replay.start(actor.start())
        for _ in range(20):
            actions = actor.choose(1.0)
            replay.add(actions, actor.step(actions))
        for _ in range(3):
            batch = replay.sample(32)
            statistics = learner.compute_gradient(batch)
            parts.strategy.launch(REPORT, statistics, float(batch.weight.max()), progress=1.0)
            assert parts.strategy.wait().updates == 1
            replay.update_priorities(batch.row_ids, learner.td_errors.cpu().numpy())
        parts.acting.envs.close()
        learned.append(learner.parameters)
        assert isinstance(replay.memory, DeviceMemory if where == "cuda" else PinnedMemory)
    torch.testing.assert_close(*learned, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("preset", ["smoke", "minatar"])
def test_recorded_actors_choose_the_same_actions_by_the_current_parameters(preset):
    flags = ["--preset", preset, "--device", "cuda", "--envs-per-rank", "16"]
    eager, recorded = (
        build_parts(parse([*flags, graphs]), LocalComm(), PhaseTimer())
        for graphs in ("--no-cuda-graphs", "--cuda-graphs")
    )
    actors = eager.acting.actor, recorded.acting.actor
    np.testing.assert_array_equal(*(actor.start() for actor in actors))
    seen = set()
    for _ in range(20):
        actions = [actor.choose(0.1) for actor in actors]
        np.testing.assert_array_equal(*actions)
        seen |= set(actions[0].tolist())
        for actor, chosen in zip(actors, actions, strict=True):
            actor.step(chosen)
        eager.learner.parameters.add_(0.1 * torch.randn_like(eager.learner.parameters))
        recorded.learner.parameters.copy_(eager.learner.parameters)
    for parts in (eager, recorded):
        parts.acting.envs.close()
    assert len(seen) > 1


@pytest.mark.parametrize(
    "flags",
    [
        "--preset smoke",
        "--preset smoke --cuda-graphs --precision bf16",
        "--preset smoke,rainbow --cuda-graphs --layer-norm",
        "--preset smoke --env ALE/Pong-v5 --frame-stack 4 --hidden 64 --cuda-graphs --head iqn",
        "--preset smoke --env ALE/Pong-v5 --frame-stack 4 --hidden 64 --replay-device cpu",
        "--preset smoke --sync parameters --cuda-graphs",
    ],
)
def test_runs_resume_bit_for_bit(flags, tmp_path):
    """From the first of three checkpoints. Atari's episodes start anew, so that only the count of updates is equal."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = [*flags.split(), "--device", "cuda", "--total-env-steps", "1500", "--checkpoint-every", "500"]

    def run(run_dir):
        assert main([*argv, "--checkpoint-keep", "9", "--eval-episodes", "1", "--run-dir", str(run_dir)]) == 0
        return json.loads((run_dir / "summary.json").read_text())

    expected = run(whole)
    shutil.copytree(whole, resumed, symlinks=True)
    (resumed / "summary.json").unlink()
    for later in ("1000", "1500", "latest", "best"):
        path = resumed / "checkpoints" / later
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    found = run(resumed)
    assert found["updates"] == expected["updates"] > 0
    if "ALE" not in flags:
        assert found["param_sha256"] == expected["param_sha256"]
