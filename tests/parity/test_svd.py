"""Stable Video Diffusion against the reference's numbers: objective, and the whole UNet with motion adapter."""

from types import SimpleNamespace

import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from torch import nn

from motionrag.backbones import svd
from motionrag.backbones.svd import SCHEDULER, SVD
from motionrag.modules.diffusion import edm_sigma, image_noise_sigma
from motionrag.modules.motion_adapter import MotionAdapter


class Network(nn.Module):
    """Stands in for a network that the case does not run; pictures are as large as their latents."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(1,), **config)


class GivenLatents(Network):
    """An autoencoder whose encoder gives these latents, one after the other."""

    def __init__(self, *latents, scaling_factor):
        super().__init__(scaling_factor=scaling_factor)
        self.latents = iter(latents)

    def encode(self, pixels):
        latents = next(self.latents)
        assert len(latents) == len(pixels)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


class GivenOutput(Network):
    """A UNet that always says the same and keeps what it was asked."""

    def __init__(self, output):
        super().__init__(cross_attention_dim=8)
        self.output = output

    def forward(self, sample, timestep, **options):
        self.asked = {"sample": sample, "timestep": timestep, **options}
        return (self.output,)


def test_svd_training_loss(case, monkeypatch):
    sizes, sigma, noise = case.constructor, case["in.sigmas"], case["in.noise"]
    batch, frames, _, height, width = noise.shape
    vae = GivenLatents(
        case["in.vae_latents"].flatten(0, 1),
        case["in.vae_condition_latents"],
        scaling_factor=sizes["vae_scaling_factor"],
    )
    unet = GivenOutput(case["in.model_output"])
    backbone = SVD(
        vae, Network(), unet, None, frames, height, width, fps_id=sizes["fps"], motion_bucket=sizes["motion_bucket_id"]
    )  # fmt: skip
    video = torch.zeros(batch, frames, 3, height, width)
    level = case["in.noise_aug_strength"]
    latents = backbone.encode_video(video)
    image_latents = backbone.encode_image(video[:, 0], torch.Generator(), level)
    context = backbone.null_context(video[:, 0])
    noisy = latents + sigma.reshape(-1, 1, 1, 1, 1) * noise
    denoised = backbone.denoise(noisy, sigma, image_latents, context, level)
    # the loss itself, with the case's random numbers
    monkeypatch.setattr(svd, "edm_sigma", lambda *_: sigma)
    monkeypatch.setattr(svd, "randn_tensor", lambda *_: noise)
    case.check(
        latents=latents,
        denoised=denoised,
        unet_input=unet.asked["sample"],
        # the reference squeezes it for a batch of one
        unet_timestep=unet.asked["timestep"].reshape(case["out.unet_timestep"].shape),
        added_time_ids=unet.asked["added_time_ids"],
        loss=backbone.loss(latents, image_latents, context, None, level),
    )
    for draw, name in ((edm_sigma, "latents_noise_config"), (image_noise_sigma, "condition_noise_config")):
        logs = draw(100_000, torch.Generator().manual_seed(0)).log()
        torch.testing.assert_close(logs.mean().item(), sizes[name]["mean"], atol=0.02, rtol=0)
        torch.testing.assert_close(logs.std().item(), sizes[name]["std"], atol=0.02, rtol=0)


@torch.no_grad()
def test_svd_unet_adapter(case):
    unet = UNetSpatioTemporalConditionModel(**case.constructor["UNetSpatioTemporalConditionModel"])
    state = case.weights()
    unet.load_state_dict({k: v for k, v in state.items() if ".processor." not in k})
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    backbone = SVD(Network(), Network(), unet, scheduler, adapter_query="output")
    sites = backbone.adapter_sites()
    assert sorted(f"{name}.processor" for name in sites) == sorted(case.constructor["adapter_modules"])
    adapter = MotionAdapter.for_modules(
        sites, case["in.motion_tokens"].shape[-1], query=backbone.adapter_query
    )
    for name in sites:
        projections = {f"to_{p}.weight": state[f"{name}.processor.to_{p}_ip.0.weight"] for p in "qkv"}
        adapter.site(name).load_state_dict(projections)
    adapter.attach(sites)

    def run(image, scale=1.0):
        with adapter.use(case["in.motion_tokens"], scale):
            return unet(case["in.sample"], case["in.timestep"], image, case["in.added_time_ids"]).sample

    one, several = case["in.image_embeds"], case["in.image_embeds_multi"]
    case.check(y=run(one), y_scale0=run(one, 0.0), y_multi=run(several))
