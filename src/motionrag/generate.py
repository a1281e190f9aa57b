"""From an image, a prompt and reference clips to a video: the parts of the method put together for inference.

Shapes: B clips, K reference clips (nearest first), N x D motion features of a clip, M x E appearance features of a
picture, l x d motion tokens. Pictures are float32 in [-1, 1].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from motionrag.backbones.base import Backbone, MotionInput
from motionrag.checkpoint import load_weights
from motionrag.encoders import AppearanceEncoder, MotionEncoder
from motionrag.errors import MotionRAGError
from motionrag.modules.cama import CAMA
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler
from motionrag.retrieval.database import RetrievalDatabase


class MotionRAG:
    """A backbone with everything that retrieved motion needs; the adapter stays attached until `detach`.

    Args:
        backbone: the frozen image-to-video model.
        motion_encoder, appearance_encoder: frozen encoders, the ones the weights were trained with.
        resampler, motion_adapter: Stage 1. `motion_adapter` is called with the backbone's sites and `token_width`.
        cama: Stage 2; None leaves only tokens that skip CAMA.
        adapter_weights, cama_weights: weights files of the two stages.
        device: of backbone and adapter. Motion and appearance encoders, Resampler and CAMA are small, run once per
            clip, and stay where they are.
        offload: bring the backbone's own encoders (T5, CLIP) to the device only while they encode. The video is the
            same; memory falls by their size.
    """

    def __init__(
        self,
        backbone: Backbone,
        motion_encoder: MotionEncoder,
        appearance_encoder: AppearanceEncoder,
        resampler: Resampler,
        motion_adapter: Callable[..., MotionAdapter],
        cama: CAMA | None,
        adapter_weights: str,
        cama_weights: str | None = None,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ):
        self.backbone, self.motion_encoder, self.appearance_encoder = (
            backbone,
            motion_encoder,
            appearance_encoder,
        )
        makes = resampler.tokens, resampler.output_dim
        if cama is not None and makes != (cama.tokens, cama.width):
            raise MotionRAGError(
                f"the motion Resampler of {adapter_weights} makes {makes[0]} tokens of width {makes[1]}, the CAMA of "
                f"{cama_weights} takes {cama.tokens} of width {cama.width}: take both from one training, and resampler "
                "and cama of its sizes"
            )
        sites = backbone.adapter_sites()
        self.adapter = motion_adapter(sites, token_width=resampler.output_dim).eval().requires_grad_(False)
        self.resampler = resampler.eval().requires_grad_(False)
        manifest = load_weights(adapter_weights, resampler=self.resampler, motion_adapter=self.adapter)
        if not manifest:
            warnings.warn(
                f"{adapter_weights} has no .json beside it, so nothing says what it was trained with: copy that, too",
                stacklevel=2,
            )
        trained_with = manifest.get("about", {}).get("adapter_query")
        query = sorted(set(self.adapter.query.values()))
        if trained_with not in (None, query):  # no shape tells them apart
            raise MotionRAGError(
                f"{adapter_weights} was trained with adapter_query={'/'.join(trained_with)}, this adapter asks with "
                f"{'/'.join(query)}: set backbone.adapter_query={trained_with[0]}"
            )
        self.cama = cama
        if cama is not None:
            self.cama = cama.eval().requires_grad_(False)
            if cama_weights is None:
                raise MotionRAGError(
                    "cama_weights is missing: give the .safetensors of Stage 2, or ~cama to go without"
                )
            load_weights(cama_weights, cama=self.cama)
        self.device, self.offload = torch.device(device), offload
        backbone.to(self.device)
        backbone.encoders_to("cpu" if offload else self.device)
        self.adapter.to(self.device).attach(sites)

    def detach(self) -> None:
        """Restore the bare backbone."""
        self.adapter.detach()

    # --- motion tokens ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def motion_tokens(self, features: Tensor) -> Tensor:
        """Motion features (..., N, D) -> motion tokens (..., l, d)."""
        return self.resampler(features.flatten(0, -3)).unflatten(0, features.shape[:-2])

    @cached_property
    def null_tokens(self) -> Tensor:
        """Tokens (1, l, d) of an all-zero clip, for the unconditional half of guidance; they skip CAMA."""
        side = self.motion_encoder.size
        return self.motion_tokens(
            self.motion_encoder(torch.zeros(1, self.motion_encoder.frames, 3, side, side))
        )

    def adapt(self, reference_motion: Tensor, reference_appearance: Tensor, image: Tensor) -> Tensor:
        """As `adapt_tokens`, from the references' motion features (B, K, N, D)."""
        return self.adapt_tokens(self.motion_tokens(reference_motion), reference_appearance, image)

    @torch.no_grad()
    def adapt_tokens(self, reference_tokens: Tensor, reference_appearance: Tensor, image: Tensor) -> Tensor:
        """The image's motion tokens (B, l, d) as CAMA predicts them.

        reference_tokens (B, K, l, d) and reference_appearance (B, K, M, E) nearest first, image (B, 3, H, W).
        Raises MotionRAGError for more references than CAMA has positions for.
        """
        if self.cama is None:
            raise MotionRAGError("these weights hold no CAMA: train Stage 2 (motionrag train stage=cama)")
        most = self.cama.max_references
        if reference_tokens.shape[1] > most:
            raise MotionRAGError(
                f"k={reference_tokens.shape[1]}: this CAMA takes at most {most} reference clips; lower k"
            )
        if getattr(self.backbone, "reference_quirks", False):
            image = image / 2 + 0.5
        return self.cama.predict(reference_tokens, reference_appearance, self.appearance_encoder(image))

    def check_database(self, db: RetrievalDatabase) -> None:
        """Raise MotionRAGError, naming both, unless a database was made with these encoders and, where it holds motion
        tokens, this Resampler."""
        db.check_encoders({"motion": self.motion_encoder, "appearance": self.appearance_encoder})
        db.check_resampler(self.resampler)

    def read_references(self, db: RetrievalDatabase, ids: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Motion tokens (B, K, l, d) and appearance features (B, K, M, E) of clips of a database that was checked."""
        if db.resampled:
            tokens = torch.stack([db.motion_tokens(row) for row in ids])
        else:
            tokens = self.motion_tokens(torch.stack([db.motion_features(row) for row in ids]))
        return tokens, torch.stack([db.appearance_features(row) for row in ids])

    def encode_references(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Reference clips, each (T, 3, H, W), -> motion features (1, K, N, D), appearance features (1, K, M, E)."""
        motion = torch.cat([self.motion_encoder(clip[None]) for clip in clips])
        appearance = torch.cat([self.appearance_encoder(clip[:1]) for clip in clips])
        return motion[None], appearance[None]

    # --- video -----------------------------------------------------------------------------------------------------

    def encode_contexts(self, prompts: Sequence[str], image: Tensor) -> tuple[Tensor, Tensor]:
        """Context and null context (B, L, D) of prompts and first frames (B, 3, H, W), for any number of `generate`."""
        if self.offload:
            self.backbone.encoders_to(self.device)
        contexts = self.backbone.encode_context(prompts, image), self.backbone.null_context(image)
        if self.offload:
            self.backbone.encoders_to("cpu")
        return contexts

    def generate(
        self,
        image: Tensor,
        prompts: Sequence[str],
        tokens: Tensor | None = None,
        *,
        steps: int = 25,
        guidance: float = 3.0,
        seeds: Sequence[int] = (0,),
        motion_scale: float = 1.0,
        progress: bool = False,
        contexts: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Videos (B, T, 3, H, W) in [-1, 1], on the CPU.

        Args:
            image: first frames (B, 3, H, W).
            prompts: B prompts.
            tokens: motion tokens (B, l, d); None runs the bare backbone.
            seeds: one for each clip; the same seed gives the same noise with and without tokens.
            motion_scale: weight of the adapter's branch.
            contexts: what `encode_contexts` gave for these prompts and images; None encodes them.

        Raises MotionRAGError as `check_sampling` does.
        """
        check_sampling(steps, guidance, motion_scale)
        contexts = contexts or self.encode_contexts(prompts, image)
        options = dict(steps=steps, guidance=guidance, seeds=seeds, progress=progress)
        if tokens is None:
            with self.adapter.use(None):
                return self.backbone.sample(image, *contexts, **options).cpu()
        tokens, null_tokens = tokens.to(self.device), self.null_tokens.to(self.device)
        motion = MotionInput(self.adapter, tokens, null_tokens, motion_scale)
        return self.backbone.sample(image, *contexts, motion=motion, **options).cpu()


def check_sampling(steps: int, guidance: float, motion_scale: float) -> None:
    """Raise MotionRAGError for less than one step, a scale that is no number, and a negative guidance."""
    if steps < 1:
        raise MotionRAGError(f"steps={steps}: expected at least 1 denoising step")
    for name, value in (("guidance", guidance), ("motion_scale", motion_scale)):
        if not math.isfinite(value):
            raise MotionRAGError(f"{name}={value}: expected a number, such as 1")
    if guidance < 0:
        raise MotionRAGError(f"guidance={guidance:g}: expected at least 0; 1 is no guidance")


def to_float(frames: np.ndarray) -> Tensor:
    """Frames (..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(video: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def fit(images: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, height, width): scaled until it covers, then centre-cropped; nothing is distorted."""
    scale = max(height / images.shape[-2], width / images.shape[-1])
    size = [max(round(images.shape[-2] * scale), height), max(round(images.shape[-1] * scale), width)]
    if size != list(images.shape[-2:]):
        images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return images[..., top : top + height, left : left + width]


def usable(device: str | torch.device) -> torch.device:
    """The device, once something lies on it. Raises MotionRAGError if torch cannot do that here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        why = str(error).splitlines()[0]
        raise MotionRAGError(
            f"device={device}: cannot be used here ({why}); choose another or null"
        ) from error
    return torch.device(device)


def read_image(path: str | Path) -> Tensor:
    """An image file -> (1, 3, H, W) float32 in [-1, 1], upright. Raises MotionRAGError if it is not one."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MotionRAGError(f"image={path}: no such file; give a picture (png, jpg, webp)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MotionRAGError(
            f"image={path}: not a readable picture ({error}); give a png, jpg or webp"
        ) from error
    return to_float(pixels)[None]
