"""All metrics of a run, for every condition, domain and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.bootstrap import Interval, difference, interval
from motionrag.metrics.clip_metric import ClipMetric
from motionrag.metrics.frechet_distance import FrechetDistance
from motionrag.metrics.per_clip import PerClipMetric

T = TypeVar("T")


class Metrics:
    """The metrics of a run by name, and what becomes of one that fails.

    makers: name -> what makes the metric. errors: "fail": the first failure ends the run. "warn": the metric is left
    out of all results, and `failed` says why. Raises MotionRAGError for another word, or if none is left.
    """

    def __init__(self, makers: Mapping[str, Callable[[], ClipMetric]], errors: str = "fail"):
        if errors not in ("fail", "warn"):
            raise MotionRAGError(f"metric_errors={errors}: choose fail or warn")
        self.errors = errors
        self.failed: dict[str, str] = {}
        made = {name: self.attempt(name, make) for name, make in makers.items()}
        self.templates = {name: metric for name, metric in made.items() if metric is not None}
        self._some_left()

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """`work()`; None if it fails and that is allowed."""
        try:
            return work()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, MotionRAGError):  # Hydra wraps what it makes
                cause = cause.__cause__
            if self.errors == "fail" and cause is None:
                raise  # a fault of the program: its traceback helps
            if self.errors == "fail":
                raise MotionRAGError(
                    f"metric {name}: {cause}; metric_errors=warn goes on without it"
                ) from error
            reason = str(cause or error).strip().splitlines() or [type(error).__name__]
            self.failed.setdefault(name, reason[0])
            self._some_left()
            return None

    def check_counts(self, clips: Mapping[str, int]) -> None:
        """Fail what needs more than these clips (domain -> how many): before they are made, not after."""

        def check(metric: ClipMetric) -> None:
            domain, count = min(clips.items(), key=lambda item: item[1])
            if count < metric.least_clips:
                raise MotionRAGError(
                    f"{type(metric).__name__}: needs at least {metric.least_clips} clips of each domain, "
                    f"'{domain}' has {count}; give more clips, or leave it out of metrics=[...]"
                )

        for name in self.names:
            self.attempt(name, partial(check, self.templates[name]))

    @property
    def names(self) -> list[str]:
        """Metrics that have not failed."""
        return [name for name in getattr(self, "templates", ()) if name not in self.failed]

    @property
    def need_tokens(self) -> bool:
        """Whether a metric reads motion tokens."""
        needs = {field for name in self.names for field in self.templates[name].needs}
        return bool(needs & {"motion_tokens", "target_tokens"})

    def _some_left(self) -> None:
        if hasattr(self, "templates") and not self.names:
            raise MotionRAGError(f"no metric is left: {self.failed}; choose others with metrics=[NAME,...]")


@dataclass
class Scores:
    """Values of all metrics; one copy of each for every condition, domain and seed.

    add, or add_times, what was generated; then table, spread, differences and per_clip. In tables the first condition
    is the one that others are compared with.
    """

    metrics: Metrics
    resamples: int = 1000
    _cells: dict[tuple[str, str, int], dict[str, ClipMetric]] = field(default_factory=dict)
    _seconds: dict[tuple[str, str], list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    _clips: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def add(
        self,
        condition: str,
        domain: str,
        seed: int,
        batch: ClipBatch,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Measure a batch. seconds: per clip, stage by stage, that it took to generate."""
        if not _finite(batch.video):
            bad = next(i for i, one in zip(batch.ids, batch.video, strict=True) if not _finite(one))
            raise MotionRAGError(
                f"clip '{bad}', condition {condition}, seed {seed}: the generated frames hold NaN or infinity; try "
                "another precision (backbone.dtype), or check the weights"
            )
        cell = self._cells.setdefault((condition, domain, seed), {})
        for name in self.metrics.names:
            if name not in cell:
                cell[name] = self.metrics.templates[name].clone()
            metric = cell[name]
            self.metrics.attempt(name, lambda metric=metric: metric.add(batch))
        self._clips.setdefault((condition, domain), set()).update(batch.ids)
        if seconds is not None:
            self._seconds.setdefault((condition, domain), []).append((len(batch.ids), dict(seconds)))

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(condition for condition, _ in self._clips))

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(domain for _, domain in self._clips))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for *_, seed in self._cells))

    def _over_seeds(self, condition: str, domain: str, name: str) -> list[ClipMetric]:
        return [
            cell[name]
            for (c, d, _), cell in self._cells.items()
            if (c, d) == (condition, domain) and name in cell
        ]

    def _places(self) -> list[tuple[str, str]]:
        return [(c, d) for c in self.conditions for d in self.domains if (c, d) in self._clips]

    def seconds(self) -> dict[str, dict[str, dict[str, float]]]:
        """condition -> domain -> stage -> mean seconds per clip; nothing for what was not generated."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (condition, domain), parts in self._seconds.items():
            clips = sum(count for count, _ in parts)
            stages = list(dict.fromkeys(stage for _, seconds in parts for stage in seconds))
            out.setdefault(condition, {})[domain] = {
                stage: sum(count * seconds.get(stage, 0.0) for count, seconds in parts) / clips
                for stage in stages
            }
        return out

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """condition -> domain -> metric -> mean over clips and seeds; also `seconds_per_clip`, and `n` clips."""
        spread, seconds = self.spread(resamples=0), self.seconds()
        out: dict[str, dict[str, dict[str, float]]] = {}
        for condition, domain in self._places():
            values = spread[condition][domain]
            row = {name: statistics.fmean(values[name]["seeds"]) for name in self.metrics.names}
            if (times := seconds.get(condition, {}).get(domain)) is not None:
                row["seconds_per_clip"] = math.fsum(times.values())
            out.setdefault(condition, {})[domain] = {**row, "n": len(self._clips[condition, domain])}
        return out

    def spread(self, resamples: int | None = None) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """condition -> domain -> metric -> `seeds`, the value of each, and where there are enough of them
        `standard_deviation` over seeds and the bootstrap `interval` over clips."""
        out: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
        for condition, domain in self._places():
            row = out.setdefault(condition, {}).setdefault(domain, {})
            for name in list(self.metrics.names):
                found = self._over_seeds(condition, domain, name)
                values = self.metrics.attempt(name, lambda found=found: [float(m.compute()) for m in found])
                if values is None:
                    continue
                row[name] = {"seeds": values}
                if len(values) > 1:
                    row[name]["standard_deviation"] = statistics.stdev(values)
                if len(self._clips[condition, domain]) > 1:
                    row[name] |= self._interval(
                        name, interval, [found], self.resamples if resamples is None else 0
                    )
        return self.left(out)

    def samples(self) -> dict[str, dict[str, dict[str, int]]]:
        """domain -> metric of a whole set -> `samples`, in each of its two sets, and `features`, the width of each."""
        out: dict[str, dict[str, dict[str, int]]] = {}
        for (_, domain, _), cell in self._cells.items():
            for name in self.metrics.names:
                if isinstance(cell[name], FrechetDistance):
                    found = {"samples": min(cell[name].counts), "features": cell[name].num_features}
                    out.setdefault(domain, {})[name] = found
        return out

    def left(self, found: Mapping[str, Mapping[str, Mapping[str, T]]]) -> dict[str, dict[str, dict[str, T]]]:
        """condition -> domain -> metric -> value, without the metrics that have failed, maybe since it was made."""
        return {
            condition: {
                domain: {name: value for name, value in row.items() if name not in self.metrics.failed}
                for domain, row in domains.items()
            }
            for condition, domains in found.items()
        }

    def differences(self) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """condition -> domain -> metric -> `value` minus the first condition's, paired by clip, and its `interval`."""
        table, (first, *others) = self.table(), self.conditions
        out: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
        for condition in others:
            for domain in table[condition]:
                if domain not in table[first]:
                    continue
                row = out.setdefault(condition, {}).setdefault(domain, {})
                for name in self.metrics.names:
                    pair = [self._over_seeds(c, domain, name) for c in (condition, first)]
                    row[name] = {"value": table[condition][domain][name] - table[first][domain][name]}
                    if len(self._clips[condition, domain]) > 1:
                        row[name] |= self._interval(name, difference, pair, self.resamples)
        return out

    def _interval(
        self,
        name: str,
        bootstrap: Callable[..., Interval],
        metrics: Sequence[Sequence[ClipMetric]],
        resamples: int,
    ) -> dict[str, list[float]]:
        if not resamples:
            return {}
        found = self.metrics.attempt(
            name, lambda: bootstrap(*(OverSeeds(each) for each in metrics), resamples=resamples)
        )
        return {} if found is None else {"interval": [found.low, found.high]}

    def per_clip(self) -> dict[str, dict[str, dict[int, dict[str, float]]]]:
        """clip id -> condition -> seed -> metric -> value, of the metrics that have one for each clip."""
        out: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        for (condition, _, seed), cell in self._cells.items():
            for name in self.metrics.names:
                if isinstance(cell[name], PerClipMetric):
                    for clip_id, value in cell[name].per_clip().items():
                        row = out.setdefault(clip_id, {}).setdefault(condition, {}).setdefault(seed, {})
                        row[name] = value
        return out


class OverSeeds:
    """One metric measured for several seeds as one: the mean over seeds, of clips that are resampled together."""

    def __init__(self, metrics: Sequence[ClipMetric]):
        self.metrics = metrics

    def sync_context(self) -> nullcontext:
        """Evaluation runs in one process."""
        return nullcontext()

    def statistic(self) -> tuple[list[str], Callable[[Tensor], float]]:
        """See `ClipMetric.statistic`."""
        parts = [metric.statistic() for metric in self.metrics]
        return parts[0][0], lambda index: statistics.fmean(value(index) for _, value in parts)


def _finite(video: Tensor) -> bool:
    return bool(video.isfinite().all())


def mean_over_seeds(
    conditions: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    """condition -> seed -> metric -> value of one clip, without the seeds."""
    out = {}
    for condition, seeds in conditions.items():
        rows = list(seeds.values())
        out[condition] = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return out
