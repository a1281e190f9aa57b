"""Training objectives against the reference's numbers."""

import torch
from diffusers import CogVideoXDPMScheduler

from motionrag.modules.diffusion import (
    add_noise,
    first_frame_condition,
    v_loss,
    weighted_x0_loss,
    x0_from_velocity,
)


def test_cog_training_loss(case):
    abar = CogVideoXDPMScheduler(**case.constructor["CogVideoXDPMScheduler"]).alphas_cumprod
    factor = case.constructor["vae_scaling_factor_image"]
    x0 = case["in.vae_latents"].transpose(1, 2) * factor
    image = case["in.vae_image_latents"].transpose(1, 2) * factor
    noise, output, steps = case["in.noise"], case["in.model_output"], case["in.timesteps"]

    x_t = add_noise(x0, noise, abar[steps])
    single = [
        weighted_x0_loss(output[:1], x0[:1], noise[:1], abar[t[None]]) for t in case["in.edge_timesteps"]
    ]
    case.check(
        alphas_cumprod=abar,
        model_input=first_frame_condition(x_t, image),
        x0_pred=x0_from_velocity(output, x_t, abar[steps]),
        loss=weighted_x0_loss(output, x0, noise, abar[steps]),
        loss_single=torch.stack(single),
    )
    # our default is the plain loss on v: the same number
    case.check(loss=v_loss(output, x0, noise, abar[steps]))
    single = [v_loss(output[:1], x0[:1], noise[:1], abar[t[None]]) for t in case["in.edge_timesteps"]]
    case.check(loss_single=torch.stack(single))
