"""Stage 3: fine-tune all of it together, on the motion that is used when a video is made."""

from typing import Any

import torch
from torch import Tensor

from motionrag.checkpoint import load_weights
from motionrag.data.batch import MotionBatch
from motionrag.lit.adapter_module import AdapterModule
from motionrag.modules.cama import CAMA


class JointModule(AdapterModule):
    """Trains CAMA, both Resamplers and the motion adapter through the backbone's own diffusion loss.

    The backbone is shown CAMA's prediction from the clip's retrieved references and its first frame, never the clip's
    own motion. A dropped sample sees the zero clip's tokens, past CAMA, as the unconditional half of guidance does.

    Args:
        cama: what is trained beside Stage 1's parts.
        cama_weights: Stage 2 weights file to start from.
        options: those of AdapterModule; `weights` is the Stage 1 weights file to start from.

    Raises ValueError if CAMA and the motion Resampler disagree about tokens.
    """

    def __init__(self, cama: CAMA, cama_weights: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if (self.resampler.tokens, self.resampler.output_dim) != (cama.tokens, cama.width):
            raise ValueError(
                f"the motion Resampler gives {self.resampler.tokens} x {self.resampler.output_dim} tokens, "
                f"CAMA works on {cama.tokens} x {cama.width}"
            )
        self.cama = cama
        if cama_weights:
            load_weights(cama_weights, cama=self.cama)

    def feature_widths(self) -> dict[str, int]:
        """Width that motion and appearance features must have."""
        return {
            "motion": self.resampler.embedding_dim,
            "appearance": self.cama.appearance_resampler.embedding_dim,
        }

    def clip_tokens(self, batch: MotionBatch, dropped: Tensor | None = None) -> Tensor:
        """The tokens (B, n, d) that CAMA predicts from the references; of `dropped` samples (B,), bool, the zero
        clip's."""
        references = batch.reference_motion
        tokens = self.cama.predict(
            self.motion_tokens(references.flatten(0, 1)).unflatten(0, references.shape[:2]),
            batch.reference_appearance.to(self.dtype),
            batch.target_appearance.to(self.dtype),
        )
        if dropped is None:
            return tokens
        return torch.where(dropped[:, None, None], self.motion_tokens(self.null_features()), tokens)
