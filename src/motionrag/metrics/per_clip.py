"""What the per-clip metrics share: one value per clip id, averaged over clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import clips
from motionrag.metrics.clip_metric import ClipMetric


class PerClipMetric(ClipMetric):
    """Mean over clips of a value per clip, kept by clip id."""

    kept = ("values",)

    def record(self, values: Tensor, clip_ids: Sequence[str]) -> None:
        """Keep ``values (B,)`` under ``clip_ids``; raises when counts differ or a value is not finite."""
        self.keep("values", values.double(), clip_ids)

    def per_clip(self) -> dict[str, float]:
        """Value of every clip seen, in the order of first sight (over all processes when distributed)."""
        with self.sync_context():
            values = self.by_id("values")
        self._some(values)
        return {clip_id: float(value) for clip_id, value in values.items()}

    def statistic(self) -> tuple[list[str], Callable[[Tensor], float]]:
        """Sorted clip ids, and the mean over any choice of them."""
        values = dict(sorted(self.by_id("values").items()))
        self._some(values)
        table = [float(value) for value in values.values()]
        # fsum rounds once: the mean does not depend on the order of clips
        return list(values), lambda index: math.fsum(table[i] for i in index.tolist()) / len(index)

    def compute(self) -> Tensor:
        """Mean over clips, a float64 scalar."""
        ids, value = self.statistic()
        return self.result(value(torch.arange(len(ids))))

    def _some(self, values: dict) -> None:
        if not values:
            raise MotionRAGError(f"{type(self).__name__}: no clips were given, call add or update first")


def check_pair(name: str, pred: Tensor, target: Tensor, layout: str, clip_ids: Sequence[str]) -> None:
    """Raise unless both tensors have one shape with as many axes as ``layout`` names, e.g. ``B T D``."""
    if pred.shape != target.shape or pred.ndim != len(layout.split()):
        raise MotionRAGError(
            f"{name}, {clips(clip_ids)}: expected two tensors ({layout}) of one shape, got {tuple(pred.shape)} "
            f"(generated) and {tuple(target.shape)} (true)"
        )
