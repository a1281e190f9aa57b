"""Stable Video Diffusion, image to video (diffusers classes): `stabilityai/stable-video-diffusion-img2vid`, or tiny.

Read from a folder (or hub id) in diffusers' layout: vae/, image_encoder/, unet/, scheduler/. It takes no text: its
attention layers read the CLIP embedding of the first frame, a single token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    UNetSpatioTemporalConditionModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from motionrag.backbones.base import MotionInput
from motionrag.backbones.parts import LatentModel, precision, read_parts
from motionrag.backbones.sampling import denoising, generators
from motionrag.errors import MotionRAGError
from motionrag.modules.diffusion import (
    Generators,
    edm_loss,
    edm_scalings,
    edm_sigma,
    image_noise_sigma,
)

SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", sigma_min=0.002,
    sigma_max=700.0, use_karras_sigmas=True, prediction_type="v_prediction", timestep_type="continuous",
    timestep_spacing="leading", steps_offset=1,
)  # fmt: skip
TINY_VAE = dict(
    block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
    latent_channels=4, sample_size=32,
)  # fmt: skip
TINY_IMAGE_ENCODER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=32,
    projection_dim=32,
)  # fmt: skip
TINY_UNET = dict(
    in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4),
    cross_attention_dim=32, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=9,
)  # fmt: skip


def resize_for_clip(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), blurred and distorted just as diffusers' pipeline does before CLIP."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its module warns of an image processor that is not used here
    try:
        from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as pipeline
    finally:
        logging.set_verbosity(verbosity)
    return pipeline._resize_with_antialiasing(images, (size, size))


def adapter_sites(unet: UNetSpatioTemporalConditionModel) -> dict[str, nn.Module]:
    """The spatial cross-attention of every block, by name; the temporal ones stay as they are."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and ".transformer_blocks." in name
    }


