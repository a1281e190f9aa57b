"""Action Score: does the generated clip show the action of the true one? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class ActionScore(PerClipMetric):
    """100 x mean cosine of a video classifier's logits for the generated and the true clip, in [-100, 100].

    Source: MotionRAG (arXiv 2509.26391), as its published code computes it; its classifier is VideoMAE fine-tuned
    on Something-Something v2 (16 frames, 224 px).
    """

    higher_is_better = True

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives logits (B, classes)."""
        self.update(*self.extract(batch, "video", "truth"), batch.ids)

    def update(self, pred_logits: Tensor, target_logits: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: logits ``(B, classes)`` of any float type, and their ids."""
        check_pair("ActionScore", pred_logits, target_logits, "B classes", clip_ids)
        self.record(100 * cosine_similarity(pred_logits.double(), target_logits.double(), dim=-1), clip_ids)
