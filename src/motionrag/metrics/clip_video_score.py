"""CLIP score, video-video: does the generated clip show what the true one shows? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class ClipVideoScore(PerClipMetric):
    """100 x mean cosine of CLIP's image embeddings, frame j against frame j, in [-100, 100].

    Mean over the frames of a clip, then over clips. Source: MotionRAG's published code (CLIP ViT-bigG-14, laion2b).
    torchmetrics' CLIPScore sets negative values to 0 and keeps sums without clip ids; ours does neither.
    """

    higher_is_better = True

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives image embeddings (B, T, D)."""
        self.update(*self.extract(batch, "video", "truth"), batch.ids)

    def update(self, pred: Tensor, target: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: image embeddings ``(B, T, D)`` of any float type, and their ids."""
        check_pair("ClipVideoScore", pred, target, "B T D", clip_ids)
        per_frame = cosine_similarity(pred.double(), target.double(), dim=-1)  # (B, T)
        self.record(100 * per_frame.mean(dim=1), clip_ids)
