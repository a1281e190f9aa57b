"""Motion distance: do the generated clips hold as much motion as the true ones? Lower is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class MotionDistance(PerClipMetric):
    """KL divergence of histograms of optical-flow magnitudes, true || generated, per pair of frames.

    A histogram counts log2 |flow| in ``bins`` bins over [-7, 5]; flow outside that range, zero flow
    included, is left out. Every bin gets 0.1 more, then the histogram is normalised. Mean over the frame
    pairs of a clip, then over clips. Source: MotionRAG's published code; its flow is RAFT-large on frames of 256 px
    short side.
    """

    higher_is_better = False
    RANGE = (-7.0, 5.0)
    SMOOTHING = 0.1

    def __init__(
        self, bins: int = 256, extractor: Callable[[Tensor], Tensor] | None = None, **kwargs
    ) -> None:
        super().__init__(extractor, **kwargs)
        self.bins = bins

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives flows (B, T-1, 2, H, W)."""
        self.update(*self.extract(batch, "video", "truth"), batch.ids)

    def update(self, pred_flow: Tensor, target_flow: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: flows ``(B, T-1, 2, H, W)`` in pixels per frame, and their ids."""
        check_pair("MotionDistance", pred_flow, target_flow, "B T-1 2 H W", clip_ids)
        pred, target = self.histogram(pred_flow), self.histogram(target_flow)
        divergence = (target * (target.log() - pred.log())).sum(dim=-1)  # (B, T-1)
        self.record(divergence.mean(dim=1), clip_ids)

    def histogram(self, flow: Tensor) -> Tensor:
        """Flow ``(B, T-1, 2, H, W)`` -> smoothed frequencies ``(B, T-1, bins)``, float64, summing to 1."""
        magnitude = flow.float().norm(dim=2).log2().flatten(2)  # (B, T-1, H*W)
        # histc counts one row at a time, and only on the CPU without atomics is its result repeatable
        counts = torch.stack(
            [torch.histc(row, self.bins, *self.RANGE) for row in magnitude.flatten(0, 1).cpu()]
        )
        counts = counts.to(flow.device).double().unflatten(0, magnitude.shape[:2]) + self.SMOOTHING
        return counts / counts.sum(dim=-1, keepdim=True)