class SVD(LatentModel):
    """The frozen Stable Video Diffusion model behind the `Backbone` protocol.

    The adapter's sites are all spatial cross-attentions (`attn2`, 16 at full size). Each reads one image token, so its
    output is one constant for a sample; `adapter_query` "hidden" lets every place ask for its own motion, "output" is
    the published code.

    Args:
        vae, image_encoder, unet, scheduler: diffusers and transformers models; put into eval mode and frozen.
        frames, height, width, fps: the clips it is used with.
        fps_id, motion_bucket, noise_aug: what SVD is told besides the image: frame rate less one, amount of motion,
            and in sampling the noise that is added to the image.
        min_guidance: guidance scale of the first frame; it rises to that of the sampling at the last.
        adapter_query: see above.
        vae_chunk: frames that the autoencoder handles at once; null: all. Less memory; decoded frames then see no
            others beyond their chunk.
        name: what results and checkpoints call it.
        random_weights: no trained weights were loaded.

    Raises MotionRAGError for a picture size that the networks cannot take.
    """

    random_frame = False

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNetSpatioTemporalConditionModel,
        scheduler: EulerDiscreteScheduler,
        frames: int = 16,
        height: int = 576,
        width: int = 1024,
        fps: float = 8.0,
        fps_id: int = 6,
        motion_bucket: int = 127,
        noise_aug: float = 0.02,
        min_guidance: float = 1.0,
        adapter_query: Literal["output", "hidden"] = "hidden",
        vae_chunk: int | None = None,
        name: str = "svd",
        random_weights: bool = False,
    ):
        self.vae, self.image_encoder, self.denoiser, self.scheduler = vae, image_encoder, unet, scheduler
        self.frames, self.height, self.width, self.fps = frames, height, width, fps
        self.fps_id, self.motion_bucket, self.noise_aug = fps_id, motion_bucket, noise_aug
        self.min_guidance = min_guidance
        self.adapter_query, self.vae_chunk = adapter_query, vae_chunk
        self.name, self.random_weights = name, random_weights
        multiple = 2 ** (len(vae.config.block_out_channels) + len(unet.config.block_out_channels) - 2)
        if height % multiple or width % multiple:
            raise MotionRAGError(
                f"backbone {name}: height={height}, width={width}, expected multiples of {multiple}"
            )
        for module in (vae, image_encoder, unet):
            module.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str, dtype: str = "float32", **options) -> SVD:
        """Read vae/, image_encoder/, unet/ and scheduler/ from a folder or hub id; `options` are those of the class.

        Raises MotionRAGError if something is missing.
        """
        parts = read_parts(
            path,
            dtype,
            vae=AutoencoderKLTemporalDecoder,
            image_encoder=CLIPVisionModelWithProjection,
            unet=UNetSpatioTemporalConditionModel,
            scheduler=EulerDiscreteScheduler,
        )
        return cls(*parts, **options)

    @classmethod
    def tiny(cls, seed: int = 0, dtype: str = "float32", **options) -> SVD:
        """The architecture at toy size (9 x 32 x 32) with random weights of a fixed seed; for tests and dry runs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = AutoencoderKLTemporalDecoder(**TINY_VAE)
            image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY_IMAGE_ENCODER))
            unet = UNetSpatioTemporalConditionModel(**TINY_UNET)
        for network in (vae, image_encoder, unet):
            network.to(precision(dtype))
        sizes = {"frames": 9, "height": 32, "width": 32, "name": "svd_tiny", "random_weights": True}
        return cls(vae, image_encoder, unet, EulerDiscreteScheduler(**SCHEDULER), **sizes | options)

    # --- encoding --------------------------------------------------------------------------------------------------

    def encoders_to(self, device: torch.device | str) -> SVD:
        """Move the image encoder."""
        self.image_encoder.to(device)
        return self

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [-1, 1] -> scaled latents (B, T, C, h, w): the posterior's mode of each frame."""
        return super().encode_video(video) * self.vae.config.scaling_factor

    def _encode(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> latents (B, T, C, h, w), not scaled, as the network takes an image's; `vae_chunk` frames
        at once."""
        frames = video.flatten(0, 1).to(self.vae.device, self.vae.dtype)
        chunks = frames.split(self.vae_chunk or len(frames))
        latents = torch.cat([self.vae.encode(chunk).latent_dist.mode() for chunk in chunks])
        return latents.unflatten(0, video.shape[:2]).float().to(self.device)

    def image_noise_level(self, batch: int, generator: Generators = None) -> Tensor:
        """exp(N(-3, .5)) for each image, (B,)."""
        return image_noise_sigma(batch, generator)

    @torch.no_grad()
    def encode_context(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """CLIP embeddings (B, 1, D) of images (B, 3, H, W) in [-1, 1]; prompts have no part in them."""
        encoder = self.image_encoder
        pixels = resize_for_clip(images.float(), encoder.config.image_size)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = ((pixels + 1) / 2 - mean) / std
        embeds = encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds
        return embeds[:, None].float().to(self.device)

    def null_context(self, images: Tensor) -> Tensor:
        """Zeros (B, 1, D): no image."""
        return torch.zeros(len(images), 1, self.denoiser.config.cross_attention_dim, device=self.device)

    def drop_conditions(
        self, context: Tensor, image_latents: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Nothing is dropped, as in the reference: the unconditional half of guidance comes with the weights."""
        return context, image_latents

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        """The spatial cross-attention of every block."""
        return adapter_sites(self.denoiser)

    # --- training --------------------------------------------------------------------------------------------------

    def predict(
        self,
        scaled: Tensor,
        image_latents: Tensor,
        context: Tensor,
        c_noise: Tensor,
        noise_level: Tensor | float,
    ) -> Tensor:
        """The network's raw output (B, T, C, h, w).

        scaled: noisy latents times c_in, (B, T, C, h, w). image_latents: (B, 1, C, h, w). c_noise: (B,) or a scalar.
        noise_level: (B,) or a number.
        """
        ids = torch.empty(len(scaled), 3, device=scaled.device, dtype=torch.float32)
        ids[:, 0], ids[:, 1], ids[:, 2] = self.fps_id, self.motion_bucket, noise_level
        images = image_latents.to(scaled).expand(-1, scaled.shape[1], -1, -1, -1)
        return self.denoiser(
            torch.cat([scaled, images], dim=2).to(self.dtype), c_noise,
            encoder_hidden_states=context.to(self.dtype), added_time_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    def denoise(
        self, noisy: Tensor, sigma: Tensor, image_latents: Tensor, context: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Latents (B, T, C, h, w) with noise of level sigma (B,) -> clean latents float32, by EDM preconditioning."""
        c_skip, c_out, c_in, c_noise = (c.reshape(-1, 1, 1, 1, 1) for c in edm_scalings(sigma))
        level = 0.0 if noise_level is None else noise_level.to(noisy)
        output = self.predict(c_in * noisy, image_latents, context, c_noise.flatten(), level)
        return c_skip * noisy + c_out * output.float()

    def loss(
        self, latents: Tensor, image_latents: Tensor, context: Tensor,
        generator: Generators = None, noise_level: Tensor | None = None, fps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The EDM loss at sigma = exp(N(.7, 1.6)), a scalar. The network is told `fps_id`, never a clip's own rate."""
        sigma = edm_sigma(len(latents), generator).to(latents)
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        noisy = latents + sigma.reshape(-1, 1, 1, 1, 1) * noise
        return edm_loss(self.denoise(noisy, sigma, image_latents, context, noise_level), latents, sigma)

    # --- sampling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, image: Tensor, context: Tensor, null_context: Tensor, *, steps: int = 25, guidance: float = 3.0,
        seeds: Sequence[int] = (0,), motion: MotionInput | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Euler sampling. First frames (B, 3, H, W), contexts (B, 1, D) -> (B, T, 3, H, W) in [-1, 1].

        Guidance rises from `min_guidance` at the first frame to `guidance` at the last. Its unconditional half sees neither
        context nor image latents; the order is [unconditional, conditional].
        """
        noise_of = generators(seeds, image)
        level = torch.full((len(image),), self.noise_aug)
        image_latents = self.encode_image(image.to(self.device), noise_of, level)
        self.scheduler.set_timesteps(steps, device=self.device)
        shape = (len(image), self.frames, *image_latents.shape[2:])
        latents = randn_tensor(shape, noise_of, self.device, torch.float32)
        latents = latents * self.scheduler.init_noise_sigma
        guided = (self.min_guidance, guidance) != (1, 1)
        if guided:
            context = torch.cat([null_context, context])
            image_latents = torch.cat([torch.zeros_like(image_latents), image_latents])
            weight = torch.linspace(self.min_guidance, guidance, self.frames, device=self.device).reshape(
                -1, 1, 1, 1
            )
        timesteps = self.scheduler.timesteps
        with motion.use(guided) if motion else nullcontext():
            for t in denoising(timesteps, timesteps, progress):
                both = torch.cat([latents] * 2) if guided else latents
                scaled = self.scheduler.scale_model_input(both, t)
                output = self.predict(scaled, image_latents, context, t, self.noise_aug).float()
                if guided:
                    without, with_ = output.chunk(2)
                    output = without + weight * (with_ - without)
                latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, T, C, h, w) -> video (B, T, 3, H, W), clamped to [-1, 1]."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        frames = [
            self.vae.decode(chunk.flatten(0, 1), num_frames=chunk.shape[1]).sample.unflatten(
                0, chunk.shape[:2]
            )
            for chunk in latents.split(self.vae_chunk or self.frames, dim=1)
        ]
        return torch.cat(frames, dim=1).float().clamp(-1, 1).to(self.device)
