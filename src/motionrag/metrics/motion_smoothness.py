"""Motion smoothness: can every other frame be told from its neighbours? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class MotionSmoothness(PerClipMetric):
    """100 x (1 - mean |frame - interpolated frame| / range) over frames 1, 3, 5, ..., in [0, 100].

    Every odd frame is predicted from its two neighbours. Source: VBench (arXiv 2311.17982,
    ``vbench/motion_smoothness.py``), the same formula. Where ours differs: the interpolation is injected, VBench's is the
    network AMT-S; frames are floats, VBench's 8-bit. ``conf/metrics/motion_smoothness_tiny.yaml`` moves both neighbours
    half-way along their Lucas-Kanade flow and averages them, without weights: compare only values of one
    interpolation. A clip that stands still scores 100: read it beside the dynamic degree.
    """

    higher_is_better = True
    needs = ("video",)

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives (T-1)//2 interpolated frames (B, M, 3, H, W) in [-1, 1]."""
        (interpolated,) = self.extract(batch, "video")
        odd = batch.video[:, 1 : batch.video.shape[1] - 1 : 2]
        self.update(interpolated, odd.to(interpolated.device), batch.ids)

    def update(self, interpolated: Tensor, frames: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: frames as predicted and as they are, both ``(B, M, 3, H, W)`` in [-1, 1], M >= 1, and their ids."""
        check_pair("MotionSmoothness", interpolated, frames, "B M 3 H W", clip_ids)
        difference = (interpolated.double() - frames.double()).abs().flatten(1).mean(dim=1)  # NaN for M = 0
        self.record(100 * (1 - difference / 2), clip_ids)
