"""CogVideoX image-to-video (diffusers classes): `THUDM/CogVideoX-5b-I2V`, or the tiny one that ships.

Both are read from a folder (or hub id) in diffusers' layout: vae/, transformer/, scheduler/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import get_resize_crop_region_for_grid
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from motionrag.backbones.base import MotionInput
from motionrag.backbones.parts import LatentModel, precision, read_parts, tile_overlap
from motionrag.backbones.sampling import denoising, generators
from motionrag.encoders import CaptionEncoder, resolve_weights
from motionrag.errors import MotionRAGError
from motionrag.modules.diffusion import (
    Generators,
    add_noise,
    first_frame_condition,
    for_each,
    image_noise_sigma,
    v_loss,
)  # fmt: skip

SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    set_alpha_to_one=True, clip_sample=False, steps_offset=0,
)  # fmt: skip
SAMPLERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}
TINY_VAE = dict(
    block_out_channels=(8, 32, 64), down_block_types=("CogVideoXDownBlock3D",) * 3,
    up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=16, layers_per_block=1, norm_num_groups=4,
    temporal_compression_ratio=2, sample_height=32, sample_width=32,
)  # fmt: skip
TINY_TRANSFORMER = dict(
    num_attention_heads=5, attention_head_dim=32, in_channels=32, out_channels=16, time_embed_dim=96,
    text_embed_dim=384, num_layers=5, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
    temporal_compression_ratio=2, max_text_seq_length=24, use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True, spatial_interpolation_scale=1.0,
)  # fmt: skip


class T5Text(nn.Module):
    """The text encoder of the full model: T5 states of all `max_length` tokens, padding included.

    path: folder or hub id with tokenizer/ and text_encoder/. Raises MotionRAGError if something is missing.
    """

    def __init__(self, path: str, max_length: int = 226, dtype: str = "float32"):
        from transformers import AutoTokenizer, T5EncoderModel

        super().__init__()
        self.max_length = max_length
        (self.model,) = read_parts(path, dtype, text_encoder=T5EncoderModel)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(resolve_weights(path), subfolder="tokenizer")
        except (OSError, ValueError) as error:
            raise MotionRAGError(f"backbone {path!r} has no readable tokenizer/: copy it again") from error
        self.model.eval()
        self.model.requires_grad_(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, max_length, 4096)."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.model(ids.to(self.model.device)).last_hidden_state


class SentenceText(nn.Module):
    """Token states of the sentence encoder, in place of T5 for the tiny model: no small T5 works offline."""

    def __init__(self, encoder: CaptionEncoder | None = None, max_length: int = 24):
        super().__init__()
        self.encoder, self.max_length = encoder or CaptionEncoder(), max_length

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, max_length, 384), zeros where there is no token."""
        states, mask = self.encoder.tokens(list(prompts), self.max_length)
        return states * mask[..., None]


def adapter_sites(transformer: CogVideoXTransformer3DModel) -> dict[str, nn.Module]:
    """The joint attention of every block, by name."""
    return {f"transformer_blocks.{i}.attn1": b.attn1 for i, b in enumerate(transformer.transformer_blocks)}


