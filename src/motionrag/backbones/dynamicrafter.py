"""DynamiCrafter image-to-video (Xing et al., arXiv 2310.12190): `Doubiiu/DynamiCrafter_1024`, or a tiny random one.

The UNet is in `dynamicrafter_unet`; here are objective, conditions and sampling. Shapes: B batch, T frames, C latent
channels, h x w latent pixels, L text tokens, l image tokens of a frame, D their width. Latents are (B, T, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from motionrag.backbones.base import MotionInput
from motionrag.backbones.cogvideox import SentenceText
from motionrag.backbones.dynamicrafter_encoders import (
    CLIP_IMAGE,
    CLIP_TEXT,
    CLIPImage,
    CLIPText,
    ImageResampler,
)
from motionrag.backbones.dynamicrafter_unet import TINY_UNET, DynamiCrafterUNet
from motionrag.backbones.dynamicrafter_weights import load_checkpoint
from motionrag.backbones.parts import LatentModel, precision, read_parts, tile_overlap
from motionrag.backbones.sampling import denoising, generators
from motionrag.encoders import resolve_weights
from motionrag.errors import MotionRAGError
from motionrag.modules.ddim import Prediction, Schedule, Spacing, Step, ddim_step, guide
from motionrag.modules.diffusion import Generators, add_noise, for_each, v_loss

TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=2, norm_num_groups=32,
    scaling_factor=0.18215, sample_size=512,
)  # fmt: skip
TINY_VAE = VAE | dict(
    block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=16
)  # fmt: skip
TINY_IMAGE_RESAMPLER = dict(
    dim=32, depth=1, dim_head=16, heads=2, num_queries=2, embedding_dim=32, output_dim=384
)
TINY_CLIP_IMAGE = CLIP_IMAGE | dict(
    image_size=32, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
)  # fmt: skip


def local_folder(path: str) -> Path:
    """`path` itself, or where the hub's copy of it is. Raises MotionRAGError if there is no such place."""
    folder = Path(resolve_weights(path))
    if folder.exists():
        return folder
    try:
        return Path(
            snapshot_download(path, allow_patterns=["model.ckpt", "*/*.json", "*/*.safetensors", "*/*.txt"])
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MotionRAGError(
            f"backbone {path!r} cannot be loaded ({reason}); expected a folder or hub id with model.ckpt, or with "
            "unet/, vae/, image_encoder/ and image_resampler/"
        ) from error


def read_checkpoint(
    file: Path, with_text: bool, sizes: Mapping[str, Mapping[str, Any]], frames: int, dtype: str
) -> dict[str, nn.Module]:
    """The networks of a published model.ckpt, by name; `sizes` override the 576 x 1024 model's."""
    wanted = precision(dtype)

    def size(name: str, default: Mapping[str, Any]) -> dict[str, Any]:
        return {**default, **sizes.get(name, {})}

    with torch.device("meta"):  # nothing is drawn at random only to be replaced
        parts = {
            "unet": DynamiCrafterUNet(**size("unet", {})),
            "vae": AutoencoderKL(**size("vae", VAE)),
            "image_resampler": ImageResampler(**size("image_resampler", {"video_length": frames})),
            "image_encoder": CLIPVisionModel(CLIPVisionConfig(**size("image_encoder", CLIP_IMAGE))),
        }
        if with_text:
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**size("text_encoder", CLIP_TEXT)))
    names = {"text_encoder": "text"}  # in the table of `dynamicrafter_weights`
    load_checkpoint(file, **{names.get(name, name): part for name, part in parts.items()})
    for part in parts.values():
        if isinstance(part, CLIPTextModel | CLIPVisionModel):  # a count that no file holds
            places = part.embeddings.position_ids.shape[-1]
            part.embeddings.position_ids = torch.arange(places)[None]
        part.to(wanted)
    return parts


