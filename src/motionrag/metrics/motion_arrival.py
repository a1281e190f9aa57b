"""Motion arrival: how much of the references' motion is in the output? Higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.per_clip import PerClipMetric, check_pair


class MotionArrival(PerClipMetric):
    """100 x mean cosine of the output's motion tokens and the adapted target tokens, in [-100, 100].

    Token i against token i, mean over tokens, then over clips. The output's tokens are Resampler(motion encoder(clip)),
    the target's are what CAMA made of the references and what the motion adapter was given. Source: this project.
    All clips' tokens have much in common: with the tiny weights that ship, unrelated clips of MotionWorld score 85 to 88
    against one another and an all-zero clip 88. So read only differences: to the backbone alone against the same target
    tokens, and to random references. It says whether the motion arrived, not whether it was the right one (Action Score).
    """

    higher_is_better = True
    needs = ("motion_tokens", "target_tokens")

    def add(self, batch: ClipBatch) -> None:
        """Add a batch; there is no extractor, the tokens are the model's own."""
        output, target = (batch.get("MotionArrival", name) for name in self.needs)
        self.update(output, target.to(output.device), batch.ids)

    def update(self, output: Tensor, target: Tensor, clip_ids: Sequence[str]) -> None:
        """Add clips: motion tokens ``(B, l, d)`` of any float type, and their ids."""
        check_pair("MotionArrival", output, target, "B l d", clip_ids)
        per_token = cosine_similarity(output.double(), target.double(), dim=-1)  # (B, l)
        self.record(100 * per_token.mean(dim=1), clip_ids)
