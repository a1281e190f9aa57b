"""Frechet distance of two sets of features: FVD with video features, FID with image features."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from motionrag.errors import MotionRAGError


class FrechetDistance(Metric):
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr(sqrt(S1 S2)) of two sets of features. Lower is better, 0 the least.

    Sums are kept in float64, covariances are unbiased (n - 1). The distance shrinks as sets grow: with fewer
    samples than ``num_features`` the covariances are singular and the value is far from its limit, so compare
    only values of equal sample counts (see ``counts``) and state them.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, num_features: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.num_features = num_features
        for kind in ("real", "fake"):
            zeros = torch.zeros(num_features, dtype=torch.float64)
            self.add_state(f"{kind}_sum", default=zeros, dist_reduce_fx="sum")
            self.add_state(f"{kind}_outer", default=zeros.outer(zeros), dist_reduce_fx="sum")
            self.add_state(f"{kind}_count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features ``(n, num_features)`` of any float type to the true (``real``) or generated set."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise MotionRAGError(
                f"FrechetDistance: expected features (n, {self.num_features}), got {tuple(features.shape)}"
            )
        features = features.detach().double()
        if real:
            self.real_sum += features.sum(dim=0)
            self.real_outer += features.T @ features
            self.real_count += len(features)
        else:
            self.fake_sum += features.sum(dim=0)
            self.fake_outer += features.T @ features
            self.fake_count += len(features)

    @property
    def counts(self) -> tuple[int, int]:
        """Samples in the true and in the generated set."""
        return int(self.real_count), int(self.fake_count)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; raises with fewer than two samples in either set."""
        if min(self.counts) < 2:
            raise MotionRAGError(
                "FrechetDistance: needs at least 2 true and 2 generated samples, got {} and {}".format(
                    *self.counts
                )
            )
        mean_real, cov_real = _moments(self.real_sum, self.real_outer, self.real_count)
        mean_fake, cov_fake = _moments(self.fake_sum, self.fake_outer, self.fake_count)
        cross = torch.linalg.eigvals(cov_real @ cov_fake).sqrt().real.sum()
        distance = (mean_real - mean_fake).square().sum() + cov_real.trace() + cov_fake.trace() - 2 * cross
        return distance.clamp(min=0)  # rounding can leave equal sets at -1e-4


def _moments(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance from sums."""
    mean = total / count
    return mean, (outer - count * mean.outer(mean)) / (count - 1)
