"""The equations of the DQN family as pure tensor functions, each with its paper.

Shapes: `q: [batch, actions]`, `action: [batch]` int64, `reward, discount: [batch]`. `discount` is gamma^k times
0 after a termination, 1 otherwise, where k is the number of rewards summed in `reward`.

Where an action has several dimensions, `action` is `[batch, dimensions]`, `q` is `[batch, dimensions, actions]`, and
the value of an action is the mean over its dimensions (Tavakoli et al. 2018, Seyde et al. 2023).

To add a loss of the scalar TD error, write it and its derivative here and add both to `TD_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def select(values: Tensor, action: Tensor) -> Tensor:
    """Return, for each row of `values` `[batch, actions, ...]`, the entry of its action `[batch]`: `[batch, ...]`.

    With actions `[batch, dimensions]`, values are `[batch, dimensions * actions, ...]`, and the mean of the dimensions'
    entries is returned.
    """
    assert values.shape[0] == action.shape[0]
    if action.ndim == 2:
        return select_each(values, action).mean(dim=1)
    index = action.view(-1, *[1] * (values.ndim - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def select_each(values: Tensor, action: Tensor) -> Tensor:
    """Return what `select` averages over the dimensions of actions, `[batch, dimensions, ...]`."""
    each = select(values.reshape(action.numel(), -1, *values.shape[2:]), action.flatten())
    return each.view(*action.shape, *values.shape[2:])


def mask_q(q: Tensor, mask: Tensor | None) -> Tensor:
    """Return the Q-values with -inf for illegal actions; q itself without a mask. Both `[batch, actions]`."""
    return q if mask is None else q.masked_fill(~mask, -math.inf)


def expectation(values: Tensor, policy: Tensor) -> Tensor:
    """Return the mean of `values` `[batch, actions, ...]` under the probabilities `policy` `[batch, actions]`.

    The result is `[batch, ...]`. With a policy `[batch, dimensions, actions]`, values are as in `select`, and the
    dimensions are averaged.
    """
    if policy.ndim == 3:
        policy = policy.flatten(1) / policy.shape[1]
    assert values.shape[:2] == policy.shape
    return torch.einsum("ba...,ba->b...", values, policy)


def q_learning_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """Return the one-step or n-step Q-learning target, `[batch]`.

        y = r + discount * Q_target(s', a')

    With a' = argmax Q_target it is DQN (Mnih et al. 2015, eq. 2); with a' = argmax Q_online it is Double DQN
    (van Hasselt et al. 2016, eq. 4). `discount` is 0 after a termination, never after a truncation. `next_value` may
    also be quantiles `[batch, quantiles]`, with `reward, discount: [batch, 1]`; each then gets its own target.
    """
    assert reward.shape == discount.shape
    assert reward.ndim == next_value.ndim
    return reward + discount * next_value


def lambda_returns(reward: Tensor, discount: Tensor, next_value: Tensor, trace: Tensor) -> Tensor:
    """Return the lambda-return of every step of a rollout, by recursion from the last one; all `[steps, envs]`.

        G_t = r_t + discount_t ((1 - lambda_t) V(s_{t+1}) + lambda_t G_{t+1})

    It is the return of Peng's Q(lambda) (Peng and Williams 1996), as PQN uses it (Gallici et al. 2025).

    Args:
        reward: r.
        discount: gamma, or 0 after a termination.
        next_value: V(s_{t+1}), the largest Q-value of the next observation.
        trace: lambda_t: lambda, or 0 where row t + 1 does not continue the episode, as after a truncation; the last
            row's is not used.
    """
    assert reward.shape == discount.shape == next_value.shape == trace.shape
    returns = torch.empty_like(reward)
    following = next_value[-1]
    for t in range(len(reward) - 1, -1, -1):
        following = reward[t] + discount[t] * torch.lerp(next_value[t], following, trace[t])
        returns[t] = following
    return returns


def mse_loss(td_error: Tensor) -> Tensor:
    """Return half the square of each TD error, `[...]`: 1/2 d^2, so that its derivative is d, as Huber's near 0."""
    return 0.5 * td_error.square()