class CogVideoX(LatentModel):
    """The frozen CogVideoX image-to-video model behind the `Backbone` protocol.

    Args:
        vae, transformer, scheduler: diffusers models; put into eval mode and frozen.
        text: callable, prompts -> text states; an nn.Module is moved by `encoders_to`.
        frames, fps: clip length and rate it is used with; the picture size is the VAE's.
        name: what results and checkpoints call it.
        min_timestep: lowest time step that training draws. Motion is decided at high noise, so a short Stage 1 learns
            more from there; 0 is the reference.
        text_dropout: share of training samples that see the empty prompt.
        reference_quirks: two oddities of the reference. In inference CAMA sees the target image in [0, 1] beside
            references in [-1, 1]; in training all condition images of a batch get one noise level.
        vae_tiling: let the autoencoder work on tiles, for less memory; blends their seams, so pixels differ a little.
        sampler: "dpm", which draws new noise at every step, is the reference's; "ddim" draws none and keeps outlines
            in fewer steps where the network is small. Both are diffusers' for CogVideoX.
        random_weights: no trained weights were loaded.

    Raises MotionRAGError for an unknown sampler and for `frames` that do not fit the autoencoder.
    """

    adapter_query = "output"
    random_frame = False

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel,
        scheduler: CogVideoXDPMScheduler | CogVideoXDDIMScheduler,
        text: Callable[[Sequence[str]], Tensor],
        frames: int,
        fps: float = 8.0,
        name: str = "cogvideox",
        min_timestep: int = 0,
        text_dropout: float = 0.15,
        reference_quirks: bool = False,
        vae_tiling: bool = False,
        sampler: str = "dpm",
        random_weights: bool = False,
    ):
        if sampler not in SAMPLERS:
            raise MotionRAGError(f"sampler={sampler}: expected {' or '.join(SAMPLERS)}")
        self.vae, self.denoiser, self.text = vae, transformer, text
        self.scheduler = SAMPLERS[sampler].from_config(scheduler.config)
        self.frames, self.fps, self.name, self.min_timestep = frames, fps, name, min_timestep
        self.text_dropout, self.random_weights = text_dropout, random_weights
        self.reference_quirks = reference_quirks
        self._empty_prompt: Tensor | None = None
        self.spatial = 2 ** (len(vae.config.block_out_channels) - 1)
        self.height = transformer.config.sample_height * self.spatial
        self.width = transformer.config.sample_width * self.spatial
        if (frames - 1) % vae.config.temporal_compression_ratio:
            raise MotionRAGError(
                f"backbone {name}: frames={frames}, expected 1 + a multiple of {vae.config.temporal_compression_ratio}"
            )
        for module in (vae, transformer):
            module.eval().requires_grad_(False)
        if vae_tiling:
            vae.enable_tiling(
                tile_overlap_factor_height=tile_overlap(vae.tile_latent_min_height, self.spatial, 1 / 6),
                tile_overlap_factor_width=tile_overlap(vae.tile_latent_min_width, self.spatial, 1 / 5),
            )

    @classmethod
    def load(
        cls, path: str, text: Callable[[Sequence[str]], Tensor] | None = None, frames: int = 17, fps: float = 8.0,
        dtype: str = "float32", **options,
    ) -> CogVideoX:  # fmt: skip
        """Read vae/, transformer/ and scheduler/ from a folder, `pkg:NAME` or hub id.

        `text` defaults to the T5 of the same place; `options` are those of the class. Raises MotionRAGError if
        something is missing.
        """
        parts = read_parts(
            path,
            dtype,
            vae=AutoencoderKLCogVideoX,
            transformer=CogVideoXTransformer3DModel,
            scheduler=CogVideoXDPMScheduler,
        )
        return cls(*parts, text or T5Text(path, dtype=dtype), frames, fps, **options)

    @classmethod
    def tiny(
        cls, seed: int = 0, text: Callable[[Sequence[str]], Tensor] | None = None, dtype: str = "float32",
        reference_quirks: bool = False, **transformer,
    ) -> CogVideoX:  # fmt: skip
        """The architecture of the shipped tiny model with random weights; for tests. Sizes can be overridden."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = AutoencoderKLCogVideoX(**TINY_VAE)
            denoiser = CogVideoXTransformer3DModel(**TINY_TRANSFORMER | transformer)
        return cls(
            vae.to(precision(dtype)),
            denoiser.to(precision(dtype)),
            CogVideoXDPMScheduler(**SCHEDULER),
            text or SentenceText(),
            9,
            name="cogvideox_tiny",
            reference_quirks=reference_quirks,
            random_weights=True,
        )

    # --- encoding --------------------------------------------------------------------------------------------------

    def encoders_to(self, device: torch.device | str) -> CogVideoX:
        """Move the text encoder."""
        if isinstance(self.text, nn.Module):
            self.text.to(device)
        return self

    def _encode(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> scaled latents (B, F, C, h, w): the posterior's mode."""
        video = video.transpose(1, 2).to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(video).latent_dist
        latents = posterior.mode().transpose(1, 2) * self.vae.config.scaling_factor
        return latents.float().to(self.device)

    def image_noise_level(self, batch: int, generator: Generators = None) -> Tensor:
        """exp(N(-3, .5)) for each image, (B,); with `reference_quirks` one for all."""
        levels = image_noise_sigma(batch, generator)
        return levels[:1].expand(batch) if self.reference_quirks else levels

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D)."""
        return self.text(prompts).to(self.device)

    def encode_context(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """The text states (B, L, D); images have no part in them."""
        return self.encode_text(prompts)

    def null_context(self, images: Tensor) -> Tensor:
        """The text states of the empty prompt (B, L, D), computed once."""
        if self._empty_prompt is None:
            self._empty_prompt = self.encode_text([""])
        return self._empty_prompt.to(self.device).expand(len(images), -1, -1)

    def drop_conditions(
        self, context: Tensor, image_latents: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """The empty prompt for a share `text_dropout` of the samples; the image always stays."""
        drop = for_each(torch.rand, len(context), generator, dtype=torch.float32) < self.text_dropout
        empty = self.null_context(image_latents).to(context)
        return torch.where(drop.to(context.device)[:, None, None], empty, context), image_latents

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        """The joint attention of every block."""
        return adapter_sites(self.denoiser)

    # --- training --------------------------------------------------------------------------------------------------

    def rotary(self, latent_frames: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin tables (F*h*w/p^2, head width), as diffusers' pipeline makes them."""
        config = self.denoiser.config
        if not config.use_rotary_positional_embeddings:
            return None
        grid = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        return get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim, crops_coords=get_resize_crop_region_for_grid(grid, grid[1], grid[0]),
            grid_size=grid, temporal_size=latent_frames, device=self.device,
        )  # fmt: skip

    def predict(self, latents: Tensor, image_latents: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, F, C, h, w) and conditions -> predicted velocity of that shape."""
        return self.denoiser(
            hidden_states=first_frame_condition(latents, image_latents).to(self.dtype),
            encoder_hidden_states=context.to(self.dtype), timestep=timesteps,
            image_rotary_emb=self.rotary(latents.shape[1]), return_dict=False,
        )[0]  # fmt: skip

    def loss(
        self, latents: Tensor, image_latents: Tensor, context: Tensor,
        generator: Generators = None, noise_level: Tensor | None = None, fps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """v-prediction MSE at uniform time steps from `min_timestep` on, a scalar.

        Equals the reference's weighted x0 loss when `min_timestep` is 0. Neither the image's noise level nor the frame
        rate is told to the network.
        """
        steps = self.scheduler.config.num_train_timesteps
        uniform = partial(torch.randint, self.min_timestep, steps)
        timesteps = for_each(uniform, len(latents), generator).to(latents.device)
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        abar = self.scheduler.alphas_cumprod.to(latents.device)[timesteps]
        velocity = self.predict(add_noise(latents, noise, abar), image_latents, context, timesteps)
        return v_loss(velocity, latents, noise, abar)

    # --- sampling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, image: Tensor, context: Tensor, null_context: Tensor, *, steps: int = 25, guidance: float = 3.0,
        seeds: Sequence[int] = (0,), motion: MotionInput | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """First frames (B, 3, H, W), contexts (B, L, D) -> (B, T, 3, H, W) in [-1, 1].

        Each sample has its own seed, so its noise does not depend on its batch. The guided order is
        [unconditional, conditional]; guidance 1 runs the conditional half alone.
        """
        noise_of = generators(seeds, image)
        image_latents = self.encode_image(image)
        frames = (self.frames - 1) // self.vae.config.temporal_compression_ratio + 1
        shape = (len(image), frames, *image_latents.shape[2:])
        latents = randn_tensor(shape, noise_of, self.device, torch.float32)
        guided = guidance != 1
        if guided:
            context = torch.cat([null_context.expand_as(context), context])
            image_latents = torch.cat([image_latents] * 2)
        self.scheduler.set_timesteps(steps, device=self.device)
        timesteps, previous = self.scheduler.timesteps, None
        with motion.use(guided) if motion else nullcontext():
            for i, t in denoising(enumerate(timesteps), timesteps, progress):
                both = torch.cat([latents] * 2) if guided else latents
                velocity = self.predict(both, image_latents, context, t.expand(len(both))).float()
                if guided:
                    without, with_ = velocity.chunk(2)
                    velocity = without + guidance * (with_ - without)
                if isinstance(self.scheduler, CogVideoXDDIMScheduler):
                    latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                else:
                    latents, previous = self.scheduler.step(
                        velocity, previous, t, timesteps[i - 1] if i else None, latents, generator=noise_of,
                        return_dict=False,
                    )  # fmt: skip
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) -> video (B, T, 3, H, W), clamped to [-1, 1]."""
        latents = latents.transpose(1, 2).to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.transpose(1, 2).float().clamp(-1, 1).to(self.device)
