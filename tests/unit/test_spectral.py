"""Convolutions with spectral normalization: their math, and when u and v change in a network that learns."""

from __future__ import annotations

import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import hvdqn
from hvdqn.bench.training import acting_parts
from hvdqn.clock import Clock, WorkerClock
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, parse
from hvdqn.errors import UserError
from hvdqn.export import SlicedMaxPool, export
from hvdqn.graphs import Recorded
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network, spectral_layers
from hvdqn.networks.spectral import SpectralConv2d
from hvdqn.parts import build_parts
from hvdqn.replay import Batch
from hvdqn.sync import make_strategy
from hvdqn.sync.recorded import RecordedGradients
from tests.learning_ranks import LearningRank
from tests.ranks import ThreadComm, run_ranks
from tests.unit.test_graphs import call_again

gym.register(
    "Wide-v0",
    "tests.unit.scripted_envs:Observing",
    kwargs={"observation_space": gym.spaces.Box(0, 255, (36, 44), np.uint8)},
)
IMPALA = {"torso": "impala", "spectral_norm": True, "hidden": (8,)}
seeding = threading.Lock()  # ranks are threads, and share torch's generator
FLAGS = (
    "--env tests.unit.scripted_envs:ObservesImage-v0 --preset smoke --torso impala --spectral-norm --hidden 8 "
    "--total-env-steps 120 --eval-episodes 0 --learning-starts 50 --batch-per-rank 8"
)


def layer(inputs: int = 3, outputs: int = 5, **more: int) -> SpectralConv2d:
    torch.manual_seed(7)
    return SpectralConv2d(inputs, outputs, 3, padding=1, **more).double()


def make_batch(seed: int = 0, reward: float | None = None) -> Batch:
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=8).astype(np.float32)
    if reward is not None:
        rewards[3] = reward
    return Batch(
        observation=rng.random((8, 10, 10, 2), np.float32),
        action=rng.integers(3, size=8),
        reward=rewards,
        next_observation=rng.random((8, 10, 10, 2), np.float32),
        discount=np.full(8, 0.9, np.float32),
        weight=np.ones(8, np.float32),
        row_ids=np.arange(8),
    )


def make_rank(comm: ThreadComm | LocalComm, **settings: object) -> LearningRank:
    config = Config().replace(**{"lr": 2.0**-7, "lr_scaling": "none", **IMPALA, **settings})
    with seeding:
        torch.manual_seed(3)
        network = make_network(config.network, "huber", (10, 10, 2), 1, is_image=True, actions=3)
    clock = (
        WorkerClock(8, 8, 2.0, 0) if settings.get("sync") == "server" and comm.rank else Clock(8, 8, 2.0, 0)
    )
    return LearningRank(config, comm, network, clock)


def vectors(learner: object) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in learner.buffers.values()]  # type: ignore[attr-defined]


# Math


def test_one_power_iteration_by_hand() -> None:
    """W = [[3, 0], [0, 4]], u = (0.6, 0.8): W^T u = (1.8, 3.2), and W v is parallel to (5.4, 12.8)."""
    conv = SpectralConv2d(2, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]])[..., None, None])
        conv.u.copy_(torch.tensor([0.6, 0.8]))
    conv.power_iteration()
    torch.testing.assert_close(conv.v, torch.tensor([1.8, 3.2]) / 13.48**0.5)
    torch.testing.assert_close(conv.u, torch.tensor([5.4, 12.8]) / 193.0**0.5)
    sigma = (193.0 / 13.48) ** 0.5  # |W v|
    torch.testing.assert_close(
        conv.normalized_weight()[..., 0, 0], torch.diag(torch.tensor([3.0, 4.0])) / sigma
    )


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (8, 2), (16, 16)])
def test_sigma_becomes_the_largest_singular_value(inputs: int, outputs: int) -> None:
    conv = layer(inputs, outputs)
    for _ in range(2000):
        conv.power_iteration()
    matrix = conv.weight.detach().flatten(1)
    torch.testing.assert_close(conv.u @ matrix @ conv.v, torch.linalg.matrix_norm(matrix, ord=2))
    norm = torch.linalg.matrix_norm(conv.normalized_weight().detach().flatten(1), ord=2)
    torch.testing.assert_close(norm, torch.ones_like(norm))


def test_it_begins_near_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        weight = SpectralConv2d(32, 32, 3).normalized_weight().detach()
        norm = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        assert 1 - 1e-5 < float(norm) < 1.1


