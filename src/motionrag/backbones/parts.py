"""A backbone's networks: reading them from diffusers' layout, one folder for each, telling them apart, and what is the
same with all of them."""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor, nn

from motionrag.encoders import resolve_weights
from motionrag.errors import MotionRAGError
from motionrag.modules.diffusion import Generators, noisy_image


def precision(dtype: str) -> torch.dtype:
    """The precision of that name; raises MotionRAGError for another one."""
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    if found is None:
        raise MotionRAGError(f"dtype={dtype}: expected float32, bfloat16 or float16")
    return found


def read_parts(path: str, dtype: str = "float32", **kinds: type) -> list[Any]:
    """Networks and scheduler below `path`: a folder, `pkg:NAME` or hub id; `kinds` maps subfolder to class.

    Networks come frozen, in eval mode and in the precision named `dtype`. Raises MotionRAGError if a part or one of
    its weights is missing, damaged or of another size.
    """
    wanted, folder, parts = precision(dtype), resolve_weights(path), []
    for name, kind in kinds.items():
        try:
            parts.append(_read(folder, name, kind, wanted))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MotionRAGError(
                f"backbone {path!r} cannot be loaded ({reason}); expected a folder or hub id with "
                f"{', '.join(f'{part}/' for part in kinds)}"
            ) from error
    return parts


def _read(folder: str, name: str, kind: type, dtype: torch.dtype) -> Any:
    if issubclass(kind, SchedulerMixin):
        return kind.from_pretrained(folder, subfolder=name)
    options: dict[str, Any] = {"dtype": dtype}  # transformers
    if issubclass(kind, ModelMixin):  # diffusers
        options = {"torch_dtype": dtype, "low_cpu_mem_usage": is_accelerate_available()}
    network: nn.Module
    network, info = kind.from_pretrained(folder, subfolder=name, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):  # the libraries would go on with random values
        raise ValueError(f"{name}/ lacks {len(missing)} weights, the first is {missing[0]}")
    return network.eval().requires_grad_(False)


def sampled_fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """A short name for the weights of networks, from names, types, shapes and 16 values of each tensor spread over it.

    Networks of several GB take a moment, not minutes; a change of single values is not seen.
    """
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, value in module.state_dict().items():
            values = value.detach().flatten()
            some = values[:: max(len(values) // 16, 1)][:17].double().cpu()
            digest.update(
                f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode() + some.numpy().tobytes()
            )
    return digest.hexdigest()[:16]


def tile_overlap(latents: int, spatial: int, share: float) -> float:
    """The share of an autoencoder's tile, `latents` wide at `spatial` pixels each, that overlaps the next one: what is
    nearest to `share` in whole latents.

    diffusers cuts tiles at `int(size * (1 - share))` and joins them at `int(size * share)`, of pixels and of latents; a
    share that is none of these exactly gives latents of another size than the picture's.
    """

    def exact(overlap: int) -> bool:
        found = overlap / latents
        return all(
            int(size * (1 - found)) * latents == size * (latents - overlap)
            and int(size * found) * latents == size * overlap
            for size in (latents, latents * spatial)
        )

    nearest = sorted(range(1, latents), key=lambda overlap: abs(overlap / latents - share))
    return next(overlap for overlap in nearest if exact(overlap)) / latents


class LatentModel:
    """A backbone whose denoiser works on the latents of an autoencoder: where these are, and the way into latents.

    Attributes: name, frames, height and width as of `Backbone`; vae, denoiser.
    """

    name: str
    frames: int
    height: int
    width: int
    vae: nn.Module
    denoiser: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        return self.denoiser.dtype

    def to(self, *args, **kwargs) -> Self:
        """Move VAE and denoiser."""
        self.vae.to(*args, **kwargs)
        self.denoiser.to(*args, **kwargs)
        return self

    def autoencoder_to(self, device: torch.device | str) -> Self:
        """Move the VAE alone."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [-1, 1] -> latents (B, F, C, h, w) float32: the posterior's mode.

        Raises MotionRAGError for clips of another size.
        """
        if tuple(video.shape[1:]) != (self.frames, 3, self.height, self.width):
            raise MotionRAGError(
                f"backbone {self.name} takes clips of {self.frames}x3x{self.height}x{self.width}, "
                f"got {'x'.join(map(str, video.shape[1:]))}"
            )
        return self._encode(video)

    @torch.no_grad()
    def encode_image(
        self, image: Tensor, generator: Generators = None, noise_level: Tensor | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 1, C, h, w) float32, of the image plus noise of level (B,)."""
        if noise_level is not None:
            noise = randn_tensor(image.shape, generator, image.device, image.dtype)
            image = noisy_image(image, noise_level, noise)
        return self._encode(image[:, None])

    def _encode(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> latents (B, F, C, h, w) float32, on the denoiser's device."""
        raise NotImplementedError
