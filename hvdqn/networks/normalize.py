"""Normalize vector observations by the mean and the variance of all observations of the job so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

EPSILON = 1e-8
LIMIT = 10.0


class Normalize(nn.Module):
    """The first layer of a Q-network with `--normalize-observations`.

        clip((x - mean) / sqrt(variance + 1e-8), -10, 10)

    The constants are those of Gymnasium's `NormalizeObservation` and of `VecNormalize` of Stable-Baselines3. Replay
    holds observations as they are, so that every minibatch is normalized by the newest statistics.

    Each rank collects its own observations with `observe`. With every exchange their sums are added up over ranks
    (see `sync.statistics.Trailer`), and `merge` computes the same statistics on all ranks, bit for bit.

    Args:
        features: the length of an observation, without frame stack.

    Attributes:
        count: number of observations in the statistics `[]`.
        mean, variance: of each feature `[features]`, in float64.
        num_sums: the length of what `pop_sums` returns.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(features, dtype=torch.float64))
        self.num_sums = 1 + 2 * features
        self._observed: list[NDArray[np.float64]] = []
        self._restored: list[NDArray[np.float64]] = []

    def forward(self, observation: Tensor) -> Tensor:
        """Normalize floats `[batch, (stack,) features]`."""
        scale = torch.rsqrt(self.variance + EPSILON).to(observation.dtype)
        return ((observation - self.mean.to(observation.dtype)) * scale).clamp(-LIMIT, LIMIT)

    def observe(self, observations: NDArray[Any]) -> None:
        """Collect observations of this rank `[rows, features]` for the next exchange, but none that is not finite."""
        rows = observations.astype(np.float64)
        if observations.dtype == np.uint8:
            rows /= 255  # as the network scales them before this layer
        self._observed.append(rows[np.isfinite(rows).all(axis=1)])

    def state(self) -> NDArray[np.float64]:
        """Return what this rank has collected since the last exchange `[rows, features]`, for a checkpoint."""
        return np.concatenate([np.empty((0, len(self.mean))), *self._observed])

    def load_state(self, rows: NDArray[np.float64]) -> None:
        """Collect again what `state` returned.

        A resumed run begins with an exchange of its own. These rows go with the one after it, as without the stop.
        """
        self._restored = [rows.copy()]

    def pop_sums(self) -> NDArray[np.float64]:
        """Return the sums over what this rank has collected, and begin to collect anew.

        Returns:
            The number of observations, the sum of their deviations from `mean`, and the sum of the squares of these,
            `[1 + 2 features]`. Sums of all ranks may be added up.
        """
        deviations = self.state() - self.mean.cpu().numpy()
        self._observed, self._restored = self._restored, []
        return np.concatenate([[len(deviations)], deviations.sum(axis=0), np.square(deviations).sum(axis=0)])

    def merge(self, sums: NDArray[np.float64]) -> None:
        """Add to the statistics what all ranks returned from `pop_sums`, added up. Sums that overflowed are dropped.

        It is the parallel algorithm of Chan et al. 1979: with n observations before, k new ones and d = x - mean,

            mean' = mean + D,   variance' = (n variance + sum d^2) / (n + k) - D^2,   D = sum d / (n + k)
        """
        if sums[0] == 0 or not np.isfinite(sums).all():
            return
        new = torch.as_tensor(sums, dtype=torch.float64, device=self.mean.device)
        deviations, squares = new[1:].view(2, -1)
        total = self.count + new[0]
        moved = deviations / total
        self.variance.mul_(self.count).add_(squares).div_(total).sub_(moved.square()).clamp_(min=0)
        self.mean.add_(moved)
        self.count.copy_(total)
