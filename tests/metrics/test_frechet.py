"""The Frechet distance against SciPy, with many and with few samples."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from motionrag.errors import MotionRAGError
from motionrag.metrics import FID, FVD
from motionrag.metrics.frechet_distance import _warn_of_few_samples, frechet_distance


def by_scipy(real: np.ndarray, fake: np.ndarray) -> float:
    """The textbook formula with a matrix square root."""
    covariances = [np.cov(x, rowvar=False) for x in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    mean = np.square(real.mean(axis=0) - fake.mean(axis=0)).sum()
    return mean + sum(np.trace(c) for c in covariances) - 2 * np.trace(root).real


@pytest.mark.parametrize(("real", "fake", "width", "tolerance"), [
    (200, 300, 16, 1e-10),
    (40, 17, 16, 1e-8),  # as few as there can be with covariances that are not singular
    (9, 12, 64, 1e-4),  # singular: SciPy's root of a singular matrix is the worse one
])  # fmt: skip
def test_equals_scipy(real, fake, width, tolerance):
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(width, width)) * np.geomspace(10, 1e-2, width)
    x, y = generator.normal(size=(real, width)) @ mix + 5, generator.normal(size=(fake, width)) @ mix.T + 4
    distance = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert distance == pytest.approx(by_scipy(x, y), rel=tolerance)


def test_is_exact_where_samples_are_few():
    """Two samples on lines at a known angle: 2 tr(sqrt(S1 S2)) is 2 sqrt(tr S1 tr S2) times the cosine."""
    x = torch.zeros(2, 50, dtype=torch.float64)
    y = torch.zeros(2, 50, dtype=torch.float64)
    x[:, 0] = torch.tensor([-3.0, 3.0])  # variance 18
    y[:, :2] = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])  # total variance 4, at 45 degrees
    assert frechet_distance(x, y) == pytest.approx(18 + 4 - 2 * (18 * 4 / 2) ** 0.5, abs=1e-12)
    assert frechet_distance(x, x + 2) == pytest.approx(50 * 4, abs=1e-12)


def test_loses_no_digits_far_from_zero():
    """Features around 1000: sums of squares would leave no digits of a spread of 0.001."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(100, 8, generator=generator, dtype=torch.float64) * 1e-3 for _ in range(2))
    assert frechet_distance(x + 1000, y + 1000) == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_sample_counts():
    frames, clips = FID(4), FVD(4)
    features = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for metric, rows in ((frames, features), (clips, features[:, 0])):
        assert metric.counts == (0, 0)
        metric.update(rows, real=True, clip_ids="abc")
        metric.update(rows[:2], real=False, clip_ids="ab")
        metric.update(rows[:1], real=False, clip_ids="a")  # padding
    assert frames.counts == (15, 10)
    assert clips.counts == (3, 2)
    expected = by_scipy(features.flatten(0, 1).double().numpy(), features[:2].flatten(0, 1).double().numpy())
    assert frames.compute().item() == pytest.approx(expected, rel=1e-9)


def test_says_once_that_samples_are_few():
    _warn_of_few_samples.cache_clear()
    few, enough = torch.rand(4, 5), torch.rand(6, 5)
    for _ in range(2):
        metric = FVD(5)
        metric.update(few, real=True)
        metric.update(enough, real=False)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            metric.compute()
        if _ == 0:
            assert ["FVD: 4 samples are fewer than the 5 features" in str(w.message) for w in found] == [True]
        else:
            assert not found
    metric = FID(5)  # another metric says it for itself, and only if it is so
    metric.update(enough, real=True)
    metric.update(enough, real=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()


def test_resampling_needs_pairs():
    metric = FVD(2)
    metric.update(torch.rand(3, 2), real=True, clip_ids="abc")
    metric.update(torch.rand(3, 2), real=False, clip_ids="abd")
    with pytest.raises(MotionRAGError, match=r"^FVD: resampling needs .* 3 true and 3 generated .*\['c'\]"):
        metric.statistic()
