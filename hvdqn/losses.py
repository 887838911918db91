"""The equations of DQN as pure tensor functions, each with its paper.

Shapes: `q: [batch, actions]`, `action: [batch]` int64, `reward, discount: [batch]`. `discount` is gamma^k times
0 after a termination, 1 otherwise, where k is the number of rewards summed in `reward`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def select(values: Tensor, action: Tensor) -> Tensor:
    """The entry of each row's action: `[batch, actions, ...]` and `[batch]` give `[batch, ...]`."""
    assert values.shape[0] == action.shape[0]
    return values[torch.arange(len(action), device=action.device), action]


def q_learning_target(reward: Tensor, discount: Tensor, next_q: Tensor, next_action: Tensor) -> Tensor:
    """One-step or n-step backup, `[batch]`.

        y = r + discount * Q_target(s', a')

    With a' = argmax Q_target it is DQN (Mnih et al. 2015, eq. 2); with a' = argmax Q_online it is Double DQN
    (van Hasselt et al. 2016, eq. 4). `discount` is 0 after a termination, never after a truncation.
    """
    assert reward.shape == discount.shape == next_action.shape
    return reward + discount * select(next_q, next_action)


def mse_loss(td_error: Tensor) -> Tensor:
    """Squared error per sample, `[batch]`: 1/2 d^2, so that its slope is d as Huber's is near 0."""
    return 0.5 * td_error.square()


def huber_loss(td_error: Tensor, delta: float = 1.0) -> Tensor:
    """Huber's loss per sample, `[batch]` (Huber 1964; the "clipped error" of Mnih et al. 2015, Methods).

        1/2 d^2            for |d| <= delta
        delta (|d| - delta / 2)   beyond

    The loss is clipped in slope, not the error in value: a clipped error has no gradient outside the clip.
    """
    return functional.huber_loss(td_error, torch.zeros_like(td_error), reduction="none", delta=delta)
