"""DynamiCrafter's schedule, objective, condition dropout and DDIM against the reference's numbers."""

import pytest
import torch
import torch.nn.functional as F

from motionrag.backbones.base import MotionInput
from motionrag.backbones.dynamicrafter import DynamiCrafter, drop, dropped, with_image
from motionrag.backbones.dynamicrafter_unet import DynamiCrafterUNet
from motionrag.backbones.dynamicrafter_weights import unet_config, unet_state
from motionrag.modules.ddim import Schedule, Step, ddim_sigma, ddim_step, noise_from_velocity
from motionrag.modules.diffusion import add_noise, v_loss, velocity, x0_from_velocity
from motionrag.modules.fusion import fuse_references
from motionrag.modules.motion_adapter import MotionAdapter

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


def test_dc_condition_dropout(case):
    c, share = case.constructor, case.constructor["uncond_prob"]
    latents = case["in.vae_latents"].transpose(1, 2) * c["scale_factor"]
    chosen = slice(c["cond_frame_index"], c["cond_frame_index"] + 1)
    no_text, no_image = dropped(case["in.random_num"], share)
    text, empty = case["in.text_emb"], case["in.null_text_emb"][None]
    grey = torch.zeros(1, 1, 1, 1)
    kept = fuse_references(case["in.ref_features"], c["ref_fusion_type"])
    never, always = (torch.full((len(text),), value) for value in (False, True))
    channels = latents.shape[2]
    case.check(
        z=latents.transpose(1, 2),
        prompt=drop(text, empty, no_text),
        inference_prompt=drop(text, empty, never),
        embedder_input=drop(case["in.frames"][:, :, c["cond_frame_index"]], grey, no_image),
        c_concat=with_image(latents, latents[:, chosen])[:, :, channels:].transpose(1, 2),
        action_kept=drop(kept, case["in.null_features"], never),
        action_dropped=drop(kept, case["in.null_features"], always),
    )


# --- with the UNet of another case ------------------------------------------------------------------------------------


@pytest.fixture
def network(case):
    """Our backbone around the UNet that the case names, and its motion adapter, attached."""
    params, weights = case.constructor["unet"], case.weights()
    unet = DynamiCrafterUNet(**unet_config(params) | {"text_tokens": case["in.prompt"].shape[1]})
    branch = {k: v for k, v in weights.items() if k.split(".")[-2] in ("to_q_a", "to_k_a", "to_v_a")}
    unet.load_state_dict(unet_state({k: v for k, v in weights.items() if k not in branch}))
    tiny = DynamiCrafter.tiny(text=str)  # for the parts that a UNet does not need
    sampler = case.constructor.get("sampler", {})
    options = {}
    if sampler:
        options = {
            "spacing": SPACING[sampler["timestep_spacing"]],
            "eta": sampler["eta"],
            "guidance_rescale": sampler["guidance_rescale"],
        }
    side = tiny.spatial * 2 ** len(params["channel_mult"])
    backbone = DynamiCrafter(
        tiny.vae, unet, str, tiny.image_encoder, tiny.image_resampler, schedule_of(case.constructor["diffusion"]),
        frames=params["temporal_length"], height=side, width=side, **options,
    )  # fmt: skip
    adapter = MotionAdapter.for_modules(backbone.adapter_sites(), case["in.action"].shape[-1])
    motion = {}
    for key, value in branch.items():  # <site>.to_q_a.weight -> <site with slashes>.to_q.weight
        site, name = key.split(".to_")
        motion[f"{site.replace('.', '/')}.to_{name[0]}.weight"] = value
    adapter.load_state_dict(motion)
    return backbone, adapter.requires_grad_(False).attach(backbone.adapter_sites())


def context(case, prefix=""):
    """Text and image tokens in the order our UNet takes them."""
    return torch.cat([case[f"in.{prefix}prompt"], case[f"in.{prefix}image"]], dim=1)


def frames_first(x):
    """Between the reference's (..., c, t, h, w) and our (..., t, c, h, w)."""
    return x.transpose(-4, -3)


def test_dc_training_loss(case, network):
    backbone, adapter = network
    schedule, t, noise = backbone.schedule, case["in.timesteps"], frames_first(case["in.noise"])
    abar = schedule.abar[t]
    x0 = schedule.rescale(frames_first(case["in.z"]), t)
    x_t = add_noise(x0, noise, abar)
    inputs = x_t, frames_first(case["in.image_latents"]), context(case), t, case["in.fs"]
    with adapter.use(case["in.action"]):
        motion = backbone.predict(*inputs)
    with adapter.use(None):
        bare = backbone.predict(*inputs)
    case.check(
        x_start_scaled=frames_first(x0),
        x_noisy=frames_first(x_t),
        target=frames_first(velocity(x0, noise, abar)),
        model_output=frames_first(motion),
        loss=v_loss(motion, x0, noise, abar),
        model_output_visual=frames_first(bare),
        loss_visual=v_loss(bare, x0, noise, abar),
    )


@pytest.mark.parametrize(
    "case",
    [
        "dc_ddim_eta0_uniform",
        "dc_ddim_eta1_uniform_rescale",
        "dc_ddim_eta1_trailing_rescale",
        "dc_ddim_eta0_trailing_nocfg",
    ],
    indirect=True,
)
def test_dc_ddim(case, network):
    backbone, adapter = network
    sampler = case.constructor["sampler"]
    null, tokens = case["in.uc_action"], case["in.action"]
    states = list(
        backbone.denoise(
            frames_first(case["in.x_T"]), frames_first(case["in.image_latents"]), context(case),
            context(case, "uc_"), steps=sampler["S"], guidance=sampler["unconditional_guidance_scale"],
            fs=case["in.fs"], noises=frames_first(case["in.noises"]), motion=MotionInput(adapter, tokens, null),
        )
    )  # fmt: skip
    outputs = {
        "steps_t": torch.tensor([state.t for state in states]),
        "samples": frames_first(states[-1].latents),
        "x_prev": frames_first(torch.stack([state.latents for state in states])),
        "pred_x0": frames_first(torch.stack([state.x0 for state in states])),
        "model_out_cond": frames_first(torch.stack([state.predictions[-1] for state in states])),
    }
    if len(states[0].predictions) > 1:
        outputs["model_out_uncond"] = frames_first(torch.stack([state.predictions[0] for state in states]))
    case.check(**outputs)
