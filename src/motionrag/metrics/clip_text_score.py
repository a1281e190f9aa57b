"""CLIP score, text-video (CLIPSIM): do the frames show what the prompt says? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import ClipBatch, clips
from motionrag.metrics.per_clip import PerClipMetric


class ClipTextScore(PerClipMetric):
    """100 x mean cosine of CLIP's embeddings of the prompt and of each frame, in [-100, 100].

    Mean over the frames of a clip, then over clips. Source: CLIPSIM (GODIVA, arXiv 2104.14806), as MotionRAG's
    published code computes it (CLIP ViT-bigG-14, laion2b; much of the field uses ViT-B/32: compare only values of
    one model). torchmetrics' CLIPScore sets negative values to 0 and keeps sums without clip ids; ours does neither.
    """

    higher_is_better = True
    needs = ("video", "prompts")

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives image embeddings (B, T, D), its ``text(prompts)`` text embeddings (B, D)."""
        (frames,) = self.extract(batch, "video")
        self.update(frames, self.extractor.text(batch.get("ClipTextScore", "prompts")), batch.ids)

    def update(self, frames: Tensor, texts: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: image embeddings ``(B, T, D)``, text embeddings ``(B, D)`` of any float type, and their ids."""
        if frames.ndim != 3 or texts.shape != (frames.shape[0], frames.shape[2]):
            raise MotionRAGError(
                f"ClipTextScore, {clips(clip_ids)}: expected frames (B, T, D) and texts (B, D), got "
                f"{tuple(frames.shape)} and {tuple(texts.shape)}"
            )
        per_frame = cosine_similarity(frames.double(), texts.double()[:, None], dim=-1)  # (B, T)
        self.record(100 * per_frame.mean(dim=1), clip_ids)
