"""A learner whose passes are recorded and replayed. No GPU is needed: here replaying is to call again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvdqn.comm.local import LocalComm
from hvdqn.config import NetworkConfig, parse
from hvdqn.errors import UserError
from hvdqn.graphs import Replayed
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from tests.unit.test_learner import REPORT, make_batch, make_learner, make_ranks, weighted


def call_again(function):
    """As a graph is: warmed up, recorded, and from then on only results are overwritten."""
    for _ in range(3):
        results = function()

    def replay():
        found = function()
        with torch.inference_mode():
            for mine, new in zip(results, found, strict=True):
                mine.copy_(new)

    return results, replay


LEARNERS = {
    "by hand": {},
    "layer norm": {"network": NetworkConfig(hidden=(32,), layer_norm=True)},
    "c51": {"network": NetworkConfig(hidden=(32,), head="c51", dueling=True)},
    "munchausen qr": {
        "network": NetworkConfig(hidden=(32,), head="qr", quantiles=5),
        "munchausen": True,
        "double": False,
    },
    "bf16": {"autocast": True},
    "a target that follows": {"target_tau": 0.1},
    "clipped": {"max_grad_norm": 0.01},
    "never clipped": {"max_grad_norm": 0.0},
    "rmsprop": {"optimizer": "rmsprop"},
    "sgd": {"optimizer": "sgd"},
}
LR = 2.0**-10  # a graph is given it in float32


@pytest.mark.parametrize("settings", LEARNERS.values(), ids=LEARNERS)
def test_replayed_updates_are_the_same_updates(settings):
    """All that a checkpoint keeps, TD errors and what is reported, bit for bit over 100 updates, of which some are not
    finite."""
    eager, replayed = (make_learner(lr=LR, **settings, record=record) for record in (None, call_again))
    assert isinstance(replayed.differentiate, Replayed)
    assert isinstance(replayed.step_recorded, Replayed)
    for seed in range(100):
        errors = []
        batch = make_batch(seed=seed)
        batch.weight[:] = np.linspace(0.5, 0.9, len(batch.weight))
        if seed in (3, 7):
            batch.reward[3] = np.nan
        for learner in (eager, replayed):
            learner.begin_update(batch, REPORT)
            errors.append(learner.finish_update()[1].copy())
        np.testing.assert_array_equal(*errors)
        assert eager.grad_norm == replayed.grad_norm
    assert eager.skipped_updates == replayed.skipped_updates == 2
    for name, tensor in eager.state().items():
        assert torch.equal(tensor, replayed.state()[name]), name
    assert eager.drain() == replayed.drain()


def test_a_rank_without_a_minibatch_is_left_out_of_replayed_updates():
    batches = (make_batch(), None, weighted(make_batch(seed=1), 7.0))
    states = []
    for record in (None, call_again):
        ranks = make_ranks(3, lr=LR, record=record)
        for _ in range(2):
            for learner, batch in zip(ranks, batches, strict=True):
                learner.begin_update(batch, REPORT)
            for learner in ranks:
                learner.finish_update()
        states.append(ranks[0].state())
        assert len({learner.sha256() for learner in ranks}) == 1
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_inputs_are_copied_where_they_were_recorded():
    """The function never sees another tensor than those of the first call, and its results stay in one place."""
    seen = []

    def double(x):
        seen.append(x.data_ptr())
        return (2 * x,)

    function = Replayed(double, call_again, torch.device("cpu"))
    given = [torch.full((3,), float(i)) for i in range(3)]
    results = [function(x) for x in given]
    assert len(set(seen)) == 1
    assert seen[0] not in [x.data_ptr() for x in given]
    assert all(result[0] is results[0][0] for result in results)
    assert results[0][0].tolist() == [4.0, 4.0, 4.0]
    assert [x.tolist() for x in given] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


def test_without_a_gpu_graphs_are_refused():
    with pytest.raises(UserError, match="--cuda-graphs needs a GPU"):
        build_parts(
            parse(["--preset", "smoke", "--device", "cpu", "--cuda-graphs"]), LocalComm(), PhaseTimer()
        )