def mse_derivative(td_error: Tensor) -> Tensor:
    """Return the derivative of `mse_loss` with respect to the TD error, which is the error itself, `[...]`."""
    return td_error.clone()


def huber_loss(td_error: Tensor, delta: float = 1.0) -> Tensor:
    """Return Huber's loss of each TD error, `[...]` (Huber 1964; the "clipped error" of Mnih et al. 2015, Methods).

        1/2 d^2                   for |d| <= delta
        delta (|d| - delta / 2)   beyond

    The derivative is clipped, not the error: a clipped error would have no gradient outside the clip.
    """
    return functional.huber_loss(td_error, torch.zeros_like(td_error), reduction="none", delta=delta)


def huber_derivative(td_error: Tensor, delta: float = 1.0) -> Tensor:
    """Return the derivative of `huber_loss` with respect to the TD error: d clipped to [-delta, delta], `[...]`."""
    return td_error.clamp(-delta, delta)


class TDLoss(NamedTuple):
    """A loss as a function of the TD error, and its derivative; both map `[...]` to `[...]`."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


TD_LOSSES = {
    "huber": TDLoss(huber_loss, huber_derivative),
    "mse": TDLoss(mse_loss, mse_derivative),
}


def categorical_projection(
    probabilities: Tensor, support: Tensor, reward: Tensor, discount: Tensor
) -> Tensor:
    """Return the target distribution projected onto the atoms, `[batch, atoms]` (Bellemare et al. 2017, eq. 7).

        (Phi T p)_i = sum_j [1 - |clip(r + discount z_j) - z_i| / dz]_0^1 p_j,   clipped to [v_min, v_max]

    Args:
        probabilities: p, the distribution of the action chosen in the next state `[batch, atoms]`.
        support: z, the returns of the atoms, evenly spaced from v_min to v_max `[atoms]`.
        reward: r `[batch]`.
        discount: 0 after a termination `[batch]`.
    """
    assert probabilities.shape == (len(reward), len(support))
    backed_up = q_learning_target(reward[:, None], discount[:, None], support[None, :])
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    place = ((backed_up - support[0]) / spacing).clamp(0, len(support) - 1)
    index = torch.arange(len(support), device=support.device, dtype=support.dtype)
    # A dense product [batch, from, to] rather than a scatter: on a GPU a scatter adds in no fixed order, so that two
    # equal runs would differ.
    minus_share = (place[:, :, None] - index).abs_().sub_(1).clamp_(max=0)
    return torch.bmm(probabilities[:, None], minus_share)[:, 0].neg_()


def gaussian_histogram(mean: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Return the probability of each bin under a Gaussian around each mean, `[batch, bins]` (Imani and White 2018).

        p_i = (Phi(e_{i+1}) - Phi(e_i)) / (Phi(e_bins) - Phi(e_0)),   Phi(e) = CDF of N(mean, sigma) at e

    It is the Gaussian truncated to the bins, as in Farebrother et al. 2024 ("Stop Regressing"), section 3.1. A mean
    outside of the bins is moved to their first or last edge, as C51 clips returns.

    Args:
        mean: y `[batch]`.
        edges: e, the edges of the bins, ascending `[bins + 1]`.
        sigma: standard deviation of the Gaussian, in units of return.
    """
    inside = mean.clamp(edges[0], edges[-1])
    cdf: Tensor = torch.special.ndtr((edges - inside[:, None]) / sigma)
    return cdf.diff(dim=1) / (cdf[:, -1:] - cdf[:, :1])


