"""DynamiCrafter's networks against the reference's numbers; motion enters through the motion adapter alone."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from einops import rearrange

from motionrag.backbones.dynamicrafter_unet import (
    CrossAttention,
    DynamiCrafterUNet,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    timestep_embedding,
)
from motionrag.backbones.dynamicrafter_weights import (
    autoencoder_config,
    autoencoder_state,
    unet_config,
    unet_state,
)
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler

FOLDER = Path(os.environ.get("MOTIONRAG_PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def load(module, state):
    """Strict load into eval mode; the reference's motion branch is no part of our networks."""
    module.load_state_dict({k: v for k, v in unet_state(state).items() if not of_adapter(k)})
    return module.eval()


def of_adapter(key):
    return key.endswith(("_a.weight", "alpha_action"))


def attach(modules, state):
    """A motion adapter on `modules` (site name -> attention) with the reference's weights to_{q,k,v}_a, all used."""
    used = {name: {f"to_{x}.weight": state[f"{name}.to_{x}_a.weight"] for x in "qkv"} for name in modules}
    width = next(iter(used.values()))["to_k.weight"].shape[1]
    adapter = MotionAdapter.for_modules(modules, width)
    for name, weights in used.items():
        adapter.site(name).load_state_dict(weights)
    assert sum(k.endswith("_a.weight") for k in state) == 3 * len(used)
    return adapter.attach(modules)


def sizes(constructor, switches=(), **names):
    """The reference's arguments under our names; `switches` must be as we have them."""
    assert all(constructor.get(switch, on) == on for switch, on in dict(switches).items())
    return {ours: constructor[theirs] for ours, theirs in names.items() if theirs in constructor}


def test_dc_timestep_embedding(case):
    even, odd = case.constructor["dims"]
    steps = case["in.timesteps"]
    case.check(even=timestep_embedding(steps, even), odd=timestep_embedding(steps, odd))


def test_dc_image_proj_resampler(case):
    resampler = Resampler(**case.constructor).eval()
    resampler.load_state_dict(case.weights())
    case.check(y=resampler(case["in.x"]))


def test_dc_cross_attention(case):
    x, text, image, motion = (case[f"in.{name}"] for name in ("x", "prompt", "image", "action"))

    def run(name):
        kind, state = case.constructor[name], case.weights(f"{name}.")
        names = dict(
            dim="query_dim",
            heads="heads",
            dim_head="dim_head",
            context_dim="context_dim",
            learn_image_scale="image_cross_attention_scale_learnable",
        )
        attention = load(CrossAttention(**sizes(kind, **names)), state)
        scale = 1 + state["alpha_action"].tanh().item() if "alpha_action" in state else 1.0
        motion_branch = nullcontext()
        if kind.get("action_cross_attention"):
            adapter = attach({name: attention}, {f"{name}.{k}": v for k, v in state.items()})
            motion_branch = adapter.use(motion, scale)
        with motion_branch:
            return attention(x, text, image) if "context_dim" in kind else attention(x)

    case.check(y_full=run("full"), y_learnable=run("learn"), y_text_image=run("base"), y_self=run("self"))


TRANSFORMER = dict(channels="in_channels", heads="n_heads", dim_head="d_head", depth="depth")


def test_dc_spatial_transformer(case):
    switches = dict(disable_self_attn=False, use_linear=True, image_cross_attention=True)
    names = TRANSFORMER | dict(context_dim="context_dim")
    module = load(SpatialTransformer(**sizes(case.constructor, switches, **names)), case.weights())
    sites = {
        f"transformer_blocks.{i}.attn2": block.attn2 for i, block in enumerate(module.transformer_blocks)
    }
    text, image = case["in.prompt"], case["in.image"]
    with attach(sites, case.weights()).use(case["in.action"]):
        case.check(y=module(case["in.x"], text, image), y_small=module(case["in.x_small"], text, image))


def test_dc_temporal_transformer(case):
    switches = dict(only_self_att=True, causal_attention=False, relative_position=False)

    def run(name, x):
        kind = case.constructor[name]
        module = load(TemporalTransformer(**sizes(kind, switches, **TRANSFORMER)), case.weights(f"{name}."))
        y = module(rearrange(x, "b c t h w -> (b t) c h w"), frames=x.shape[2])
        return rearrange(y, "(b t) c h w -> b c t h w", t=x.shape[2])

    x, small = case["in.x"], case["in.x_small"]
    case.check(y_linear=run("linear", x), y_conv=run("conv", x))
    case.check(y_linear_small=run("linear", small), y_conv_small=run("conv", small))


def test_dc_resblock_temporal_conv(case):
    switches = dict(dims=2, use_temporal_conv=True, tempspatial_aware=False)
    names = {x: x for x in ("channels", "emb_channels", "out_channels", "dropout")}
    block = load(ResBlock(**sizes(case.constructor, switches, **names)), case.weights())
    x, emb, frames = case["in.x"], case["in.emb"], case.constructor["frames"]
    case.check(
        y=block(x, emb, frames),
        y_spatial=block.spatial(x, emb),
        y_small=block(case["in.x_small"], emb, frames),
    )


def test_dc_unet(case):
    state, text = case.weights(), case["in.prompt"]
    unet = load(DynamiCrafterUNet(**unet_config(case.constructor), text_tokens=text.shape[1]), state)
    context = torch.cat([text, case["in.image"]], dim=1)
    with attach(unet.adapter_sites(), state).use(case["in.action"]):
        y = unet(case["in.x"], case["in.timesteps"], context, case["in.fs"])
        case.check(y=y, y_default_fs=unet(case["in.x"], case["in.timesteps"], context))


def test_dc_autoencoder_kl(case):
    autoencoder = AutoencoderKL(**autoencoder_config(case.constructor)).eval()
    autoencoder.load_state_dict(autoencoder_state(case.weights()))
    posterior = autoencoder.encode(case["in.x"]).latent_dist
    sample = posterior.mean + posterior.std * case["in.noise"]
    case.check(mean=posterior.mean, logvar=posterior.logvar, sample=sample)
    case.check(decoded=autoencoder.decode(case["in.z_in"]).sample)


def test_published_adapter_fits_the_full_unet():
    """Names and widths of all sites are those that the published adapter's keys give."""
    path = FOLDER / "checkpoint_keys.json"
    if not path.exists():
        pytest.skip(f"no {path}: set MOTIONRAG_PARITY_DIR")
    file = json.loads(path.read_text())["files"]["checkpoints/DynamiCrafter/Motion-Adapter.ckpt"]
    keys = file["keys"] | file["to_q_a_keys_not_saved_by_the_published_config"]
    with torch.device("meta"):
        unet = DynamiCrafterUNet()
        adapter = MotionAdapter.for_modules(unet.adapter_sites(), unet.config.context_dim)
    ours = {
        f"model.diffusion_model.{name}.to_{x}_a.weight": list(
            getattr(adapter.site(name), f"to_{x}").weight.shape
        )
        for name in adapter.site_names
        for x in "qkv"
    }
    assert ours == {key: shape for key, shape in keys.items() if of_adapter(key)}
