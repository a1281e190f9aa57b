"""What a backbone must offer so that training, generation and evaluation can use it.

Shapes: B batch, T frames, H x W pixels, F latent frames, C latent channels, h x w latent pixels, L context tokens,
D context width, n motion tokens, d token width. Pictures are float32 in [-1, 1].

Random numbers come from one `torch.Generator` for the batch, or from a list with one for each sample, whose draws then
do not depend on the batch it is in.

Inputs may come from any device: a backbone moves them to the network that reads them, and returns its results on the
denoiser's device.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from motionrag.modules.diffusion import Generators

RANDOM_WEIGHTS = "backbone {} has random weights: its videos and scores mean nothing, it is for checks alone"


@runtime_checkable
class Backbone(Protocol):
    """A frozen image-to-video diffusion model with attention layers that a motion adapter can enter.

    Attributes:
        name: what results and checkpoints call it.
        frames, height, width, fps: the clips it takes and makes.
        denoiser: the network that predicts; always frozen and in eval mode.
        device, dtype: of the denoiser's weights.
        random_weights: True when no trained weights were loaded; runs say so.
        random_frame: True when training conditions on a frame drawn from the clip, False for the first frame.
        adapter_query: what should ask for motion at the adapter's sites: "output", the attention output, or "hidden",
            the attention's input, where the cross-attention reads a single token and its output is one constant (SVD).
    """

    name: str
    frames: int
    height: int
    width: int
    fps: float
    denoiser: nn.Module
    random_weights: bool
    random_frame: bool
    adapter_query: str

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def to(self, device: torch.device | str) -> "Backbone":
        """Move the denoiser and the autoencoder, which every video needs."""

    def autoencoder_to(self, device: torch.device | str) -> "Backbone":
        """Move the autoencoder, which training may do without once all latents are known."""

    def encoders_to(self, device: torch.device | str) -> "Backbone":
        """Move the encoders behind `encode_context` and `null_context`, which may leave once these are known."""

    def encode_video(self, video: Tensor) -> Tensor:
        """Video (B, T, 3, H, W) -> scaled latents (B, F, C, h, w) float32; the same every time."""

    def encode_image(
        self, image: Tensor, generator: Generators = None, noise_level: Tensor | None = None
    ) -> Tensor:
        """Condition frames (B, 3, H, W) -> condition latents (B, 1, C, h, w) float32.

        `noise_level` (B,) is the deviation of the noise that is added to the pixels first; None: no noise, the same
        every time.
        """

    def image_noise_level(self, batch: int, generator: Generators = None) -> Tensor | None:
        """Noise levels (B,) of condition images as training draws them; None for a backbone that adds none."""

    def encode_context(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """All that the attention layers read besides motion: (B, L, D), a row for each clip whatever its batch.

        From prompts, condition frames (B, 3, H, W) or both. No random numbers: a clip's context can be kept.
        """

    def null_context(self, images: Tensor) -> Tensor:
        """The context of the unconditional half of guidance (B, L, D), for condition frames (B, 3, H, W)."""

    def drop_conditions(
        self, context: Tensor, image_latents: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Leave out conditions of some samples, as guidance needs it in training: (context, image latents).

        Which, and how often, is the backbone's own rule; the choice is made for each sample. Arguments stay as they
        are.
        """

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        """Name -> attention module; each has `heads` and an output projection `to_out[0]`."""

    def loss(
        self,
        latents: Tensor,
        image_latents: Tensor,
        context: Tensor,
        generator: Generators = None,
        noise_level: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> Tensor:
        """The backbone's own diffusion loss, a scalar; reads whatever motion tokens the attached adapter holds.

        `noise_level` (B,) is the one that `image_latents` were encoded with; `fps` (B,) each clip's frame rate, for
        networks that are told it, None where it has none of its own.
        """

    def sample(
        self,
        image: Tensor,
        context: Tensor,
        null_context: Tensor,
        *,
        steps: int,
        guidance: float,
        seeds: Sequence[int],
        motion: "MotionInput | None" = None,
        progress: bool = False,
    ) -> Tensor:
        """First frames (B, 3, H, W) and contexts (B, L, D) -> video (B, T, 3, H, W) float32 in [-1, 1].

        One seed for each sample, so that its noise does not depend on its batch. Guidance 1 runs the conditional half
        alone and never reads `null_context`.
        """


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
