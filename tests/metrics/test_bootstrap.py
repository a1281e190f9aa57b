"""Confidence intervals over clips."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from motionrag.errors import MotionRAGError
from motionrag.metrics import FVD, TrajectoryError
from motionrag.metrics.bootstrap import difference, interval


def errors(values, ids=None) -> TrajectoryError:
    """A metric with these values per clip."""
    metric = TrajectoryError()
    values = torch.as_tensor(values, dtype=torch.float64)
    track = torch.zeros(len(values), 1, 2, dtype=torch.float64)
    track[:, 0, 0] = values
    metric.update(track, torch.zeros_like(track), ids or [f"{i:03d}" for i in range(len(values))])
    return metric


def normal(count: int, seed: int) -> torch.Tensor:
    return 10 + torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equals_scipy():
    values = normal(40, 0)
    ours = interval(errors(values), resamples=4000)
    theirs = scipy.stats.bootstrap(
        [values.numpy()], lambda x, axis: x.mean(axis=axis), method="percentile", n_resamples=4000, rng=0
    )
    assert ours.value == pytest.approx(values.mean().item())
    # the ends are drawn: 4000 draws leave about 3 % of a standard error
    assert [ours.low, ours.high] == pytest.approx(list(theirs.confidence_interval), abs=0.02)
    narrow = interval(errors(values), resamples=4000, level=0.5)
    assert ours.low < narrow.low < ours.value < narrow.high < ours.high


def test_seed_and_order():
    values = normal(12, 0)
    one = interval(errors(values), 50, seed=3)
    assert one == interval(errors(values), 50, seed=3)
    assert one != interval(errors(values), 50, seed=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert one == interval(errors(values[order], [f"{i:03d}" for i in order.tolist()]), 50, seed=3)


def test_a_paired_difference_sees_what_single_intervals_hide():
    values = normal(30, 0) * 5
    better, worse = errors(values), errors(values + 0.5 + 0.1 * normal(30, 1))
    single = [interval(metric, 200) for metric in (better, worse)]
    assert single[0].high > single[1].low  # they overlap
    paired = difference(worse, better, 200)
    assert 1.4 < paired.low < paired.value < paired.high < 1.6
    assert difference(better, better, 200) == difference(worse, worse, 200)  # nothing, exactly
    assert difference(better, better, 200).high == 0


def test_frechet_distances_resample_features():
    generator = torch.Generator().manual_seed(0)
    real, near = torch.randn(2, 30, 4, generator=generator)
    ids = [f"{i:02d}" for i in range(30)]
    metrics = []
    for fake in (near, near + 3):
        metric = FVD(4)
        metric.update(real, real=True, clip_ids=ids)
        metric.update(fake, real=False, clip_ids=ids)
        metrics.append(metric)
    close, far = (interval(metric, 100) for metric in metrics)
    assert 0 < close.low < close.high < far.low < far.value < far.high
    assert close.value == metrics[0].compute().item()
    apart = difference(metrics[1], metrics[0], 100)
    assert apart.low > 25
    assert apart.value == pytest.approx(far.value - close.value)
    assert apart.high - apart.low < far.high - far.low


def test_refuses():
    with pytest.raises(MotionRAGError, match="at least 2 clips, got 1"):
        interval(errors([1.0]))
    with pytest.raises(MotionRAGError, match="^TrajectoryError: .* 2 are only on one, the first is '001'"):
        difference(errors([1.0, 2.0]), errors([1.0, 2.0], ["000", "x"]))
    with pytest.raises(MotionRAGError, match="0 < level < 1"):
        interval(errors([1.0, 2.0]), level=95)
    with pytest.raises(MotionRAGError, match="no clips"):
        interval(TrajectoryError())
