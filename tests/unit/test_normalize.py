"""Observations normalized by running statistics: against numbers by hand, naive statistics, and without a stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import hvdqn
from hvdqn.checkpoint import read_part
from hvdqn.comm import Comm
from hvdqn.comm.local import LocalComm
from hvdqn.config import NetworkConfig, parse
from hvdqn.errors import UserError
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import Normalize, QNetwork, make_network
from hvdqn.networks.dense import DenseNetwork
from hvdqn.parts import build_parts
from hvdqn.startup import make_trainer, start_run
from hvdqn.sync.statistics import REPORTED, Trailer
from hvdqn.trainer import Trainer
from tests.ranks import run_ranks
from tests.unit.test_dense_update import by_autograd
from tests.unit.test_learner import make_batch

STATISTICS = ("normalize.count", "normalize.mean", "normalize.variance")
FLAGS = "--preset smoke --vectorization sync --hidden 8 --checkpoint-every 0 --normalize-observations"


def merged(normalize: Normalize, *batches: Any) -> Normalize:
    """Let a layer observe each batch, and exchange after each."""
    for rows in batches:
        normalize.observe(np.array(rows, np.float32))
        normalize.merge(normalize.pop_sums())
    return normalize


def test_statistics_and_outputs_by_hand() -> None:
    """Of 1, 3, then 5: means 2, 3 and variances 1, 8/3. The second feature is constant."""
    normalize = merged(Normalize(2), [[1, 7], [3, 7]])
    assert (normalize.count.item(), normalize.mean.tolist(), normalize.variance.tolist()) == (
        2,
        [2, 7],
        [1, 0],
    )
    merged(normalize, [[5, 7]])
    assert normalize.count.item() == 3
    assert normalize.mean.tolist() == pytest.approx([3, 7])
    assert normalize.variance.tolist() == pytest.approx([8 / 3, 0])
    found = normalize(torch.tensor([[3.0, 7.0], [5.0, 8.0], [-100.0, 7.0]]))
    assert found[0].tolist() == [0, 0]
    assert found[1].tolist() == pytest.approx([2 / np.sqrt(8 / 3), 10])
    assert found[2].tolist() == [-10, 0]


def test_nothing_changes_before_the_first_observation() -> None:
    observation = torch.randn(5, 3)
    normalize = merged(Normalize(3), np.empty((0, 3)))
    torch.testing.assert_close(normalize(observation), observation)


def test_observations_that_are_not_finite_do_not_count() -> None:
    normalize = merged(Normalize(2), [[1, 2], [np.nan, 0], [0, np.inf], [3, 4]])
    assert (normalize.count.item(), normalize.mean.tolist()) == (2, [2, 3])
    normalize.merge(np.array([1, np.inf, 0, np.inf, 0]))  # sums that overflow
    assert normalize.count.item() == 2


def test_bytes_are_scaled_as_in_the_network() -> None:
    normalize = Normalize(2)
    normalize.observe(np.array([[0, 51], [255, 51]], np.uint8))
    normalize.merge(normalize.pop_sums())
    assert normalize.mean.tolist() == pytest.approx([0.5, 0.2])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_sums_in_the_trailers_of_three_ranks_give_the_statistics_of_all_observations(offset: float) -> None:
    """The trailer is in float32. The statistics of the ranks have the same bits."""
    rng = np.random.default_rng(0)
    ranks = [Normalize(4) for _ in range(3)]
    length = Trailer.length(3, 2, ranks[0])
    tensors = [torch.zeros(length) for _ in ranks]
    trailers = [
        Trailer(tensor, rank, 3, 2, normalize)
        for rank, (tensor, normalize) in enumerate(zip(tensors, ranks, strict=True))
    ]
    everything = []
    for exchange in range(200):
        for rank, (normalize, trailer) in enumerate(zip(ranks, trailers, strict=True)):
            for _ in range(rank):  # rank 0 has none
                rows = offset + rng.normal(exchange / 100, [0.01, 1, 2, 50], size=(4, 4))
                normalize.observe(rows.astype(np.float32))
                everything.append(rows.astype(np.float32))
            trailer.pack([0.0, 1.0], (float(rank), 2.0))
        total = torch.stack(tensors).sum(dim=0)
        for tensor, trailer in zip(tensors, trailers, strict=True):
            tensor.copy_(total)
            received = trailer.unpack()
            assert received.slots == [[0, 1, 2], [2, 2, 2]]
            assert received.statistics[1] == 3
    rows = np.concatenate(everything).astype(np.float64)
    assert ranks[0].count.item() == len(rows)
    np.testing.assert_allclose(ranks[0].mean, rows.mean(axis=0), rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": 1e-5} if offset == 0 else {"rtol": 0.02}  # the first exchange has no mean yet
    np.testing.assert_allclose(ranks[0].variance[1:], rows.var(axis=0)[1:], **tolerance)
    for other in ranks[1:]:
        assert all(torch.equal(getattr(other, name), getattr(ranks[0], name)) for name in other._buffers)


def start(run_dir: Path, comm: Comm, flags: str = "") -> Trainer:
    run_dir.mkdir(exist_ok=True)
    config = parse([*FLAGS.split(), *flags.split(), "--run-dir", str(run_dir)])
    stop: Any = SimpleNamespace(requested=False)
    return start_run(config, comm, run_dir, stop, PhaseTimer(), make_trainer)


def layer(trainer: Trainer) -> Normalize:
    found = trainer.learner.online.normalize
    assert found is not None
    return found


@pytest.mark.parametrize(
    "flags", ["", "--sync parameters --sync-every 20", "--frame-stack 3", "--envs-per-rank 1"]
)
def test_two_ranks_have_the_statistics_of_all_their_observations(flags: str, tmp_path: Path) -> None:
    """Those that environments of both returned: at a reset, and after every step."""

    def body(comm: Comm) -> tuple[Any, ...]:
        trainer = start(tmp_path, comm, flags)
        rows = [trainer.acting.actor.frames.frames[:, -1].copy()]
        receive = trainer.acting.actor.receive

        def watched() -> Any:
            step = receive()
            rows.append(step.next_observation[step.valid].copy())
            rows.append(step.observation[step.fresh].copy())
            return step

        trainer.acting.actor.receive = watched  # type: ignore[method-assign]
        trainer.train(until_env_steps=2_000)
        normalize = layer(trainer)
        return np.concatenate(rows), normalize.state(), [t.numpy() for t in normalize.buffers()]

    (rows, pending, found), (other_rows, other_pending, others) = run_ranks(2, body)
    for mine, its in zip(found, others, strict=True):
        np.testing.assert_array_equal(mine, its)
    exchanged = [r[: len(r) - len(p)] for r, p in ((rows, pending), (other_rows, other_pending))]
    everything = np.concatenate(exchanged).astype(np.float64)
    assert len(everything) > 1_500
    assert found[0] == len(everything)
    np.testing.assert_allclose(found[1], everything.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], everything.var(axis=0), rtol=1e-4)


def test_a_run_that_stops_between_two_exchanges_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags, ends = "--learning-starts 100 --envs-per-rank 2 --replay-ratio 1", (606, 1_400)
    whole = start(tmp_path / "whole", LocalComm(), flags)
    whole.train(until_env_steps=ends[1])
    stopped = start(tmp_path / "parts", LocalComm(), flags)
    stopped.train(until_env_steps=ends[0])
    assert len(layer(stopped).state()) > 0  # observed, and in no statistics yet
    stopped.recorder.save()
    resumed = start(tmp_path / "parts", LocalComm(), flags)
    resumed.train(until_env_steps=ends[1])
    for name, buffer in whole.learner.buffers.items():
        assert torch.equal(resumed.learner.buffers[name], buffer), name
    assert resumed.learner.sha256() == whole.learner.sha256()
    assert torch.equal(resumed.learner.target_parameters, whole.learner.target_parameters)


def test_statistics_survive_another_number_of_ranks(tmp_path: Path) -> None:
    def first(comm: Comm) -> list[float]:
        trainer = start(tmp_path, comm)
        trainer.train(until_env_steps=1_000)
        trainer.recorder.save()
        return layer(trainer).mean.tolist()

    def again(comm: Comm) -> list[float]:
        return layer(start(tmp_path, comm)).mean.tolist()

    assert run_ranks(2, first)[0] == again(LocalComm()) == run_ranks(3, again)[2]


def test_evaluation_changes_no_statistics(tmp_path: Path) -> None:
    trainer = start(tmp_path, LocalComm(), "--eval-episodes 3")
    trainer.train(until_env_steps=400)
    before, pending = [b.clone() for b in layer(trainer).buffers()], layer(trainer).state()
    trainer.evaluate()
    assert trainer.recorder.returns
    assert all(map(torch.equal, before, layer(trainer).buffers()))
    np.testing.assert_array_equal(layer(trainer).state(), pending)


def test_policies_and_new_runs_take_the_statistics(tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "preset": "smoke",
        "hidden": (8,),
        "eval_episodes": 0,
        "normalize_observations": True,
    }
    result = hvdqn.train(run_dir=tmp_path / "run", total_env_steps=600, **run)
    saved = read_part(result.checkpoint / "policy.safetensors")
    count, mean, variance = (saved[name] for name in STATISTICS)
    assert count >= 600
    policy, observation = result.policy(), np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
    plain = QNetwork(policy.network.torso, policy.network.head)
    scaled = torch.from_numpy((observation - mean) / np.sqrt(variance + 1e-8)).float()
    np.testing.assert_allclose(policy.q_values(observation), plain.q_values(scaled).detach(), rtol=1e-5)
    policy.save(tmp_path / "again.safetensors")
    again = hvdqn.load(tmp_path / "again.safetensors")
    np.testing.assert_array_equal(again.q_values(observation), policy.q_values(observation))
    for only in (False, True):
        flags = "--preset smoke --hidden 8 --normalize-observations --init-from"
        other = "--init-torso-only --head qr --quantiles 5" if only else ""
        more = parse([*flags.split(), str(tmp_path / "run"), *other.split()])
        parts = build_parts(more, LocalComm(), PhaseTimer())
        np.testing.assert_array_equal(parts.learner.buffers["online.normalize.mean"], mean)
    with pytest.raises(UserError, match=r"has \[\] as normalize.count, and the network has nothing"):
        hvdqn.train(run_dir=tmp_path / "plain", preset="smoke", hidden=(8,), init_from=str(tmp_path / "run"))


def make_learner(double: bool) -> Learner:
    torch.manual_seed(2)
    config = NetworkConfig(hidden=(16, 8), dueling=True, normalize_observations=True)
    network = make_network(config, "huber", (4,), 1, is_image=False, actions=3)
    assert network.normalize is not None
    merged(network.normalize, 3 + 5 * np.random.default_rng(1).normal(size=(50, 4)))
    learning = parse(["--double" if double else "--no-double"]).learning
    learner = Learner(network, learning, torch.device("cpu"), 1.0)
    learner.parameters.add_(0.1 * torch.randn(len(learner.parameters)))
    return learner


@pytest.mark.parametrize("double", [False, True])
def test_passes_by_hand_equal_those_of_autograd(double: bool) -> None:
    by_hand, reference = make_learner(double), by_autograd(make_learner(double))
    batch = make_batch()
    statistics = [learner.compute_gradient(batch) for learner in (by_hand, reference)]
    torch.testing.assert_close(*statistics)
    torch.testing.assert_close(by_hand.gradient, reference.gradient)
    dense = DenseNetwork.of(by_hand.online)
    assert dense is not None
    observation = torch.from_numpy(batch.observation)
    torch.testing.assert_close(dense.q_values(observation), by_hand.online.q_values(observation))


def test_the_target_network_uses_the_same_statistics() -> None:
    learner = make_learner(double=True)
    assert learner.target.normalize is learner.online.normalize
    assert list(learner.buffers) == [f"online.{name}" for name in STATISTICS]


class Codes(gym.Env):  # type: ignore[type-arg]
    observation_space = gym.spaces.Discrete(5)
    action_space = gym.spaces.Discrete(2)


gym.register("Codes-v0", Codes)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env tests.unit.scripted_envs:ObservesImage-v0", "is for vectors of numbers"),
        ("--env tests.unit.test_normalize:Codes-v0", "is for vectors of numbers"),
        ("--sync server", "does not support --sync server"),
    ],
)
def test_what_cannot_be_normalized_is_refused(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        build_parts(parse([*flags.split(), "--normalize-observations"]), LocalComm(), PhaseTimer())
    assert "\n" not in str(refused.value)


def test_a_trailer_without_normalization_is_as_before() -> None:
    assert Trailer.length(3, 2) == len(REPORTED) + 3 + 1 + 6
