"""Checks of networks that ranks hold between them. Every check is a collective call, on real ranks or on threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdqn.comm import Comm
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config
from hvdqn.errors import NonFiniteError
from hvdqn.networks import QNetwork, make_network
from hvdqn.replay import Batch
from hvdqn.sync import RankGroup
from tests.learning_ranks import LearningRank, share, weighted_batch

GLOBAL_BATCH, ACTIONS, STEPS = 24, 4, 20
VECTOR, FRAMES = (6,), (10, 10, 4)
CLIP, RTOL = 0.02, 1e-12
_seeding = threading.Lock()  # threads share torch's generator


@dataclass(frozen=True)
class Network:
    """A network to split: the shape of its observations, and settings."""

    shape: tuple[int, ...] = VECTOR
    settings: dict[str, Any] = field(default_factory=dict)
    masked: bool = False


NETWORKS = {
    "two hidden layers": Network(settings={"hidden": (32, 20)}),
    "one hidden layer": Network(settings={"hidden": (32,)}),
    "three hidden layers": Network(settings={"hidden": (16, 12, 24), "optimizer": "rmsprop"}),
    "convolutions": Network(FRAMES, {"hidden": (32,)}),
    "dueling": Network(settings={"hidden": (32, 20), "dueling": True}),
    "dueling convolutions": Network(FRAMES, {"hidden": (32,), "dueling": True, "double": False}),
    "layer norm": Network(settings={"hidden": (32, 20), "layer_norm": True, "dueling": True}),
    "layer norm, three hidden layers": Network(FRAMES, {"hidden": (16, 12, 24), "layer_norm": True}),
    "c51": Network(settings={"hidden": (32, 20, 16), "head": "c51", "atoms": 11}),
    "hl-gauss": Network(settings={"hidden": (32, 20), "head": "hl-gauss", "atoms": 11}),
    "qr": Network(FRAMES, {"hidden": (32, 16), "head": "qr", "quantiles": 9}),
    "normalized": Network(settings={"hidden": (32, 20), "normalize_observations": True}),
    "munchausen": Network(settings={"hidden": (32,), "munchausen": True, "double": False}),
    "masked": Network(settings={"hidden": (32, 20)}, masked=True),
    "masked munchausen": Network(
        settings={"hidden": (32,), "munchausen": True, "double": False}, masked=True
    ),
    "target follows": Network(settings={"hidden": (32,), "target_tau": 0.05, "loss": "mse"}),
}


def config_of(network: Network, ranks: int) -> Config:
    """Return settings under which gradients are clipped, and ranks have the learning rate of one."""
    settings = {
        "max_grad_norm": CLIP,
        "lr": 1e-3,
        "lr_reference_batch": GLOBAL_BATCH,
        "total_env_steps": 2000,
    }
    return Config().replace(**{**settings, **network.settings}, batch_per_rank=GLOBAL_BATCH // ranks)


def make_batch(network: Network, seed: int) -> Batch:
    """Return a global minibatch, the same on every rank, with terminations and importance weights."""
    rng = np.random.default_rng(seed)
    batch = weighted_batch(GLOBAL_BATCH, network.shape, ACTIONS, rng)
    if network.masked:
        batch.action_mask, batch.next_action_mask = rng.random((2, GLOBAL_BATCH, ACTIONS)) < 0.5
        batch.action_mask[batch.row_ids, batch.action] = True
        batch.next_action_mask[batch.row_ids, rng.integers(ACTIONS, size=GLOBAL_BATCH)] = True
    return batch


def build(network: Network, group: RankGroup | None, seed: int = 5) -> QNetwork:
    """Build a network from a seed, whole or split."""
    config = config_of(network, 1)
    with _seeding:
        torch.manual_seed(seed)
        made = make_network(
            config.network,
            config.learning.loss,
            network.shape,
            1,
            is_image=network.shape == FRAMES,
            actions=ACTIONS,
            group=group,
        )
    if made.normalize is not None:
        made.normalize.observe(3 + np.random.default_rng(0).normal(size=(50, *network.shape)))
        made.normalize.merge(made.normalize.pop_sums())
    return made


def make_rank(network: Network, comm: Comm, group: RankGroup | None, dtype: torch.dtype) -> LearningRank:
    """Return a rank that learns."""
    return LearningRank(config_of(network, comm.size), comm, build(network, group).to(dtype), group=group)


def whole(rank: LearningRank, group: RankGroup | None, flat: Tensor) -> Tensor:
    """Return a flat tensor of a rank as that of the whole network."""
    return flat if group is None else group.assemble(rank.strategy.layout, flat)  # type: ignore[attr-defined]


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare to `RTOL` of the largest number: where the terms of a sum cancel, the rest has a large relative error."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= RTOL, f"{what}: {error:.1e}"


def check_same_as_whole(comm: Comm, group: RankGroup, network: Network) -> None:
    """Check loss, gradient and steps of split networks against one process with the whole network and minibatch."""
    alone = make_rank(network, LocalComm(), None, torch.float64)
    split = make_rank(network, comm, group, torch.float64)
    assert torch.equal(whole(split, group, split.learner.parameters), alone.learner.parameters)
    for step in range(STEPS):
        batch = make_batch(network, step)
        alone.update(batch)
        split.update(share(batch, comm.rank, comm.size))
        assert split.learner.grad_norm > CLIP, "clipping is not tested"
        gradient = whole(split, group, split.learner.gradient)
        assert_close(gradient, alone.learner.gradient, f"gradient of step {step}")
        learned, expected = split.totals.pop(), alone.totals.pop()
        for name in ("loss", "td_error", "q_mean"):
            assert abs(learned[name] - expected[name]) <= RTOL * max(abs(expected[name]), 1), name
        td_errors = torch.cat(comm.all_gather_object(split.learner.td_errors))
        assert_close(td_errors, alone.learner.td_errors, "TD errors")
        if step % 7 == 3:
            assert split.strategy.update_target() == alone.strategy.update_target() == []
    for name, tensor in alone.learner.state().items():
        if tensor.ndim:
            assert_close(whole(split, group, split.learner.state()[name]), tensor, name)
    assert split.strategy.differing_ranks() == []


def check_same_as_data_parallel(comm: Comm, group: RankGroup, network: Network) -> None:
    """Check N ranks in groups of M against N / M ranks with whole networks, each with the minibatches of a group."""
    groups = comm.size // group.size
    data = make_rank(network, group.peers, None, torch.float64)
    split = make_rank(network, comm, group, torch.float64)
    for step in range(STEPS):
        batch = make_batch(network, step)
        data.update(share(batch, comm.rank // group.size, groups))
        split.update(share(batch, comm.rank, comm.size))
    assert_close(whole(split, group, split.learner.parameters), data.learner.parameters, "parameters")


def check_round_trip(comm: Comm, group: RankGroup, network: Network) -> None:
    """Check that the state of a split learner loads into a whole one and back, bit for bit, and plays the same."""
    split = make_rank(network, comm, group, torch.float32)
    for step in range(3):
        split.update(share(make_batch(network, step), comm.rank, comm.size))
    saved = comm.broadcast_object(split.strategy.learner_state())
    alone = make_rank(network, LocalComm(), None, torch.float32)
    alone.strategy.load_learner_state(saved)
    again = make_rank(network, comm, group, torch.float32)
    again.strategy.load_learner_state(alone.strategy.learner_state())
    for name, tensor in split.learner.state().items():
        assert torch.equal(again.learner.state()[name], tensor), name
    assert split.strategy.param_sha256() == alone.strategy.param_sha256()
    player = split.strategy.whole_network()
    observation = torch.from_numpy(make_batch(network, 9).observation)
    assert torch.equal(player.q_values(observation), alone.learner.online.q_values(observation))
    assert player.num_parameters == alone.learner.parameters.numel() == split.learner.online.num_parameters


def check_differing(comm: Comm, group: RankGroup, network: Network) -> None:
    """Check that a flipped bit is found: where all ranks hold the number, and where only peers do."""
    rank = make_rank(network, comm, group, torch.float32)
    last, first = (
        rank.learner.parameters[-1:].view(torch.int32),
        rank.learner.parameters[:1].view(torch.int32),
    )
    for number, holders in ((last, comm.size), (first, comm.size // group.size)):
        culprit = comm.size - 1
        if holders > 1:
            if comm.rank == culprit:
                number ^= 1
            for check in (rank.strategy.differing_ranks, rank.strategy.update_target):
                assert check() == [culprit]
            if comm.rank == culprit:
                number ^= 1
    assert rank.strategy.differing_ranks() == []


def check_not_finite(comm: Comm, group: RankGroup, network: Network) -> None:
    """Check that all ranks skip an update together, and that the rank whose minibatch was at fault is named."""
    rank = make_rank(network, comm, group, torch.float32)
    before = rank.strategy.param_sha256()
    batch = share(make_batch(network, 0), comm.rank, comm.size)
    if comm.rank == 1:
        batch.reward[2] = np.nan
    rank.strategy.max_skipped_updates = 2  # type: ignore[attr-defined]
    rank.update(batch)
    assert rank.totals.skipped_updates == 1
    assert rank.strategy.param_sha256() == before
    with pytest.raises(NonFiniteError, match=r"it began on rank 1\."):
        rank.update(batch)
