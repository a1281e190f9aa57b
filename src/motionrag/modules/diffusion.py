"""Formulas of v-prediction diffusion as pure functions.

`abar` is the cumulative product of alphas at each sample's time step, shape (B,). With
`x_t = sqrt(abar) x0 + sqrt(1 - abar) noise` the network predicts `v = sqrt(abar) noise - sqrt(1 - abar) x0`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# For a batch as a whole, or one for each sample, whose draws then do not depend on the batch it is in.
Generators = torch.Generator | list[torch.Generator] | None


def for_each(draw: Callable[..., Tensor], batch: int, generator: Generators = None, **options) -> Tensor:
    """`draw((batch,), ...)`, such as `torch.randn`, of shape (batch,) on the CPU; a list's generators one sample each."""
    if not isinstance(generator, list):
        return draw((batch,), generator=generator, **options)
    return torch.cat([draw((1,), generator=g, **options) for g in generator])


def _roots(abar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar), taken in float64, shaped to multiply `like` (B, ...)."""
    abar = abar.double().reshape(-1, *[1] * (like.ndim - 1))
    return abar.sqrt().to(like), (1 - abar).sqrt().to(like)


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Clean latents (B, ...) and noise -> x_t."""
    signal, sigma = _roots(abar, x0)
    return signal * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """The v-prediction target (B, ...)."""
    signal, sigma = _roots(abar, x0)
    return signal * noise - sigma * x0


def x0_from_velocity(v: Tensor, x_t: Tensor, abar: Tensor) -> Tensor:
    """Clean latents implied by a predicted v."""
    signal, sigma = _roots(abar, x_t)
    return signal * x_t - sigma * v


def v_loss(predicted_v: Tensor, x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Mean squared error on v, scalar float32."""
    return F.mse_loss(predicted_v.float(), velocity(x0.float(), noise.float(), abar))


def weighted_x0_loss(predicted_v: Tensor, x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """The same loss written on x0, weight 1 / (1 - abar), scalar float64: how CogVideoX states it.

    Equal to `v_loss` because x0 errors are sqrt(1 - abar) times v errors; loses digits where abar is near 1.
    """
    x0, noise, predicted_v = x0.double(), noise.double(), predicted_v.double()
    error = x0_from_velocity(predicted_v, add_noise(x0, noise, abar), abar) - x0
    return (error.square().flatten(1).mean(1) / (1 - abar.double())).mean()


def image_noise_sigma(batch: int, generator: Generators = None) -> Tensor:
    """Noise level exp(N(-3, 0.5)) for each sample's condition image, (B,) float32."""
    draw = for_each(torch.randn, batch, generator, dtype=torch.float32)
    return torch.exp(-3.0 + 0.5 * draw)


def noisy_image(image: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """image (B, C, H, W), sigma (B,) or (1,), noise like the image -> image + sigma * noise."""
    return image + sigma.to(image).reshape(-1, 1, 1, 1) * noise


def first_frame_condition(latents: Tensor, image_latents: Tensor) -> Tensor:
    """Put the condition image behind the channels of the first latent frame, zeros behind the others.

    latents (B, F, C, h, w), image_latents (B, 1, C, h, w) -> (B, F, 2C, h, w).
    """
    padding = image_latents.new_zeros(
        *image_latents.shape[:1], latents.shape[1] - 1, *image_latents.shape[2:]
    )
    return torch.cat([latents, torch.cat([image_latents, padding], dim=1).to(latents)], dim=2)


# --- EDM preconditioning, as Stable Video Diffusion is trained: x_t = x0 + sigma noise, sigma of shape (B,) ------------


def edm_sigma(batch: int, generator: Generators = None, mean: float = 0.7, std: float = 1.6) -> Tensor:
    """Noise level exp(N(mean, std)) for each sample, (B,) float32."""
    draw = for_each(torch.randn, batch, generator, dtype=torch.float32)
    return torch.exp(mean + std * draw)


def edm_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma (B,) -> c_skip, c_out, c_in, c_noise, each (B,), for a network that predicts v.

    c_skip = 1/(s^2+1), c_out = -s/sqrt(s^2+1), c_in = 1/sqrt(s^2+1), c_noise = ln(s)/4: the network's time step.
    """
    root = (sigma.square() + 1).sqrt()
    return 1 / root.square(), -sigma / root, 1 / root, 0.25 * sigma.log()


def edm_loss(denoised: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Squared error on clean latents (B, ...), weight (1 + s^2) / s^2, scalar float32."""
    weight = (1 + sigma.float().square()) / sigma.float().square()
    return (weight * (denoised.float() - x0.float()).square().flatten(1).mean(1)).mean()
