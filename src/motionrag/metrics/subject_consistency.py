"""Subject consistency to the first frame: does the given subject stay what it is? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import ClipBatch, clips
from motionrag.metrics.per_clip import PerClipMetric


class SubjectConsistency(PerClipMetric):
    """100 x mean over frames 1.. of (cos(frame, given picture) + cos(frame, frame before)) / 2, in [0, 100].

    Negative cosines count as 0. Mean over frames, then over clips; frame 0 is not scored. Source: VBench's subject
    consistency (arXiv 2311.17982, ``vbench/subject_consistency.py``). Where ours differs: the first frame is the
    picture the clip was generated from, not the clip's own frame 0 (as in VBench-I2V's ``i2v_subject``, which takes
    the best frame instead of the mean: max(cos to the picture) / 2 + mean(cos of neighbours) / 2); features are
    DINOv2's CLS token, VBench's those of DINO ViT-B/16; the mean is over clips, VBench's over all frames. A clip that
    stands still scores highest: read it beside the dynamic degree.
    """

    higher_is_better = True
    needs = ("video", "first_frame")

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; the extractor gives CLS tokens (B, T, D)."""
        frames, first = self.extract(batch, "video", "first_frame")
        self.update(frames, first[:, 0], batch.ids)

    def update(self, frames: Tensor, first: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: features ``(B, T, D)`` of the frames, T >= 2, ``(B, D)`` of the given pictures, and their ids."""
        if frames.ndim != 3 or frames.shape[1] < 2 or first.shape != (frames.shape[0], frames.shape[2]):
            raise MotionRAGError(
                f"SubjectConsistency, {clips(clip_ids)}: expected frames (B, T >= 2, D) and pictures (B, D), got "
                f"{tuple(frames.shape)} and {tuple(first.shape)}"
            )
        frames, first = frames.double(), first.double()[:, None]
        to_first = cosine_similarity(frames[:, 1:], first, dim=-1).clamp(min=0)  # (B, T-1)
        to_last = cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1).clamp(min=0)
        self.record(50 * (to_first + to_last).mean(dim=1), clip_ids)