def test_it_equals_spectral_norm_of_torch() -> None:
    """The output and its gradient, with the same u and v, while the weight moves."""
    conv, plain = layer(), torch.nn.Conv2d(3, 5, 3, padding=1).double()
    plain.load_state_dict({name: conv.state_dict()[name] for name in ("weight", "bias")})
    torchs = torch.nn.utils.parametrizations.spectral_norm(plain).eval()
    norm, original = torchs.parametrizations.weight[0], torchs.parametrizations.weight.original
    images = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    for _ in range(4):
        norm._u.copy_(conv.u)
        norm._v.copy_(conv.v)
        mine, theirs = conv(images), torchs(images)
        torch.testing.assert_close(mine, theirs)
        (one,) = torch.autograd.grad((mine**2).sum(), conv.weight)
        (other,) = torch.autograd.grad((theirs**2).sum(), original)
        torch.testing.assert_close(one, other)
        with torch.no_grad():
            conv.weight.sub_(one, alpha=0.01)
            original.sub_(other, alpha=0.01)
        conv.power_iteration()


def test_the_gradient_flows_through_sigma() -> None:
    """Against finite differences, and against (G - <G, W> / sigma u v^T) / sigma (Miyato et al. 2018, eq. 12)."""
    conv = layer(2, 3)
    images = torch.rand(2, 2, 3, 3, dtype=torch.float64)

    def output(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (images,))

    assert torch.autograd.gradcheck(output, (conv.weight.detach().clone().requires_grad_(),))
    given = torch.rand_like(conv.weight)
    (found,) = torch.autograd.grad(conv.normalized_weight(), conv.weight, given)
    matrix = conv.weight.detach()
    sigma = conv.u @ matrix.flatten(1) @ conv.v
    along = torch.outer(conv.u, conv.v).view_as(matrix)
    torch.testing.assert_close(found, (given - (given * matrix).sum() / sigma * along) / sigma)


