"""Updates that are recorded and replayed. No GPU is needed: here a replay calls the function again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvdqn.comm.local import LocalComm
from hvdqn.config import NetworkConfig, parse
from hvdqn.errors import NonFiniteError, UserError
from hvdqn.graphs import Recorded
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.sync.recorded import RecordedGradients
from tests.unit.test_learner import make_batch, weighted
from tests.unit.test_sync_gradients import Rank, make_ranks


def call_again(function):
    """Record a function as a CUDA graph is recorded: call it a few times first; a replay overwrites the results."""
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
    "munchausen hl-gauss": {
        "network": NetworkConfig(hidden=(32,), head="hl-gauss", atoms=11),
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
LR = 2.0**-10  # exact in float32, in which a graph gets it


@pytest.mark.parametrize("settings", LEARNERS.values(), ids=LEARNERS)
def test_recorded_updates_equal_other_updates(settings):
    """The state of a checkpoint, TD errors and statistics, bit for bit over 100 updates; two of them are skipped."""
    eager, recorded = (Rank(lr=LR, **settings, record=record, autograd=True) for record in (None, call_again))
    assert isinstance(recorded.learner.differentiate, Recorded)
    assert isinstance(recorded.strategy, RecordedGradients)
    assert isinstance(recorded.strategy.step, Recorded)
    assert not isinstance(eager.strategy, RecordedGradients)
    for seed in range(100):
        errors = []
        batch = make_batch(seed=seed)
        batch.weight[:] = np.linspace(0.5, 0.9, len(batch.weight))
        if seed in (3, 7):
            batch.reward[3] = np.nan
        for rank in (eager, recorded):
            rank.update(batch)
            errors.append(rank.learner.td_errors.numpy().copy())
        np.testing.assert_array_equal(*errors)
        assert eager.learner.grad_norm == recorded.learner.grad_norm
        assert eager.learner.lr == recorded.learner.lr
    assert eager.totals.skipped_updates == recorded.totals.skipped_updates == 2
    for name, tensor in eager.learner.state().items():
        assert torch.equal(tensor, recorded.learner.state()[name]), name
    values = eager.totals.pop()
    assert np.isfinite(list(values.values())).all()
    assert values == recorded.totals.pop()


def test_too_many_recorded_updates_that_are_not_finite_end_the_run():
    rank = Rank(record=call_again, max_skipped_updates=2, autograd=True)
    batch = make_batch()
    batch.reward[3] = np.nan
    rank.update(batch)
    with pytest.raises(NonFiniteError, match=r"2 updates in a row .* rank 0"):
        rank.update(batch)


def test_a_rank_without_a_minibatch_is_left_out_of_recorded_updates():
    batches = (make_batch(), None, weighted(make_batch(seed=1), 7.0))
    states, values = [], []
    for record in (None, call_again):
        ranks = make_ranks(3, lr=LR, record=record, autograd=True)
        for _ in range(2):
            for rank, batch in zip(ranks, batches, strict=True):
                rank.launch(batch)
            for rank in ranks:
                assert rank.wait().updates == 1
        states.append(ranks[0].learner.state())
        values.append(ranks[0].totals.pop())
        assert len({rank.learner.sha256() for rank in ranks}) == 1
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert values[0] == values[1]


def test_inputs_are_copied_to_where_they_were_recorded():
    """The function always gets the tensors of its first call, and its results stay in the same memory."""
    seen = []

    def double(x):
        seen.append(x.data_ptr())
        return (2 * x,)

    function = Recorded(double, call_again, torch.device("cpu"))
    given = [torch.full((3,), float(i)) for i in range(3)]
    results = [function(x) for x in given]
    assert len(set(seen)) == 1
    assert seen[0] not in [x.data_ptr() for x in given]
    assert all(result[0] is results[0][0] for result in results)
    assert results[0][0].tolist() == [4.0, 4.0, 4.0]
    assert [x.tolist() for x in given] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


def test_graphs_without_a_gpu_are_an_error():
    with pytest.raises(UserError, match="--cuda-graphs needs a GPU"):
        build_parts(
            parse(["--preset", "smoke", "--device", "cpu", "--cuda-graphs"]), LocalComm(), PhaseTimer()
        )
