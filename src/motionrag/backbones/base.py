"""What a backbone must offer so that training, generation and evaluation can use it.

Shapes: B batch, T frames, H x W pixels, F latent frames, C latent channels, h x w latent pixels, L text tokens,
n motion tokens, d token width. Pictures are float32 in [-1, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Backbone(Protocol):
    """A frozen image-to-video diffusion model with attention layers that a motion adapter can enter."""

    name: str
    frames: int
    height: int
    width: int
    fps: float
    denoiser: nn.Module

    def to(self, device: torch.device | str) -> "Backbone":
        """Move the denoiser and the autoencoder."""

    def encode_video(self, video: Tensor) -> Tensor:
        """Video (B, T, 3, H, W) -> scaled latents (B, F, C, h, w)."""

    def encode_image(
        self, image: Tensor, generator: torch.Generator | None = None, noisy: bool = False
    ) -> Tensor:
        """First frame (B, 3, H, W) -> scaled condition latents (B, 1, C, h, w), with training noise if `noisy`."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text states (B, L, D)."""

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        """Name -> attention module; each has `heads` and an output projection `to_out[0]`."""

    def loss(
        self, latents: Tensor, image_latents: Tensor, text: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The backbone's own diffusion loss, a scalar; reads whatever motion tokens the attached adapter holds."""

    def sample(
        self,
        image: Tensor,
        text: Tensor,
        null_text: Tensor,
        *,
        steps: int,
        guidance: float,
        seeds: Sequence[int],
        motion: "MotionInput | None" = None,
        progress: bool = False,
    ) -> Tensor:
        """First frames (B, 3, H, W) and text states -> video (B, T, 3, H, W), one seed for each sample."""


class MotionInput:
    """Motion tokens for sampling, with the adapter that carries them into the backbone.

    Attributes:
        adapter: an adapter that is attached to the backbone.
        tokens: (B, n, d), one set for each sample.
        null_tokens: (1, n, d), for the unconditional half of guidance.
        scale: motion scale; 0 is the bare backbone.
    """

    def __init__(self, adapter, tokens: Tensor, null_tokens: Tensor, scale: float = 1.0):
        self.adapter, self.tokens, self.null_tokens, self.scale = adapter, tokens, null_tokens, scale

    def use(self, guided: bool):
        """Context in which the backbone sees the tokens; for guidance ordered [unconditional, conditional]."""
        tokens = self.tokens
        if guided:
            tokens = torch.cat([self.null_tokens.expand_as(tokens), tokens])
        return self.adapter.use(tokens, self.scale)