def dropped(draws: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which samples lose their text and which their image, from uniform draws (B,): two masks (B,) bool.

    A `share` of all loses the text alone, one both, one the image alone.
    """
    return draws < 2 * share, (share <= draws) & (draws < 3 * share)


def drop(states: Tensor, null: Tensor, mask: Tensor) -> Tensor:
    """states (B, ...) with `null` (1 or B, ...) where mask (B,) is True."""
    return torch.where(mask.to(states.device).reshape(-1, *[1] * (states.ndim - 1)), null.to(states), states)


def with_image(latents: Tensor, image_latents: Tensor) -> Tensor:
    """Condition latents (B, 1 or T, C, h, w) behind the channels of latents (B, T, C, h, w), the same in all frames."""
    return torch.cat([latents, image_latents.to(latents).expand_as(latents)], dim=2)


@dataclass(frozen=True)
class Denoised:
    """What a sampling step leaves.

    Attributes:
        t: the time step it started from.
        latents: (B, T, C, h, w) after it.
        x0: the clean latents that the network implies, of the same shape.
        predictions: of the UNet, each of that shape: unconditional, with image guidance image alone, conditional.
    """

    t: int
    latents: Tensor
    x0: Tensor
    predictions: tuple[Tensor, ...]


class DynamiCrafter(LatentModel):
    """The frozen DynamiCrafter behind the `Backbone` protocol.

    Args:
        vae: diffusers' autoencoder, applied to single frames.
        unet: the denoiser.
        text: callable, prompts -> text states (B, L, D); an nn.Module is moved by `encoders_to`.
        image_encoder: images -> (B, N, D_in).
        image_resampler: these -> the image tokens of all frames (B, T*l, D).
        schedule: noise levels and dynamic rescale.
        frames, height, width, fps: clips it is used with.
        name: what results and checkpoints call it.
        prediction: what the UNet predicts, "v", or "noise" (256 x 256 model).
        training_fs, sampling_fs: the frame-rate condition; in training if None each clip's own rate, or `fps` where a
            clip has none. The reference's 15 in sampling is not a rate that it trains with.
        spacing, eta: of DDIM sampling; "uniform" is the reference's, see `Schedule.steps`.
        guidance_rescale: see `guide`; 0 is the reference's.
        image_guidance: guidance scale of the image, apart from the text's; None: one scale for both. Motion goes with
            the text.
        random_frame: condition training on a frame drawn from the clip (the reference) instead of the first.
        condition_dropout: share of training samples that lose the text alone; as many lose the image alone, or both.
        vae_tiling: let the autoencoder work on tiles, for less memory; blends their seams, so pixels differ a little.
        random_weights: no trained weights were loaded.
    """

    adapter_query = "output"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: DynamiCrafterUNet,
        text: Callable[[Sequence[str]], Tensor],
        image_encoder: CLIPImage,
        image_resampler: ImageResampler,
        schedule: Schedule,
        frames: int = 16,
        height: int = 576,
        width: int = 1024,
        fps: float = 10.0,
        name: str = "dynamicrafter",
        prediction: Prediction = "v",
        training_fs: int | None = None,
        sampling_fs: int = 15,
        spacing: Spacing = "trailing",
        eta: float = 1.0,
        guidance_rescale: float = 0.7,
        image_guidance: float | None = None,
        random_frame: bool = True,
        condition_dropout: float = 0.05,
        vae_tiling: bool = False,
        random_weights: bool = False,
    ):
        self.vae, self.denoiser, self.schedule = vae, unet, schedule
        self.text, self.image_encoder, self.image_resampler = text, image_encoder, image_resampler
        self.frames, self.height, self.width, self.fps, self.name = frames, height, width, fps, name
        self.prediction = prediction
        self.training_fs, self.sampling_fs = training_fs, sampling_fs
        self.spacing, self.eta = spacing, eta
        self.guidance_rescale, self.image_guidance = guidance_rescale, image_guidance
        self.random_frame, self.condition_dropout = random_frame, condition_dropout
        self.random_weights = random_weights
        self._null: Tensor | None = None
        self.spatial = 2 ** (len(vae.config.block_out_channels) - 1)
        unit = self.spatial * 2 ** (len(unet.config.channel_mult) - 1)
        if height % unit or width % unit:
            raise MotionRAGError(
                f"backbone {name}: {height}x{width} pixels, expected multiples of {unit}; set height and width"
            )
        if prediction not in ("v", "noise"):
            raise MotionRAGError(f"backbone {name}: prediction={prediction!r}, choose v or noise")
        for module in (vae, unet, image_encoder, image_resampler):
            module.eval().requires_grad_(False)
        vae.enable_slicing()  # frame by frame, as the reference: the memory of one
        if vae_tiling:
            vae.enable_tiling()
            vae.tile_overlap_factor = tile_overlap(vae.tile_latent_min_size, self.spatial, 1 / 4)

    @classmethod
    def load(
        cls, path: str, text: Callable[[Sequence[str]], Tensor] | None = None, tokenizer: str = TOKENIZER,
        sizes: Mapping[str, Mapping[str, Any]] | None = None, schedule: Schedule | None = None, frames: int = 16,
        dtype: str = "float32", **options,
    ) -> DynamiCrafter:  # fmt: skip
        """Read a folder or hub id that holds a published `model.ckpt`, or what `save` wrote.

        Args:
            path: folder, hub id or `pkg:NAME`.
            text: in place of the text encoder of the checkpoint.
            tokenizer: folder or hub id of the CLIP tokenizer; checkpoints bring none.
            sizes: part (unet, vae, text_encoder, image_encoder, image_resampler) -> sizes that differ from the
                576 x 1024 model's, for a `model.ckpt`.
            schedule: that of the 576 x 1024 model by default.
            frames: clip length; the image Resampler of a checkpoint has tokens for this many.
            dtype: precision of all networks.
            options: those of the class.

        Raises MotionRAGError if something is missing, damaged or does not fit.
        """
        folder = local_folder(path)
        if text is None:  # first, since it is quick to fail
            source = folder / "tokenizer" if (folder / "tokenizer").is_dir() else tokenizer
            try:
                words = CLIPTokenizer.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise MotionRAGError(
                    f"backbone {path!r}: no CLIP tokenizer in {source}; set tokenizer= to a folder or hub id that has one"
                ) from error
        if (folder / "model.ckpt").is_file():
            parts = read_checkpoint(folder / "model.ckpt", text is None, sizes or {}, frames, dtype)
        else:
            kinds = {"text_encoder": CLIPTextModel} if text is None else {}
            kinds |= {"image_encoder": CLIPVisionModel, "image_resampler": ImageResampler}
            kinds |= {"vae": AutoencoderKL, "unet": DynamiCrafterUNet}
            parts = dict(zip(kinds, read_parts(str(folder), dtype, **kinds), strict=True))
        text = text or CLIPText(parts["text_encoder"], words)
        networks = (
            parts["vae"],
            parts["unet"],
            text,
            CLIPImage(parts["image_encoder"]),
            parts["image_resampler"],
        )
        return cls(*networks, schedule or Schedule(base_scale=0.3), frames, **options)

    def save(self, folder: str | Path) -> None:
        """Write all networks as safetensors, a folder each, for `load`; a text encoder that is not CLIP stays out."""
        parts = {"vae": self.vae, "unet": self.denoiser, "image_resampler": self.image_resampler}
        parts["image_encoder"] = self.image_encoder.model
        if isinstance(self.text, CLIPText):
            parts |= {"text_encoder": self.text.model, "tokenizer": self.text.tokenizer}
        for name, part in parts.items():
            part.save_pretrained(Path(folder) / name)

    @classmethod
    def tiny(
        cls, seed: int = 0, text: Callable[[Sequence[str]], Tensor] | None = None, fps: float = 8.0,
        dtype: str = "float32", **options,
    ) -> DynamiCrafter:  # fmt: skip
        """Random weights at toy size, 9 x 32 x 32; nothing else differs. `options` are those of the class."""
        frames = 9
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae, unet = AutoencoderKL(**TINY_VAE), DynamiCrafterUNet(**TINY_UNET)
            # Layers that begin at zero would hide whatever stands before them.
            for parameter in unet.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.05)
            image_encoder = CLIPImage(CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP_IMAGE)))
            image_resampler = ImageResampler(**TINY_IMAGE_RESAMPLER, video_length=frames)
        sizes = dict(frames=frames, height=32, width=32, fps=fps, name="dynamicrafter_tiny")
        for network in (vae, unet, image_encoder, image_resampler):
            network.to(precision(dtype))
        schedule = Schedule(base_scale=0.3)
        parts = (vae, unet, text or SentenceText(), image_encoder, image_resampler, schedule)
        return cls(*parts, **sizes | {"random_weights": True} | options)

    # --- places ----------------------------------------------------------------------------------------------------

    def encoders_to(self, device: torch.device | str) -> DynamiCrafter:
        """Move text encoder, image encoder and image Resampler."""
        for module in (self.text, self.image_encoder, self.image_resampler):
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    # --- encoding --------------------------------------------------------------------------------------------------

    def _encode(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> scaled latents (B, T, C, h, w): the posterior's mode of every frame."""
        frames = video.flatten(0, 1).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(frames).latent_dist.mode() * self.vae.config.scaling_factor
        return latents.unflatten(0, video.shape[:2]).float().to(self.device)

    def image_noise_level(self, batch: int, generator: Generators = None) -> None:
        """None: the condition image stays clean in training."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text states (B, L, D) float32."""
        return self.text(prompts).to(self.device).float()

    @torch.no_grad()
    def encode_context(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Text states and, behind them, the image tokens of frame 1, frame 2, ...: (B, L + T*l, D)."""
        latents = self.image_resampler.latents
        tokens = self.image_resampler(self.image_encoder(images).to(latents))
        return torch.cat([self.encode_text(prompts), tokens.to(self.device).float()], dim=1)

    def null_context(self, images: Tensor) -> Tensor:
        """Context of the empty prompt and an all-zero (grey) image (B, L + T*l, D), computed once."""
        if self._null is None:
            self._null = self.encode_context(
                [""], torch.zeros(1, 3, self.height, self.width, dtype=torch.float32)
            )
        return self._null.to(self.device).expand(len(images), -1, -1)

    def drop_conditions(
        self, context: Tensor, image_latents: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Text, image tokens or both of some samples become those of the null context; the image latents stay."""
        no_text, no_image = dropped(
            for_each(torch.rand, len(context), generator, dtype=torch.float32), self.condition_dropout
        )
        text = self.denoiser.config.text_tokens
        null = self.null_context(context)
        parts = [(slice(0, text), no_text), (slice(text, None), no_image)]
        return torch.cat([drop(context[:, p], null[:, p], mask) for p, mask in parts], dim=1), image_latents

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        """The cross-attention of every spatial transformer."""
        return self.denoiser.adapter_sites()

    # --- training --------------------------------------------------------------------------------------------------

    def predict(
        self, latents: Tensor, image_latents: Tensor, context: Tensor, timesteps: Tensor, fs: Tensor
    ) -> Tensor:
        """The UNet's prediction, float32 in the shape of the noisy latents (B, T, C, h, w).

        image_latents (B, 1 or T, C, h, w), context (B, L + T*l, D), timesteps and frame-rate condition fs (B,).
        """
        x = with_image(latents, image_latents).transpose(1, 2).to(self.dtype)
        device = self.device
        out = self.denoiser(x, timesteps.to(device), context.to(device, self.dtype), fs.to(device))
        return out.transpose(1, 2).float()

    def loss(
        self, latents: Tensor, image_latents: Tensor, context: Tensor, generator: Generators = None,
        noise_level: Tensor | None = None, fps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """MSE on v (or on the noise) at uniform time steps, of dynamically rescaled latents; a scalar."""
        timesteps = for_each(partial(torch.randint, 0, len(self.schedule)), len(latents), generator)
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        x0, abar = self.schedule.rescale(latents, timesteps), self.schedule.abar[timesteps]
        if fps is None or self.training_fs is not None:
            fps = torch.full(
                (len(latents),), float(self.fps if self.training_fs is None else self.training_fs)
            )
        fs = fps.round().long()
        predicted = self.predict(add_noise(x0, noise, abar), image_latents, context, timesteps, fs)
        return v_loss(predicted, x0, noise, abar) if self.prediction == "v" else F.mse_loss(predicted, noise)

    # --- sampling --------------------------------------------------------------------------------------------------

    def __call__(self, image: Tensor, prompt: str | Sequence[str], **options: Any) -> Tensor:
        """First frames (B, 3, H, W) in [-1, 1] and a prompt, or one for each -> video (B, T, 3, H, W) in [-1, 1].

        `options` are those of `sample`, and with a motion package attached also those that it adds.
        """
        prompts = [prompt] * len(image) if isinstance(prompt, str) else list(prompt)
        contexts = self.encode_context(prompts, image), self.null_context(image)
        return self.sample(image, *contexts, **options)

    @torch.no_grad()
    def sample(
        self, image: Tensor, context: Tensor, null_context: Tensor, *, steps: int = 30, guidance: float = 2.0,
        seeds: Sequence[int] = (0,), motion: MotionInput | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """DDIM sampling. First frames (B, 3, H, W), contexts (B, L + T*l, D) -> (B, T, 3, H, W) in [-1, 1].

        Each sample has its own seed, so its noise does not depend on its batch. Guidance 1 runs the conditional part
        alone.
        """
        noise_of = generators(seeds, image)
        image_latents = self.encode_image(image)
        shape = (len(image), self.frames, *image_latents.shape[2:])

        def noise() -> Tensor:
            return randn_tensor(shape, noise_of, self.device, torch.float32)

        steps_taken = self.denoise(
            noise(), image_latents, context, null_context, steps=steps, guidance=guidance,
            fs=torch.full((len(image),), self.sampling_fs), noises=(noise() for _ in count()), motion=motion,
        )  # fmt: skip
        for step in denoising(steps_taken, self.steps(steps), progress):
            latents = step.latents
        return self.decode(latents)

    @torch.no_grad()
    def denoise(
        self, latents: Tensor, image_latents: Tensor, context: Tensor, null_context: Tensor, *, steps: int,
        guidance: float, fs: Tensor, noises: Iterable[Tensor], motion: MotionInput | None = None,
    ) -> Iterator[Denoised]:  # fmt: skip
        """Every step of DDIM from noise (B, T, C, h, w), with the noise that each adds taken from `noises`.

        The parts of guidance run as one batch, first unconditional, last conditional; with `image_guidance` the image
        without the text between them.
        """
        batch = len(latents)
        contexts, motions = [context], []
        if guidance != 1 and self.image_guidance is not None:
            text = self.denoiser.config.text_tokens
            contexts.insert(0, torch.cat([null_context[:, :text], context[:, text:]], dim=1))
        if guidance != 1:
            contexts.insert(0, null_context)
        if motion is not None:
            motions = [motion.null_tokens.expand_as(motion.tokens)] * (len(contexts) - 1) + [motion.tokens]
        parts, context = len(contexts), torch.cat(contexts)
        image_latents, fs = torch.cat([image_latents] * parts), torch.cat([fs] * parts)
        with motion.adapter.use(torch.cat(motions), motion.scale) if motion else nullcontext():
            for step, noise in zip(self.steps(steps), noises, strict=False):
                timesteps = torch.full((parts * batch,), step.t)
                predicted = self.predict(torch.cat([latents] * parts), image_latents, context, timesteps, fs)
                predictions = predicted.chunk(parts)
                if parts > 1:
                    predicted = guide(
                        predictions[-1], predictions[0], guidance, *predictions[1:-1],
                        image_scale=self.image_guidance, rescale=self.guidance_rescale,
                    )  # fmt: skip
                latents, x0 = ddim_step(latents, predicted, step, noise, self.prediction)
                yield Denoised(step.t, latents, x0, predictions)

    def steps(self, number: int) -> list[Step]:
        """The steps of sampling; "uniform" spacing may take more of them than asked for."""
        return self.schedule.steps(number, self.spacing, self.eta)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, T, C, h, w) -> video (B, T, 3, H, W), clamped to [-1, 1]."""
        frames = latents.flatten(0, 1).to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        video = self.vae.decode(frames).sample.float().clamp(-1, 1)
        return video.unflatten(0, latents.shape[:2]).to(self.device)
