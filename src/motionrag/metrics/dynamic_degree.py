"""Dynamic degree: how many of the clips move? Neither high nor low is good by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import ClipBatch, clips
from motionrag.metrics.per_clip import PerClipMetric


class DynamicDegree(PerClipMetric):
    """Percentage of clips that move, in [0, 100]; a clip's own value is 0 or 100.

    At 8 frames per second, the motion of a frame pair is the mean length of its 5 % longest flow vectors; a pair moves
    if that is above 6 pixels x (short side / 256) x max(1, 8 / fps); a clip of T frames moves if at least
    round(T / 4) of its pairs do. Source: VBench (arXiv 2311.17982, ``vbench/dynamic_degree.py``), the same rule with the
    same constants. Where ours differs: below 8 frames per second the threshold grows with the time between frames
    (VBench's stays); at least one pair must move (VBench calls every clip of one or two frames dynamic); the flow is injected, VBench's is RAFT. ``conf/metrics/dynamic_degree.yaml`` names a RAFT exported to
    torchscript; ``dynamic_degree_tiny`` uses pyramidal Lucas-Kanade, which needs no weights, sees small motions of
    textured things well and underestimates long ones: compare only values of one flow.
    """

    higher_is_better = True  # as VBench has it
    needs = ("video",)

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives flows (B, T-1, 2, H, W) between the frames that it is given."""
        step = max(1, round(batch.fps / 8))
        if step == 1:
            (flow,) = self.extract(batch, "video")
        else:  # other frames, other flow: not the one that other metrics share
            thinned = ClipBatch(batch.ids, batch.get("DynamicDegree", "video")[:, ::step])
            (flow,) = self.extract(thinned, "video")
        self.update(flow, batch.ids, batch.fps)

    def update(self, flow: Tensor, clip_ids: Sequence[str], fps: float = 8.0) -> None:
        """Add clips: flows ``(B, T-1, 2, H, W)`` in pixels of their own resolution, ids, the clips' true frame rate."""
        if flow.ndim != 5 or flow.shape[2] != 2 or not flow.shape[1]:
            raise MotionRAGError(
                f"DynamicDegree, {clips(clip_ids)}: expected flows (B, T-1 >= 1, 2, H, W), got {tuple(flow.shape)}"
            )
        length = flow.float().norm(dim=2).flatten(2)  # (B, T-1, H*W)
        motion = length.topk(max(1, int(0.05 * length.shape[2])), dim=2).values.mean(dim=2)  # (B, T-1)
        threshold = 6 * min(flow.shape[-2:]) / 256 * max(1, 8 / fps)
        needed = max(1, round((flow.shape[1] + 1) / 4))
        # a flow that is not finite must not pass for one that stands still
        moves = torch.where(
            motion.isfinite().all(dim=1), 100.0 * ((motion > threshold).sum(dim=1) >= needed), torch.nan
        )
        self.record(moves, clip_ids)
