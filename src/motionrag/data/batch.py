"""What the data side hands to the training modules."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class MotionBatch:
    """One batch; a field that a stage does not need is None.

    B clips, T frames, K reference clips (nearest first), N x D motion features of a clip, M x E appearance
    features of its first frame.
    """

    clip_id: list[str]
    captions: list[str]
    # Place of each clip in the endless training stream: what all randomness of its step is drawn from.
    position: list[int]
    video: Tensor | None = None  # (B, T, 3, H, W) float32 in [-1, 1]
    fps: Tensor | None = None  # (B,) float32, rate at which the frames were taken; None: spread over the clip
    latents: Tensor | None = (
        None  # (B, F, C, h, w) of the backbone's VAE; `video` is then the first frame alone
    )
    context: Tensor | None = None  # (B, L, E) of the backbone, for the caption and the first frame
    target_motion: Tensor | None = None  # (B, N, D) float32
    target_tokens: Tensor | None = None  # (B, l, d) float32, motion tokens in place of motion features
    target_appearance: Tensor | None = None  # (B, M, E) float32
    reference_id: list[list[str]] | None = None  # B x K
    reference_motion: Tensor | None = None  # (B, K, N, D) float32
    reference_tokens: Tensor | None = None  # (B, K, l, d) float32, as target_tokens
    reference_appearance: Tensor | None = None  # (B, K, M, E) float32
    # Clips that could not be read and were replaced by the next readable one, "id: reason".
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clip_id)

    def check(self) -> "MotionBatch":
        """Raise ValueError unless shapes, types and ranges are as documented; returns self."""
        size = len(self)
        if not size or len(self.captions) != size or len(self.position) != size:
            raise ValueError(
                f"batch of {size} clips with {len(self.captions)} captions, {len(self.position)} positions"
            )
        ranks = {
            "video": 5,
            "fps": 1,
            "latents": 5,
            "context": 3,
            "target_motion": 3,
            "target_tokens": 3,
            "target_appearance": 3,
            "reference_motion": 4,
            "reference_tokens": 4,
            "reference_appearance": 4,
        }
        for name, rank in ranks.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != rank or value.shape[0] != size or not value.is_floating_point():
                raise ValueError(
                    f"{name}: expected {rank} dimensions, {size} clips, floats; got {tuple(value.shape)} {value.dtype}"
                )
        if self.video is not None and (self.video.shape[2] != 3 or self.video.abs().max() > 1 + 1e-4):
            raise ValueError(f"video must be (B, T, 3, H, W) in [-1, 1], got {tuple(self.video.shape)}")
        pairs = [
            ("motion", self.reference_motion, self.target_motion),
            ("appearance", self.reference_appearance, self.target_appearance),
        ]
        for name, references, target in pairs:
            if references is not None and target is not None and references.shape[2:] != target.shape[1:]:
                raise ValueError(
                    f"{name} features differ: {tuple(references.shape)} and {tuple(target.shape)}"
                )
        if self.reference_motion is not None and self.reference_appearance is not None:
            counts = self.reference_motion.shape[1], self.reference_appearance.shape[1]
            if counts[0] != counts[1]:
                raise ValueError(f"{counts[0]} reference motions but {counts[1]} reference appearances")
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> "MotionBatch":
        """The batch with `function` applied to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MotionBatch":
        """The batch on another device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MotionBatch":
        """The batch in pinned memory (called by the DataLoader when it pins)."""
        return self.map(Tensor.pin_memory)
