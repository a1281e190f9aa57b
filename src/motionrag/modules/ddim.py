"""DDIM for video latents: noise schedule with zero terminal SNR, dynamic rescale, sampling steps, guidance.

diffusers' `DDIMScheduler` shares schedule and trailing spacing. It has neither the dynamic rescale nor the "uniform"
spacing, and finds the step before by a fixed stride, which misses the true one unless the number of steps divides
1000 (10 of 30 steps are off by one).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from motionrag.errors import MotionRAGError
from motionrag.modules.diffusion import x0_from_velocity

Spacing = Literal["trailing", "uniform"]
Prediction = Literal["v", "noise"]


@dataclass(frozen=True)
class Step:
    """One step of sampling, from time `t` to the next lower one.

    Attributes:
        t: time step.
        abar, abar_prev: cumulative product of alphas here and at the next lower time.
        sigma: standard deviation of the noise that the step adds.
        scale, scale_prev: dynamic rescale here and at the next lower time.
    """

    t: int
    abar: float
    abar_prev: float
    sigma: float
    scale: float
    scale_prev: float


class Schedule:
    """Noise levels of `timesteps` steps; betas are linear in their square root.

    Args:
        timesteps: their number, T.
        beta_start, beta_end: first and last beta before the shift to zero terminal SNR.
        zero_terminal_snr: shift and scale so that the last step is pure noise (arXiv 2305.08891, algorithm 1).
        base_scale: dynamic rescale (arXiv 2310.12190): clean latents are multiplied by a factor that falls linearly
            from 1 to `base_scale` over the first `turning_step` steps and stays there; 1 is off.
        turning_step: see `base_scale`.

    Attributes:
        betas, abar: (T,) float64; `abar` is the cumulative product of 1 - betas.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = True,
        base_scale: float = 1.0,
        turning_step: int = 400,
    ) -> None:
        self.base_scale, self.turning_step = base_scale, turning_step
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(0)
        if zero_terminal_snr:
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
        self.betas, self.abar = betas, abar

    def __len__(self) -> int:
        return len(self.betas)

    def scale(self, t: Tensor) -> Tensor:
        """Dynamic rescale factor at time steps of any shape, float64."""
        progress = (t.double() / (self.turning_step - 1)).clamp(max=1)
        return 1 + (self.base_scale - 1) * progress

    def rescale(self, x0: Tensor, t: Tensor) -> Tensor:
        """Clean latents (B, ...) at time steps (B,), as the network learns them: before noising and v target."""
        return x0 * self.scale(t).to(x0).reshape(-1, *[1] * (x0.ndim - 1))

    def steps(self, count: int, spacing: Spacing = "trailing", eta: float = 1.0) -> list[Step]:
        """Steps of DDIM sampling, noisiest first; the last one ends at the level of time 0, not at zero noise.

        "trailing" starts at T - 1 and takes `count` steps. "uniform" takes every (T // count)-th step from 1 on: it
        never sees T - 1, and makes one or more additional steps where `count` does not divide T. `eta` 0 is
        deterministic, 1 adds as much noise as DDPM. Raises MotionRAGError for a count or a spacing that does not work.
        """
        total = len(self)
        if not 1 <= count <= total:
            raise MotionRAGError(f"steps={count}: expected 1 to {total} denoising steps")
        if spacing == "trailing":
            # numpy's `arange(total, 0, -total / count)`, as the published code has it, to the last bit: it goes by the
            # distance of its first two values, and at some counts it has an element too many, past the last step
            stride = (total - total / count) - total
            times = (total + stride * torch.arange(count, dtype=torch.float64)).round().long() - 1
        elif spacing == "uniform":
            times = torch.arange(0, total, total // count).flip(0) + 1
            if times[0] >= total:
                raise MotionRAGError(
                    f"steps={count}: uniform spacing would begin at time {total}, past the last one; "
                    "choose another number of steps or spacing=trailing"
                )
        else:
            raise MotionRAGError(f"spacing={spacing!r}: choose trailing or uniform")
        abar, scale = self.abar[times], self.scale(times)
        abar_prev = torch.cat([abar[1:], self.abar[:1]])
        scale_prev = torch.cat([scale[1:], scale[-1:]])
        sigma = ddim_sigma(abar, abar_prev, eta)
        columns = (times, abar, abar_prev, sigma, scale, scale_prev)
        return [Step(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def ddim_sigma(abar: Tensor, abar_prev: Tensor, eta: float) -> Tensor:
    """Standard deviation of the noise of a step from `abar` to `abar_prev`; `eta` 1 is that of DDPM's posterior."""
    return eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()


def noise_from_velocity(v: Tensor, x_t: Tensor, abar: Tensor) -> Tensor:
    """The noise implied by a predicted v; `abar` (B,) or (1,)."""
    abar = abar.double().reshape(-1, *[1] * (x_t.ndim - 1))
    return abar.sqrt().to(x_t) * v + (1 - abar).sqrt().to(x_t) * x_t


def ddim_step(
    x_t: Tensor, predicted: Tensor, step: Step, noise: Tensor, prediction: Prediction = "v"
) -> tuple[Tensor, Tensor]:
    """Latents (B, ...) one step earlier, and the clean latents that the network implies, rescaled for that step.

    `predicted` is v or the noise, by `prediction`; `noise` is added with the step's sigma. The dynamic rescale acts
    on the clean latents only, the implied noise stays.
    """
    abar = torch.tensor([step.abar], dtype=torch.float64, device=x_t.device)
    if prediction == "v":
        x0, direction = x0_from_velocity(predicted, x_t, abar), noise_from_velocity(predicted, x_t, abar)
    else:
        x0, direction = (x_t - (1 - step.abar) ** 0.5 * predicted) / step.abar**0.5, predicted
    x0 = x0 * (step.scale_prev / step.scale)
    remaining = max(1 - step.abar_prev - step.sigma**2, 0.0) ** 0.5
    return step.abar_prev**0.5 * x0 + remaining * direction + step.sigma * noise, x0


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    image_only: Tensor | None = None,
    image_scale: float | None = None,
    rescale: float = 0.0,
) -> Tensor:
    """Classifier-free guidance of predictions (B, ...).

    Args:
        conditional, unconditional: predictions with all and with no conditions.
        scale: guidance scale; 1 gives `conditional`.
        image_only: prediction with the image but without text, for a scale of its own.
        image_scale: guidance scale of the image, `scale` if None.
        rescale: share of the result that gets each sample's standard deviation back to that of `conditional`
            (arXiv 2305.08891, section 3.4).
    """
    if image_only is None:
        guided = unconditional + scale * (conditional - unconditional)
    else:
        image_scale = scale if image_scale is None else image_scale
        guided = (
            unconditional
            + image_scale * (image_only - unconditional)
            + scale * (conditional - image_only)
        )  # fmt: skip
    if rescale:
        spread = [x.flatten(1).std(1).reshape(-1, *[1] * (x.ndim - 1)) for x in (conditional, guided)]
        guided = guided * (rescale * spread[0] / spread[1] + 1 - rescale)
    return guided
