"""Networks that are split over ranks, on ranks that are threads of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvdqn.config import parse
from hvdqn.errors import UserError
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import Layout, make_network
from hvdqn.networks.passes import GroupPasses, make_passes
from hvdqn.networks.sharded import ColumnLinear, RowLinear, split_first
from hvdqn.sync import RankGroup
from tests import model_parallel as checks
from tests.ranks import run_ranks


def in_groups(ranks, size, check, *arguments):
    """Call a check of `tests.model_parallel` on threads."""
    return run_ranks(ranks, lambda comm: check(comm, RankGroup(comm, size, PhaseTimer()), *arguments))


@pytest.mark.parametrize(
    ("name", "ranks", "size"),
    [*((name, 4, 2) for name in checks.NETWORKS), ("layer norm", 2, 2), ("dueling convolutions", 4, 4)],
)
def test_a_split_network_learns_as_a_whole_one(name, ranks, size):
    in_groups(ranks, size, checks.check_same_as_whole, checks.NETWORKS[name])


@pytest.mark.parametrize("name", ["three hidden layers", "dueling convolutions"])
def test_groups_are_the_ranks_of_data_parallel_training(name):
    in_groups(4, 2, checks.check_same_as_data_parallel, checks.NETWORKS[name])


@pytest.mark.parametrize("name", ["one hidden layer", "c51", "dueling convolutions"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_state_of_a_whole_network_is_saved_and_loaded(name, ranks):
    in_groups(ranks, 2, checks.check_round_trip, checks.NETWORKS[name])


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (6, 2)])
def test_a_flipped_bit_is_found_and_named(ranks, size):
    in_groups(ranks, size, checks.check_differing, checks.NETWORKS["convolutions"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_minibatch_that_is_not_finite_is_skipped_and_named(ranks):
    in_groups(ranks, 2, checks.check_not_finite, checks.NETWORKS["two hidden layers"])


def test_hand_computed_layers():
    """Two ranks: y = W2 relu(W1 x + b1) + b2, split by the rows of W1 and the columns of W2."""
    w1, b1 = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([0.5, -0.5])
    w2, b2 = torch.tensor([[2.0, 10.0]]), torch.tensor([7.0])

    def body(comm):
        group = RankGroup(comm, 2, PhaseTimer())
        first, second = nn.Linear(2, 2), nn.Linear(2, 1)
        with torch.no_grad():
            for parameter, values in zip(
                (first.weight, first.bias, second.weight, second.bias), (w1, b1, w2, b2), strict=True
            ):
                parameter.copy_(values)
        column, row = ColumnLinear(first, group), RowLinear(second, group)
        x = torch.tensor([[1.0, 1.0]], requires_grad=True)
        y = row(torch.relu(column(x)))
        y.backward()
        return y.item(), x.grad.tolist(), column.weight.grad.tolist(), row.weight.grad.tolist()

    # Hidden units 1 + 2 + 0.5 = 3.5 and 3 - 1 - 0.5 = 1.5, so that y = 2 x 3.5 + 10 x 1.5 + 7 = 29.
    # dy/dx = 2 [1, 2] + 10 [3, -1] = [32, -6].
    assert run_ranks(2, body) == [
        (29.0, [[32.0, -6.0]], [[2.0, 2.0]], [[3.5]]),
        (29.0, [[32.0, -6.0]], [[10.0, 10.0]], [[1.5]]),
    ]


def test_a_network_does_not_depend_on_the_size_of_the_group():
    network = checks.NETWORKS["dueling convolutions"]
    expected = torch.cat([p.detach().reshape(-1) for p in checks.build(network, None).parameters()])

    def body(comm):
        found = []
        for size in (1, 2, 4):
            group = RankGroup(comm, size, PhaseTimer())
            split = checks.build(network, group)
            flat = torch.cat([p.detach().reshape(-1) for p in split_first(split)])
            layout = Layout(split, group)
            found.append(group.assemble(layout, flat))
            assert torch.equal(layout.extract(found[-1]), flat)
        return found

    for found in run_ranks(4, body):
        assert all(torch.equal(flat, expected) for flat in found)


def test_which_layers_are_split():
    """Pairs of layers; the last one without a partner stays whole, and so do convolutions."""

    def kinds(name):
        def body(comm):
            split = checks.build(checks.NETWORKS[name], RankGroup(comm, 2, PhaseTimer()))
            assert isinstance(make_passes(split), GroupPasses)
            return [type(m) for m in split.modules() if isinstance(m, ColumnLinear | RowLinear | nn.Linear)]

        return run_ranks(2, body)[0]

    assert kinds("two hidden layers") == [ColumnLinear, RowLinear, nn.Linear]
    assert kinds("one hidden layer") == kinds("convolutions") == [ColumnLinear, RowLinear]
    assert kinds("three hidden layers") == [ColumnLinear, RowLinear] * 2
    assert kinds("dueling") == [ColumnLinear, RowLinear, nn.Linear, RowLinear, nn.Linear]
    assert kinds("dueling convolutions") == [ColumnLinear, RowLinear] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sync server", "--model-parallel 2 does not support --sync server"),
        ("--sync parameters", "--model-parallel 2 does not support --sync parameters"),
        ("--cuda-graphs", "does not support --cuda-graphs"),
        ("--precision bf16", "does not support --precision bf16"),
        ("--head iqn", "does not support --head iqn"),
        ("--noisy", "does not support --noisy"),
        ("--hidden 63", "--model-parallel 2 does not divide a layer of 63 units in --hidden 63"),
    ],
)
def test_what_is_not_supported_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(["--model-parallel", "2", *flags.split()])


def test_actions_of_several_dimensions_are_refused():
    config = checks.config_of(checks.NETWORKS["two hidden layers"], 2)

    def body(comm):
        group = RankGroup(comm, 2, PhaseTimer())
        with pytest.raises(
            UserError, match="--model-parallel 2 does not support actions of several dimensions"
        ):
            make_network(config.network, "huber", (6,), 1, False, actions=3, action_shape=(4,), group=group)

    run_ranks(2, body)


def test_only_layers_that_are_split_by_their_outputs_need_units_for_every_rank():
    assert parse(["--model-parallel", "2", "--hidden", "64", "63"]).parallel.model_parallel == 2
