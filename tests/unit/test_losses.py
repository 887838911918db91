"""Each equation against numbers worked out by hand and against a loop."""

from __future__ import annotations

import pytest
import torch

from hvdqn.losses import huber_loss, mse_loss, q_learning_target, select


def test_select_takes_each_rows_action():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert select(values, torch.tensor([1, 0, 1])).tolist() == [2.0, 3.0, 6.0]


def test_target_by_hand():
    """r + discount Q(s', a'): 1 + 0.9 x 3; a termination has discount 0 and keeps the reward alone."""
    target = q_learning_target(
        reward=torch.tensor([1.0, -2.0]),
        discount=torch.tensor([0.9, 0.0]),
        next_q=torch.tensor([[5.0, 3.0], [7.0, 8.0]]),
        next_action=torch.tensor([1, 0]),
    )
    assert target.tolist() == pytest.approx([3.7, -2.0])


@pytest.mark.parametrize(
    ("td_error", "mse", "huber"),
    [(0.0, 0.0, 0.0), (0.5, 0.125, 0.125), (-1.0, 0.5, 0.5), (3.0, 4.5, 2.5), (-4.0, 8.0, 3.5)],
)
def test_mse_and_huber_by_hand(td_error, mse, huber):
    d = torch.tensor([td_error])
    assert mse_loss(d).item() == pytest.approx(mse)
    assert huber_loss(d).item() == pytest.approx(huber)


def test_huber_agrees_with_a_loop():
    d = torch.linspace(-5, 5, 101, dtype=torch.float64)
    loop = [0.5 * x * x if abs(x) <= 2.0 else 2.0 * (abs(x) - 1.0) for x in d.tolist()]
    torch.testing.assert_close(huber_loss(d, delta=2.0), torch.tensor(loop, dtype=torch.float64))


def test_huber_clips_the_slope_and_never_kills_it():
    """Clipping the error itself, a known bug, would leave no gradient beyond 1."""
    d = torch.tensor([0.3, 10.0, -10.0], requires_grad=True)
    huber_loss(d).sum().backward()
    assert d.grad is not None
    assert d.grad.tolist() == pytest.approx([0.3, 1.0, -1.0])


def test_one_action():
    target = q_learning_target(
        torch.ones(2), torch.ones(2), torch.tensor([[2.0], [3.0]]), torch.zeros(2, dtype=torch.int64)
    )
    assert target.tolist() == [3.0, 4.0]
