"""DynamiCrafter's schedule, objective, condition dropout and DDIM against the reference's numbers."""

import torch
import torch.nn.functional as F

from motionrag.modules.ddim import Schedule, Step, ddim_sigma, ddim_step, noise_from_velocity
from motionrag.modules.diffusion import add_noise, v_loss, velocity, x0_from_velocity

SPACING = {"uniform": "uniform", "uniform_trailing": "trailing"}  # the reference's name -> ours


def schedule_of(constructor, **options):
    """Our schedule with the reference's settings."""
    assert constructor["beta_schedule"] == "linear" and constructor["parameterization"] == "v"
    if constructor.get("use_dynamic_rescale"):
        options["base_scale"] = constructor["base_scale"]
    if "turning_step" in constructor:
        options["turning_step"] = constructor["turning_step"]
    return Schedule(
        timesteps=constructor["timesteps"],
        beta_start=constructor["linear_start"],
        beta_end=constructor["linear_end"],
        **{"zero_terminal_snr": constructor["rescale_betas_zero_snr"]} | options,
    )


def test_dc_schedule(case):
    c = case.constructor
    ours = schedule_of(c)
    times = torch.arange(len(ours) + c["turning_step"])  # the reference's table runs past the last time
    case.check(
        betas=ours.betas,
        betas_before_rescale=schedule_of(c, zero_terminal_snr=False).betas,
        alphas_cumprod=ours.abar,
        sqrt_alphas_cumprod=ours.abar.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - ours.abar).sqrt(),
        scale_arr=ours.scale(times),
    )
    before = F.pad(ours.abar[:-1], (1, 0), value=1.0)
    sigma = ddim_sigma(ours.abar, before, eta=1.0)
    case.check(alphas_cumprod_prev=before, posterior_variance=sigma**2)
    # DDPM's posterior mean is a x0 + b x_t: a step with eta 1 between neighbours, without its noise
    levels = torch.stack([ours.abar, before, sigma], 1).tolist()
    steps = [Step(t, *level, scale=1.0, scale_prev=1.0) for t, level in enumerate(levels)]
    for name, x0, x_t in (("posterior_mean_coef1", 1, 0), ("posterior_mean_coef2", 0, 1)):
        noise = (x_t - ours.abar.sqrt() * x0) / (1 - ours.abar).sqrt()  # what makes x_t of x0
        v = velocity(torch.full_like(noise, x0), noise, ours.abar)
        one = torch.full((1,), x_t, dtype=v.dtype)
        mean = [ddim_step(one, v[[step.t]], step, torch.zeros(1))[0] for step in steps]
        case.check(**{name: torch.cat(mean)})
    # our loss weighs every time alike: a unit error on v costs the same
    ones = torch.ones_like(ours.abar)
    errors = [v_loss(velocity(ones[:1], ones[:1], a) + 1, ones[:1], ones[:1], a) for a in ours.abar.split(1)]
    case.check(lvlb_weights=torch.stack(errors))
    for count in c["ddim_steps"]:
        for theirs, spacing in SPACING.items():
            steps = ours.steps(count, spacing, c["ddim_eta"])[::-1]  # the reference lists the last step first
            column = {name: torch.tensor([vars(step)[name] for step in steps]) for name in vars(steps[0])}
            arrays = {
                "timesteps": column["t"],
                "alphas": column["abar"],
                "alphas_prev": column["abar_prev"],
                "sigmas": column["sigma"],
                "sqrt_one_minus_alphas": (1 - column["abar"].double()).sqrt(),
                "scale_arr": column["scale"],
                "scale_arr_prev": column["scale_prev"],
            }
            case.check(**{f"ddim_{theirs}_{count}_{name}": value for name, value in arrays.items()})


def test_dc_v_conversions(case):
    abar = schedule_of(case.constructor).abar[case["in.timesteps"]]
    x0, noise, v = case["in.x0"], case["in.noise"], case["in.v_in"]
    x_t = add_noise(x0, noise, abar)
    case.check(
        x_t=x_t,
        v=velocity(x0, noise, abar),
        x0_from_v=x0_from_velocity(v, x_t, abar),
        eps_from_v=noise_from_velocity(v, x_t, abar),
    )