def categorical_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the KL divergence of the predicted from the target distribution, `[...]` (Bellemare et al. 2017).

        D_KL(target || softmax(logits)) = sum_i target_i (log target_i - log softmax(logits)_i)

    It has the same gradient as the cross-entropy. Unlike that, it is 0 where the two distributions agree, so that
    prioritized replay can use it as a priority (Hessel et al. 2018).

    Args:
        logits: the predicted distribution, before the softmax `[..., atoms]`.
        target: the probabilities of the target distribution `[..., atoms]`.
    """
    assert logits.shape == target.shape
    return functional.kl_div(functional.log_softmax(logits, dim=-1), target, reduction="none").sum(dim=-1)


def pairwise_td_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the TD error of each predicted quantile against each target quantile (Dabney et al. 2018b, eq. 2).

        d_ij = target_j - prediction_i

    Args:
        prediction: the predicted quantiles `[batch, predicted]`.
        target: the target quantiles `[batch, targets]`.

    Returns:
        The TD errors `[batch, predicted, targets]`.
    """
    assert len(prediction) == len(target)
    return target[:, None, :] - prediction[:, :, None]


def quantile_huber_loss(td_error: Tensor, fraction: Tensor, kappa: float = 1.0) -> Tensor:
    """Return the quantile regression loss with Huber's loss in place of the absolute value, `[batch]`.

        sum_i mean_j |fraction_i - 1{d_ij < 0}| Huber_kappa(d_ij) / kappa

    It is eq. 10 of Dabney et al. 2018a for fixed fractions (QR-DQN), and eq. 3 of Dabney et al. 2018b for random ones
    (IQN).

    Args:
        td_error: d, from `pairwise_td_error` `[batch, predicted, targets]`.
        fraction: the probability of each predicted quantile, in (0, 1): `[batch, predicted]` or `[predicted]`.
        kappa: the absolute error at which Huber's loss turns from quadratic to linear.
    """
    assert fraction.shape[-1] == td_error.shape[1]
    below = (td_error.detach() < 0).to(td_error.dtype)
    weight = (fraction[..., None] - below).abs()
    return (weight * huber_loss(td_error, kappa) / kappa).mean(dim=2).sum(dim=1)


def scaled_log_policy(q: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of the softmax policy times its temperature, shaped as q, all <= 0.

    tau log pi(a|s),   pi = softmax(q / tau)       (Vieillard et al. 2020, section 2)
    """
    return temperature * functional.log_softmax(q / temperature, dim=-1)


def munchausen_bonus(q: Tensor, action: Tensor, alpha: float, temperature: float, clip: float) -> Tensor:
    """Return the bonus that Munchausen DQN adds to the reward, `[batch]` (Vieillard et al. 2020, eq. 1).

        alpha [tau log pi(a|s)]_clip^0,   tau = temperature

    `q` `[batch, actions]` are the target network's Q-values for the state in which `action` `[batch]` was taken. The
    scaled log-policy has no lower bound, so it is clipped to [`clip`, 0] (the paper's "numerical considerations").
    """
    return alpha * select(scaled_log_policy(q, temperature).flatten(1), action).clamp(clip, 0.0)


def soft_policy(q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the softmax policy, shaped as q, and its entropy times the temperature `[batch]`.

        pi = softmax(q / tau),   -tau sum_a pi(a|s') log pi(a|s')

    Munchausen DQN adds the scaled entropy to the expected value of the next state (Vieillard et al. 2020, eq. 1).

    With D dimensions, Q is their mean, so that the policy is a product of softmax(q_d / (D tau)). Give D tau as the
    temperature, here and above: the mean over dimensions is then the log-policy, or the entropy, of the whole action
    times tau.
    """
    log_policy = scaled_log_policy(q, temperature)
    policy = functional.softmax(q / temperature, dim=-1)
    finite = log_policy.clamp_min(torch.finfo(q.dtype).min)  # the log-policy of an illegal action is -inf
    entropy = -(policy * finite).sum(dim=-1)
    return policy, entropy if q.ndim == 2 else entropy.mean(dim=1)
