"""Frechet distance of two sets of features: FVD with video features, FID with image features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch import distributed as dist

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.clip_metric import ClipMetric


class FrechetDistance(ClipMetric):
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr(sqrt(S1 S2)) of two sets of features. Lower is better, 0 the least.

    In float64 with unbiased covariances (n - 1), and without forming them: with the centred features X1, X2 the last
    term is the sum of the singular values of X1 X2^T / sqrt((n1 - 1)(n2 - 1)), which stays exact where covariances are
    singular (fewer samples than features). Source: Heusel et al. (arXiv 1706.08500), Dowson and Landau (1982).
    torchmetrics' FrechetInceptionDistance keeps sums without clip ids and takes eigenvalues of S1 S2, so it counts
    padded clips twice and loses digits with few samples; ours does neither.

    The distance shrinks as sets grow: with fewer samples than ``num_features`` the value is far from its limit, which
    is said once in a warning. Compare only values of equal sample counts (see ``counts``) and state them.

    Features are kept (in float32, or float64 if they come so), those of a clip together, for ids and resampling.
    """

    higher_is_better = False
    kept = ("real", "fake")

    def __init__(
        self, num_features: int, extractor: Callable[[Tensor], Tensor] | None = None, **kwargs
    ) -> None:
        super().__init__(extractor, **kwargs)
        self.num_features = num_features
        self._unnamed = 0

    def add(self, batch: ClipBatch) -> None:
        """Add a batch to both sets; the extractor gives features (B, D), or (B, T, D): one for each frame."""
        fake, real = self.extract(batch, "video", "truth")
        self.update(real, real=True, clip_ids=batch.ids)
        self.update(fake, real=False, clip_ids=batch.ids)

    def update(self, features: Tensor, real: bool, clip_ids: Sequence[str] | None = None) -> None:
        """Add features of any float type to the true (``real``) or generated set.

        ``(n, num_features)`` is one sample for each of n clips, ``(n, T, num_features)`` T for each. Without ids every
        row is taken for another clip.
        """
        name = type(self).__name__
        if features.ndim not in (2, 3) or features.shape[-1] != self.num_features:
            raise MotionRAGError(
                f"{name}: expected features (n, {self.num_features}) or (n, T, {self.num_features}), got "
                f"{tuple(features.shape)}"
            )
        if clip_ids is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            clip_ids = [f"row {rank}.{self._unnamed + i:09d}" for i in range(len(features))]
            self._unnamed += len(features)
        if features.ndim == 2:
            features = features[:, None]
        state = "real" if real else "fake"
        for before in getattr(self, state)[:1]:
            if before.shape[1] != features.shape[1]:
                raise MotionRAGError(
                    f"{name}, clip '{clip_ids[0]}': {features.shape[1]} samples, earlier clips have "
                    f"{before.shape[1]}; all clips of a set must be equally long"
                )
        self.keep(state, features.double() if features.dtype == torch.float64 else features.float(), clip_ids)

    @property
    def counts(self) -> tuple[int, int]:
        """Samples in the true and in the generated set, over all processes when distributed."""
        with self.sync_context():
            return tuple(len(rows) * rows.shape[1] if len(rows) else 0 for _, rows in self._sets())

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; raises with fewer than two samples in either set."""
        (_, real), (_, fake) = self._sets()
        counts = [len(rows) * rows.shape[1] if len(rows) else 0 for rows in (real, fake)]
        name = type(self).__name__
        if min(counts) < 2:
            raise MotionRAGError(
                f"{name}: needs at least 2 true and 2 generated samples, got {counts[0]} and {counts[1]}"
            )
        if min(counts) < self.num_features:
            _warn_of_few_samples(name, self.num_features, min(counts))
        return self.result(frechet_distance(real.flatten(0, 1), fake.flatten(0, 1)))

    def statistic(self) -> tuple[list[str], Callable[[Tensor], float]]:
        """Sorted clip ids, and the distance over any choice of clips, true and generated alike."""
        (real_ids, real), (fake_ids, fake) = self._sets()
        if real_ids != fake_ids or len(real_ids) < 2:
            differ = sorted(set(real_ids) ^ set(fake_ids))
            raise MotionRAGError(
                f"{type(self).__name__}: resampling needs at least 2 clips, the same in both sets; "
                f"{len(real_ids)} true and {len(fake_ids)} generated ones, {len(differ)} without a partner {differ[:1]}"
            )
        return fake_ids, lambda index: frechet_distance(real[index].flatten(0, 1), fake[index].flatten(0, 1))

    def _sets(self) -> list[tuple[list[str], Tensor]]:
        """Sorted ids and features (n, T, D) of the true and of the generated clips."""
        sets = []
        for state in self.kept:
            rows = dict(sorted(self.by_id(state).items()))
            sets.append((list(rows), torch.stack(list(rows.values())) if rows else torch.empty(0)))
        return sets


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Distance of features (n1, D) and (n2, D), n >= 2; computed in float64."""
    real, fake = real.double(), fake.double()
    means = real.mean(dim=0), fake.mean(dim=0)
    roots = [
        torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
        for x, mean in zip((real, fake), means, strict=True)
    ]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = roots[0].square().sum() + roots[1].square().sum()
    distance = (means[0] - means[1]).square().sum() + spread - 2 * cross
    return float(distance.clamp(min=0))  # rounding can leave equal sets a little below 0


@cache  # once for each metric, not for each condition and domain
def _warn_of_few_samples(name: str, width: int, count: int) -> None:
    warnings.warn(
        f"{name}: {count} samples are fewer than the {width} features; the distance is far above its limit and only "
        "comparable at equal sample counts",
        stacklevel=4,
    )
