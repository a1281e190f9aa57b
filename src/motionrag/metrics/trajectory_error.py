"""Trajectory error: how far from its true path does the object move? Lower is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class TrajectoryError(PerClipMetric):
    """Mean Euclidean distance of two tracks in pixels, over the frames of a clip, then over clips.

    Model-free, and only for clips with one object that a tracker finds: those of MotionWorld.
    """

    higher_is_better = False

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives tracks (B, T, 2)."""
        self.update(*self.extract(batch, "video", "truth"), batch.ids)

    def update(self, pred: Tensor, target: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: tracks ``(B, T, 2)`` of (x, y) in pixels, finite in every frame, and their ids."""
        check_pair("TrajectoryError", pred, target, "B T 2", clip_ids)
        distance = (pred.double() - target.double()).norm(dim=-1)  # (B, T)
        self.record(distance.mean(dim=1), clip_ids)
