"""Confidence intervals by resampling clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from motionrag.errors import MotionRAGError
from motionrag.metrics.clip_metric import ClipMetric


@dataclass(frozen=True)
class Interval:
    """A value over all clips and the ends of its interval, in the metric's unit."""

    value: float
    low: float
    high: float


def interval(metric: ClipMetric, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap over clips (Efron 1979): n of n clips drawn with repeats, ``resamples`` times.

    All processes of a distributed run must call it; all get the same result. For Frechet distances the resampled
    sets hold fewer distinct clips, which moves the whole interval up: the value itself may lie below it. Read
    ``difference`` there, in which that largely cancels. Raises MotionRAGError with fewer than two clips.
    """
    return _bootstrap([metric], resamples, level, seed)


def difference(
    metric: ClipMetric, other: ClipMetric, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The same for ``metric - other`` on the same clips, drawn together (paired).

    Raises MotionRAGError if the two do not hold the same clips.
    """
    return _bootstrap([metric, other], resamples, level, seed)


def _bootstrap(metrics: list[ClipMetric], resamples: int, level: float, seed: int) -> Interval:
    if resamples < 1 or not 0 < level < 1:
        raise MotionRAGError(f"bootstrap: expected resamples >= 1, 0 < level < 1, got {resamples}, {level}")
    ids, values = [], []
    for metric in metrics:
        with metric.sync_context():
            found, value = metric.statistic()
        ids.append(found)
        values.append(value)
    name, count = type(metrics[0]).__name__, len(ids[0])
    if ids[0] != ids[-1]:
        differ = sorted(set(ids[0]) ^ set(ids[-1]))
        raise MotionRAGError(
            f"{name}: a paired difference needs the same clips on both sides; {len(differ)} are only on one, "
            f"the first is '{differ[0]}'"
        )
    if count < 2:
        raise MotionRAGError(f"{name}: an interval needs at least 2 clips, got {count}")

    def statistic(index: torch.Tensor) -> float:
        first, *rest = (value(index) for value in values)
        return first - sum(rest)

    generator = torch.Generator().manual_seed(seed)
    drawn = [statistic(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(drawn, dtype=torch.float64), tails).tolist()
    return Interval(statistic(torch.arange(count)), low, high)