def test_u_and_v_change_in_power_iterations_only() -> None:
    conv = layer()
    before = conv.u.clone(), conv.v.clone()
    conv(torch.rand(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
    with torch.inference_mode():
        conv(torch.rand(2, 3, 4, 4, dtype=torch.float64))
    conv.power_iteration(torch.zeros((), dtype=torch.float64))
    assert all(map(torch.equal, before, (conv.u, conv.v)))
    other = layer()
    conv.power_iteration()
    other.power_iteration(torch.ones((), dtype=torch.float64))
    assert torch.equal(conv.u, other.u)
    assert torch.equal(conv.v, other.v)
    assert not torch.equal(conv.u, before[0])


def test_autocast_does_not_round_sigma() -> None:
    conv = layer().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv.normalized_weight(), conv.normalized_weight().float())
        weight = conv.normalized_weight()
    assert torch.equal(weight, conv.normalized_weight())


# Learning


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_each_step_that_is_taken_brings_one_power_iteration(tau: float) -> None:
    rank = make_rank(LocalComm(), target_tau=tau)
    learner = rank.learner
    online, target = spectral_layers(learner.online), spectral_layers(learner.target)
    assert len(online) == len(target) == 12
    for seed in range(3):
        before, target_before = [each.u.clone() for each in online], [each.u.clone() for each in target]
        rank.update(make_batch(seed))
        for each, u in zip(online, before, strict=True):
            expected = torch.nn.functional.normalize(each.weight.flatten(1).T @ u, dim=0)
            assert torch.equal(each.v, expected)
        moved = [not torch.equal(each.u, u) for each, u in zip(target, target_before, strict=True)]
        assert moved == [tau < 1] * 12
    before = vectors(learner)
    rank.update(make_batch(reward=np.nan))
    assert all(map(torch.equal, before, vectors(learner)))
    learner.update_target()
    copied = [torch.equal(a.u, b.u) and torch.equal(a.v, b.v) for a, b in zip(online, target, strict=True)]
    assert copied == [tau == 1] * 12


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_a_recorded_update_brings_the_same_bits(tau: float) -> None:
    """A CUDA graph cannot ask whether a step is skipped; here a replay calls the function again."""
    eager, recorded = (make_rank(LocalComm(), target_tau=tau) for _ in range(2))
    learner = recorded.learner
    learner.differentiate = Recorded(learner.differentiate, call_again, learner.device)  # type: ignore[method-assign, assignment]
    config = Config().replace(cuda_graphs=True)
    recorded.strategy = make_strategy(config, learner, LocalComm(), PhaseTimer(), recorded.clock, call_again)
    assert isinstance(recorded.strategy, RecordedGradients)
    for seed in range(6):
        batch = make_batch(seed, np.nan if seed == 2 else None)
        for rank in (eager, recorded):
            rank.launch(batch)
            rank.wait()
        assert all(map(torch.equal, vectors(eager.learner), vectors(learner)))
        assert eager.learner.sha256() == learner.sha256()
    assert eager.totals.skipped_updates == recorded.totals.skipped_updates == 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("tau", [1.0, 0.1])
@pytest.mark.parametrize("sync", ["gradients", "parameters"])
def test_ranks_that_exchange_hold_equal_vectors(sync: str, tau: float, size: int) -> None:
    def body(comm: ThreadComm) -> tuple[str, list[torch.Tensor], list[int]]:
        rank = make_rank(comm, sync=sync, sync_every=3, target_tau=tau)
        for update in range(4):
            rank.update(make_batch(10 * comm.rank + update))
        rank.synchronize()
        differing = rank.strategy.update_target()
        assert differing is not None
        for each in spectral_layers(rank.learner.online):
            matrix = each.weight.detach().flatten(1)
            torch.testing.assert_close(torch.linalg.vector_norm(each.u), torch.ones(()))
            sigma, largest = each.u @ matrix @ each.v, torch.linalg.matrix_norm(matrix, ord=2)
            assert 0.9 * largest < sigma < 1.00001 * largest
        return rank.sha256(), vectors(rank.learner), differing

    (digest, first, _), *others = ranks = run_ranks(size, body)
    assert [differing for _, _, differing in ranks] == [[]] * size
    for other_digest, other, _ in others:
        assert other_digest == digest
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_a_worker_that_pulls_weights_follows_them(tau: float) -> None:
    """One worker that pulls at every update learns as a single process, and the server's vectors are its own."""
    alone = make_rank(LocalComm(), target_tau=tau)
    for seed in range(4):
        alone.update(make_batch(seed))

    def body(comm: ThreadComm) -> tuple[str, list[torch.Tensor]]:
        rank = make_rank(comm, sync="server", target_tau=tau)
        if comm.rank:
            for seed in range(4):
                rank.update(make_batch(seed))
        while comm.rank == 0 and rank.strategy.exchanged_updates < 4:
            rank.serve()
        rank.synchronize()
        return rank.sha256(), vectors(rank.learner)

    server, worker = run_ranks(2, body)
    assert server[0] == worker[0] == alone.sha256()
    assert all(map(torch.equal, server[1], worker[1]))
    assert all(map(torch.equal, server[1], vectors(alone.learner)))


# Runs and policies


def train_run(run_dir: Path, flags: str = "") -> Path:
    config = parse([*FLAGS.split(), *flags.split()])
    hvdqn.train(config, run_dir=run_dir)
    return run_dir


def test_a_policy_acts_with_the_vectors_of_its_run(tmp_path: Path) -> None:
    policy = hvdqn.load(train_run(tmp_path / "run"))
    policy.save(tmp_path / "policy.safetensors")
    again = hvdqn.load(tmp_path / "policy.safetensors")
    observation = policy.observation_space.sample()
    np.testing.assert_array_equal(policy.q_values(observation), again.q_values(observation))
    pairs = zip(spectral_layers(policy.network), spectral_layers(again.network), strict=True)
    assert all(torch.equal(one.u, other.u) and torch.equal(one.v, other.v) for one, other in pairs)
    config = parse([*FLAGS.split(), "--init-from", str(tmp_path / "policy.safetensors")])
    parts = build_parts(config, LocalComm(), PhaseTimer())
    acting_parts(parts).envs.close()
    pairs = zip(spectral_layers(policy.network), spectral_layers(parts.learner.target), strict=True)
    assert all(torch.equal(one.u, other.u) and torch.equal(one.v, other.v) for one, other in pairs)


def test_weights_of_another_torso_are_refused(tmp_path: Path) -> None:
    """Without its u and v, sigma would be a random number."""
    for flags, given, words in (
        ("--no-spectral-norm", "", "has no --spectral-norm, and the network has"),
        ("", "--no-spectral-norm", "and the network has nothing"),
    ):
        source = train_run(tmp_path / f"run{given}", f"{flags} --seed 2")
        for only in ("", "--init-torso-only"):
            config = parse([*FLAGS.split(), *given.split(), "--init-from", str(source), *only.split()])
            with pytest.raises(UserError, match=words):
                build_parts(config, LocalComm(), PhaseTimer())


def test_an_exported_policy_has_normalized_weights_and_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of 5 x 6 planes to 3 x 3 has windows of different sizes, which ONNX has no operation for."""
    run_dir = train_run(
        tmp_path / "run", "--env tests.unit.test_spectral:Wide-v0 --torso-pool 3 --frame-stack 2"
    )
    monkeypatch.setattr("hvdqn.export.OBSERVATIONS", 40)
    policy = hvdqn.load(run_dir)
    assert policy.network.torso.features == 3 * 3 * 32
    for name in ("policy.onnx", "policy.pt2"):
        assert "40 greedy actions are equal" in export(policy, tmp_path / name)


@pytest.mark.parametrize(("rows", "columns"), [(11, 11), (6, 6), (7, 13)])
@pytest.mark.parametrize("size", [1, 3, 6, (2, 5), (None, 4)])
def test_slices_pool_as_adaptive_pooling_does(rows: int, columns: int, size: int) -> None:
    planes = torch.randn(2, 3, rows, columns)
    assert torch.equal(SlicedMaxPool(size)(planes), torch.nn.AdaptiveMaxPool2d(size)(planes))
