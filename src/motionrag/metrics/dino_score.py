"""DINO score: does the generated clip look like the true one, frame by frame? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class DinoScore(PerClipMetric):
    """100 x mean cosine of an image encoder's CLS tokens, frame j against frame j, in [-100, 100].

    Mean over the frames of a clip, then over clips. Source: MotionRAG (arXiv 2509.26391); its encoder is
    DINOv2-large on frames resized to 256 (bicubic) and cropped to 224. Ours are resized to 224 (bilinear), as the
    appearance encoder takes them everywhere else.
    """

    higher_is_better = True

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives CLS tokens (B, T, D)."""
        self.update(*self.extract(batch, "video", "truth"), batch.ids)

    def update(self, pred: Tensor, target: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: CLS tokens ``(B, T, D)`` of any float type, and their ids."""
        check_pair("DinoScore", pred, target, "B T D", clip_ids)
        per_frame = cosine_similarity(pred.double(), target.double(), dim=-1)  # (B, T)
        self.record(100 * per_frame.mean(dim=1), clip_ids)
