"""CAMA, the motion context transformer: predicts a target's motion tokens from reference clips in context.

Shape letters: B batch, K reference clips, S = K + 1 clips in the sequence, l tokens per clip, d token width,
M, E tokens and width of the appearance features.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from motionrag.errors import MotionRAGError
from motionrag.modules.resampler import Resampler


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Fixed position codes (length, dim) float32: sine at even columns, cosine at odd ones, interleaved."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    column = torch.arange(dim, dtype=torch.float64)[None, :]
    angle = position / 10000.0 ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class SinusoidPositions(nn.Module):
    """Adds fixed position codes to (B, L, dim). The table is never saved."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoid_table(max_length, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, dim) -> (B, L, dim). Raises ValueError when L is above the table's length."""
        if x.shape[1] > len(self.table):
            raise ValueError(f"sequence of {x.shape[1]} tokens, but position codes end at {len(self.table)}")
        return x + self.table[: x.shape[1]].to(x.dtype)


def block_causal_mask(clips: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """Boolean (clips * tokens, clips * tokens), True = blocked: a token sees its own clip and earlier ones."""
    clip = torch.arange(clips, device=device).repeat_interleave(tokens)
    return clip[None, :] > clip[:, None]


def sequence_order(references: Tensor, target: Tensor) -> Tensor:
    """references (B, K, ...) nearest first, target (B, ...) -> (B, K+1, ...) farthest first, target last."""
    return torch.cat([references.flip(1), target[:, None]], dim=1)


class CAMA(nn.Module):
    """Transformer over `ref_K ... ref_1, target`, each block predicting its clip's motion tokens.

    A block's input is the motion of the clip before it (a learned start block for the first) plus its own
    appearance. The target's motion is therefore never an input.

    Args:
        appearance_resampler: appearance features (.., M, E) -> (.., tokens, width).
        width, depth, heads, ff_dim: sizes of the post-norm transformer (no final norm, no dropout).
        max_positions: length of the motion position codes, at least S * l.
        max_appearance_positions: length of the appearance position codes, which restart for each clip.

    Raises MotionRAGError unless appearance tokens have CAMA's width.
    """

    def __init__(
        self,
        appearance_resampler: Resampler,
        width: int = 1024,
        depth: int = 4,
        heads: int = 16,
        ff_dim: int = 4096,
        max_positions: int = 256,
        max_appearance_positions: int = 2560,
    ) -> None:
        super().__init__()
        if appearance_resampler.output_dim != width:
            raise MotionRAGError(
                f"appearance tokens have width {appearance_resampler.output_dim}, CAMA has {width}: set cama.width and "
                "cama.appearance_resampler.output_dim alike"
            )
        self.width = width
        self.tokens = appearance_resampler.tokens
        self.appearance_resampler = appearance_resampler
        self.sos = nn.Parameter(torch.randn(1, self.tokens, width) / width**0.5)
        self.motion_positions = SinusoidPositions(width, max_positions)
        self.appearance_positions = SinusoidPositions(width, max_appearance_positions)
        layer = nn.TransformerEncoderLayer(
            width, heads, ff_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=False
        )
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    @property
    def max_references(self) -> int:
        """Reference clips that the position codes suffice for, besides the target."""
        return len(self.motion_positions.table) // self.tokens - 1

    def appearance_tokens(self, features: Tensor) -> Tensor:
        """features (B, S, M, E) in sequence order -> appearance tokens with position codes (B, S*l, d)."""
        tokens = self.appearance_positions(
            self.appearance_resampler(rearrange(features, "b s m e -> (b s) m e"))
        )
        return rearrange(tokens, "(b s) l d -> b (s l) d", b=features.shape[0])

    def transformer_input(self, reference_motion: Tensor, appearance: Tensor) -> Tensor:
        """reference_motion (B, K, l, d) and appearance features (B, S, M, E), both in sequence order.

        Returns (B, S*l, d): motion shifted right by one clip, with position codes, plus appearance tokens.
        """
        batch, clips, tokens, width = reference_motion.shape
        if (tokens, width) != (self.tokens, self.width) or appearance.shape[:2] != (batch, clips + 1):
            raise ValueError(
                f"CAMA expects motion tokens (B, K, {self.tokens}, {self.width}) and appearance features "
                f"(B, K+1, M, E), got {tuple(reference_motion.shape)} and {tuple(appearance.shape)}"
            )
        motion = rearrange(reference_motion, "b k l d -> b (k l) d")
        motion = torch.cat([self.sos.to(motion.dtype).expand(batch, -1, -1), motion], dim=1)
        return self.motion_positions(motion) + self.appearance_tokens(appearance)

    def forward(
        self, reference_motion: Tensor, reference_appearance: Tensor, target_appearance: Tensor
    ) -> Tensor:
        """Predict the motion tokens of every clip.

        reference_motion (B, K, l, d) and reference_appearance (B, K, M, E) nearest first,
        target_appearance (B, M, E) -> (B, S, l, d), farthest reference first, target last.
        """
        appearance = sequence_order(reference_appearance, target_appearance)
        x = self.transformer_input(reference_motion.flip(1), appearance)
        mask = block_causal_mask(appearance.shape[1], self.tokens, x.device)
        # is_causal: said, since looking for it in the mask would wait for the device at every step
        x = self.transformer(x, mask, is_causal=False)
        return rearrange(x, "b (s l) d -> b s l d", l=self.tokens)

    def predict(
        self, reference_motion: Tensor, reference_appearance: Tensor, target_appearance: Tensor
    ) -> Tensor:
        """The target's motion tokens (B, l, d); arguments as in `forward`."""
        return self(reference_motion, reference_appearance, target_appearance)[:, -1]


def cama_losses(prediction: Tensor, truth: Tensor, target_only: bool = False) -> dict[str, Tensor]:
    """prediction and truth (B, S, l, d) in sequence order -> {"mse", "smooth_l1"}; only the first trains.

    `target_only` looks at the last block alone, as in validation.
    """
    if target_only:
        prediction, truth = prediction[:, -1], truth[:, -1]
    return {"mse": F.mse_loss(prediction, truth), "smooth_l1": F.smooth_l1_loss(prediction, truth)}
