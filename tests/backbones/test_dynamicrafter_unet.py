"""DynamiCrafter's UNet beyond the reference's numbers, and reading published checkpoints."""

import argparse
import inspect

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from motionrag.backbones.dynamicrafter_unet import TINY_UNET, UNETS, DynamiCrafterUNet, SpatialTransformer
from motionrag.backbones.dynamicrafter_weights import (
    autoencoder_config,
    autoencoder_state,
    clip_image_state,
    load_checkpoint,
    unet_config,
)
from motionrag.errors import MotionRAGError
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler

SMALL = TINY_UNET | dict(context_dim=12, num_head_channels=8, text_tokens=5)
FRAMES, IMAGE_TOKENS = 4, 2


@pytest.fixture(scope="module")
def unet():
    """A small frozen UNet; the branches that begin at zero are filled, so that everything counts."""
    torch.manual_seed(0)
    unet = DynamiCrafterUNet(**SMALL).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.fixture
def inputs():
    """x, timesteps and context of two samples."""
    torch.manual_seed(1)
    context = torch.randn(2, SMALL["text_tokens"] + FRAMES * IMAGE_TOKENS, SMALL["context_dim"])
    return torch.randn(2, 8, FRAMES, 8, 4), torch.tensor([3, 900]), context


def differ(a, b):
    return (a - b).abs().max() > 1e-3


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", [("1024", 1438854980), ("256", 1438854996)])
def test_full_size(name, parameters):
    with torch.device("meta"):
        unet = DynamiCrafterUNet(**UNETS[name])
    assert sum(p.numel() for p in unet.parameters()) == parameters
    sites = unet.adapter_sites()
    assert len(sites) == 16 == sum(isinstance(m, SpatialTransformer) for m in unet.modules())
    assert all(site.to_out[0].in_features == 64 * site.heads for site in sites.values())
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    attention = "input_blocks.4.1.transformer_blocks.0.attn2"
    assert shapes[f"{attention}.to_k_ip.weight"] == (640, 1024)
    assert (f"{attention}.alpha" in shapes) == (name == "256")
    assert shapes["init_attn.0.proj_in.weight"] == (512, 320)  # 8 heads of 64, whatever the width
    assert shapes["middle_block.3.temopral_conv.conv4.3.weight"] == (1280, 1280, 3, 1, 1)
    assert shapes["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)  # a level without transformers
    assert shapes["out.2.weight"] == (4, 320, 3, 3)


def test_original_config():
    """Settings of the original's config file become ours, or are refused."""
    published = dict(
        in_channels=8, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2,
        channel_mult=[1, 2, 4, 4], dropout=0.1, num_head_channels=64, transformer_depth=1, context_dim=1024,
        use_linear=True, use_checkpoint=True, temporal_conv=True, temporal_attention=True, temporal_selfatt_only=True,
        use_relative_position=False, use_causal_attention=False, temporal_length=16, addition_attention=True,
        image_cross_attention=True, default_fs=10, fs_condition=True,
    )  # fmt: skip
    defaults = {k: p.default for k, p in inspect.signature(DynamiCrafterUNet).parameters.items()}
    ours = unet_config(published)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in ours.items()}.items() <= defaults.items()
    assert set(defaults) - set(ours) == {
        "norm_num_groups",
        "image_cross_attention_scale_learnable",
        "text_tokens",
    }
    with pytest.raises(MotionRAGError, match="use_causal_attention=True"):
        unet_config(published | dict(use_causal_attention=True))
    with pytest.raises(MotionRAGError, match="num_heads=8"):
        unet_config(published | dict(num_heads=8))


@torch.no_grad()
def test_every_input_counts(unet, inputs):
    x, timesteps, context = inputs
    y = unet(x, timesteps, context)
    assert y.shape == (2, 4, *x.shape[2:])
    torch.testing.assert_close(unet(x, timesteps, context, torch.full((2,), SMALL.get("default_fs", 10))), y)
    assert differ(unet(x, timesteps, context, torch.tensor([3, 30])), y)
    assert differ(unet(x, timesteps + 50, context), y)
    for token in (0, SMALL["text_tokens"], -1):  # text, first frame's image, last frame's
        other = context.clone()
        other[:, token] += 1
        assert differ(unet(x, timesteps, other), y)
    for part in range(2):  # samples do not see each other
        alone = unet(x[part : part + 1], timesteps[part : part + 1], context[part : part + 1])
        torch.testing.assert_close(alone, y[part : part + 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_image_tokens_belong_to_their_frame():
    """In one spatial transformer, tokens of a frame reach that frame alone; text reaches all."""
    torch.manual_seed(0)
    layer = SpatialTransformer(16, 2, 8, context_dim=12, groups=4)
    nn.init.normal_(layer.proj_out.weight)
    x, text, image = torch.randn(FRAMES, 16, 4, 4), torch.randn(FRAMES, 5, 12), torch.randn(FRAMES, 2, 12)
    y = layer(x, text, image)
    image[2] += 1
    changed = (layer(x, text, image) - y).abs().amax((1, 2, 3)) > 1e-4
    assert changed.tolist() == [False, False, True, False]


@torch.no_grad()
def test_any_number_of_frames(unet, inputs):
    x, timesteps, context = inputs
    text = SMALL["text_tokens"]
    assert unet(x[:, :, :3], timesteps, context[:, : text + 3 * IMAGE_TOKENS]).shape == (2, 4, 3, 8, 4)


def test_sizes_that_do_not_fit(unet, inputs):
    x, timesteps, context = inputs
    with pytest.raises(ValueError, match="8 x 3 do not divide by 2"):
        unet(x[..., :3], timesteps, context)
    for tokens in (SMALL["text_tokens"], context.shape[1] - 1):
        with pytest.raises(ValueError, match=f"each of 4 frames, got {tokens} tokens"):
            unet(x, timesteps, context[:, :tokens])


@torch.no_grad()
def test_starts_as_nothing_and_runs_in_bf16(unet, inputs):
    assert not DynamiCrafterUNet(**SMALL)(*inputs).any()  # every branch ends in zeros
    x, timesteps, context = inputs
    low = DynamiCrafterUNet(**SMALL).eval().bfloat16()
    low.load_state_dict(unet.state_dict())
    y, y_low = unet(*inputs), low(x.bfloat16(), timesteps, context.bfloat16())
    assert y_low.dtype == torch.bfloat16
    assert (y_low - y).square().mean() < 1e-2 * y.square().mean()


def test_saved_and_read_again(unet, inputs, tmp_path):
    unet.save_pretrained(tmp_path)
    again = DynamiCrafterUNet.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with torch.no_grad():
        assert torch.equal(again(*inputs), unet(*inputs))


@pytest.mark.parametrize("trained", ["adapter", "unet"])
def test_gradient_checkpointing_changes_nothing(unet, inputs, trained):
    """Outputs and gradients, of a motion adapter in the frozen UNet or, with dropout, of the UNet itself.

    Only what forward keeps for backward shrinks.
    """
    sites = unet.adapter_sites()
    adapter = MotionAdapter.for_modules(sites, 6, init="reference").attach(sites)
    module = adapter if trained == "adapter" else unet
    motion = torch.randn(2, 3, 6)

    def run():
        torch.manual_seed(0)
        module.requires_grad_().zero_grad()
        if trained == "unet":
            unet.train()
        kept = []
        with adapter.use(motion):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
                y = unet(*inputs)
            y.square().mean().backward()
        return (y.detach(), [p.grad.clone() for p in module.parameters()]), sum(kept)

    try:
        plain, bytes_plain = run()
        unet.enable_gradient_checkpointing()
        checkpointed, bytes_checkpointed = run()
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)
        assert bytes_checkpointed < bytes_plain / 3
        assert len(plain[1]) == len(list(module.parameters()))
        assert differ(plain[0], unet_without(adapter, unet, inputs))
    finally:
        adapter.detach()
        unet.disable_gradient_checkpointing()
        unet.eval().requires_grad_(False).zero_grad()


@torch.no_grad()
def unet_without(adapter, unet, inputs):
    with adapter.use(None):
        return unet(*inputs)


# --- published files -------------------------------------------------------------------------------------------------

AUTOENCODER = dict(
    embed_dim=4,
    ddconfig=dict(
        double_z=True, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 2],
        num_res_blocks=1, attn_resolutions=[],
    ),
)  # fmt: skip
CLIP = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, hidden_act="gelu")


def modules(layers=1):
    """The five networks of a small model; the text model may lack the last layer."""
    torch.manual_seed(0)
    text = CLIPTextConfig(**CLIP, num_hidden_layers=layers, vocab_size=8, bos_token_id=1, eos_token_id=2)
    return dict(
        unet=DynamiCrafterUNet(**SMALL),
        vae=AutoencoderKL(**autoencoder_config(AUTOENCODER)),
        image_resampler=Resampler(16, 1, 8, 2, IMAGE_TOKENS, 16, 12, video_length=FRAMES),
        text=CLIPTextModel(text),
        image_encoder=CLIPVisionModel(
            CLIPVisionConfig(**CLIP, num_hidden_layers=1, image_size=8, patch_size=4)
        ),
    )


def replaced(key, *pairs):
    for ours, theirs in pairs:
        key = key.replace(ours, theirs)
    return key


def original_autoencoder(vae):
    """The original's names for diffusers' tensors."""
    top = len(vae.config.block_out_channels) - 1
    pairs = [(f"decoder.up_blocks.{i}.", f"decoder.up.{top - i}.") for i in range(top + 1)]
    pairs += [
        ("down_blocks", "down"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
        ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"), ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"), ("group_norm", "norm"), ("to_out.0", "proj_out"),
        ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
    ]  # fmt: skip
    return {
        replaced(k, *pairs): v[:, :, None, None] if "attentions" in k and v.ndim == 2 else v
        for k, v in vae.state_dict().items()
    }


def original_clip(state, *pairs):
    """OpenCLIP's names for transformers' tensors; q, k and v are one there."""
    pairs += (
        ("encoder.layers.", "transformer.resblocks."), ("layer_norm", "ln_"), ("self_attn", "attn"),
        ("fc1", "c_fc"), ("fc2", "c_proj"), ("position_embedding.weight", "positional_embedding"), ("embeddings.", ""),
    )  # fmt: skip
    renamed = {replaced(k, *pairs): v for k, v in state.items()}
    for key in [k for k in renamed if ".q_proj." in k]:
        parts = [renamed.pop(key.replace(".q_", f".{x}_")) for x in "qkv"]
        renamed[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return renamed


def original(parts):
    """The original's checkpoint of our networks, noise schedule included."""
    states = {
        "model.diffusion_model.": {
            k: v[..., None] if k.startswith("init_attn.0.proj") and v.ndim == 2 else v
            for k, v in parts["unet"].state_dict().items()
        },
        "first_stage_model.": original_autoencoder(parts["vae"]),
        "image_proj_model.": parts["image_resampler"].state_dict(),
        "cond_stage_model.model.": original_clip(
            parts["text"].state_dict(), ("final_layer_norm", "ln_final")
        )
        | {"text_projection": torch.zeros(16, 4), "logit_scale": torch.zeros(())},
        "embedder.model.visual.": original_clip(
            parts["image_encoder"].state_dict(),
            ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("patch_embedding", "conv1"),
        ) | {"proj": torch.zeros(16, 4)},
    }  # fmt: skip
    state = {prefix + key: value for prefix, part in states.items() for key, value in part.items()}
    return state | {"betas": torch.zeros(10), "embedder.model.logit_scale": torch.zeros(())}


@pytest.fixture(scope="module")
def truth():
    return modules(layers=2)


@pytest.fixture(scope="module")
def state(truth):
    return original(truth)


@pytest.fixture
def save(tmp_path):
    def save(content):
        torch.save(content, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return save


def other_modules(**options):
    """Networks of the same sizes and other values."""
    parts = modules(**options)
    with torch.no_grad():
        for module in parts.values():
            for parameter in module.parameters():
                parameter.fill_(7)
    return parts


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("container", ["state_dict", "module", None])
def test_published_file(truth, state, save, container):
    content = {
        "state_dict": {"state_dict": state},
        "module": {"module": {f"_forward_module.{k}": v for k, v in state.items()}},
        None: state,
    }[container]
    parts = other_modules()  # the text model has one layer, the file two
    load_checkpoint(save(content), **parts)
    assert all(same(module, truth[part]) for part, module in parts.items())


def test_published_file_into_the_meta_device(truth, state, save):
    with torch.device("meta"):
        parts = dict(unet=DynamiCrafterUNet(**SMALL), vae=AutoencoderKL(**autoencoder_config(AUTOENCODER)))
    load_checkpoint(save({"state_dict": state}), **parts)
    assert all(same(module, truth[part]) for part, module in parts.items())


def test_older_name_of_the_256_model(truth, state, save):
    old = {k.replace("fps_embedding", "framestride_embed"): v for k, v in state.items()}
    unet = other_modules()["unet"]
    load_checkpoint(save({"state_dict": old}), unet=unet)
    assert same(unet, truth["unet"])


def broken(state, key, value=None):
    rest = {k: v for k, v in state.items() if k != key}
    return rest if value is None else rest | {key: value}


QUERY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: broken(s, QUERY), "part unet, does not fit .*1 missing: middle_block.1"),
        (lambda s: broken(s, QUERY, torch.zeros(3, 5)), r"to_q.weight \(3, 5\) instead of \(64, 64\)"),
        (lambda s: s | {QUERY.replace("to_q.weight", "alpha"): torch.zeros(())}, "1 unexpected: .*alpha"),
        (
            lambda s: s | {"first_stage_model.loss.weight": torch.zeros(2)},
            "part vae, .*1 unexpected: loss.weight",
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("model.")},
            "no model.diffusion_model. keys",
        ),
        (lambda s: {"state_dict": [1, 2]}, "holds no tensors by name"),
        (lambda s: {"state_dict": s, "args": argparse.Namespace()}, "may run code"),
    ],
)
def test_files_that_do_not_fit(state, save, change, match):
    parts, untouched = other_modules(), other_modules()
    with pytest.raises(MotionRAGError, match=match):
        load_checkpoint(save(change(state)), **parts)
    assert all(same(module, untouched[part]) for part, module in parts.items())


def test_damaged_and_missing_files(state, save, tmp_path):
    path = save({"state_dict": state})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(MotionRAGError, match="damaged or cut off"):
        load_checkpoint(path)
    with pytest.raises(MotionRAGError, match="no checkpoint"):
        load_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="unknown parts"):
        load_checkpoint(path, clip=nn.Linear(1, 1))


def test_autoencoder_names_are_those_of_diffusers():
    """At full size, against diffusers' own conversion."""
    full = dict(ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, resolution=256)
    with torch.device("meta"):
        vae = AutoencoderKL(**autoencoder_config(AUTOENCODER | dict(ddconfig=AUTOENCODER["ddconfig"] | full)))
    theirs = original_autoencoder(vae)
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    ours = {k: v.shape for k, v in autoencoder_state(theirs).items()}
    config = dict(down_block_types=range(4), up_block_types=range(4))
    diffusers = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in theirs.items()}, config)
    assert (
        ours
        == {k: v.shape for k, v in diffusers.items()}
        == {k: v.shape for k, v in vae.state_dict().items()}
    )


@torch.no_grad()
def test_clip_names_by_what_they_compute():
    """An OpenCLIP block is a pre-norm transformer layer with GELU; renamed, it computes the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0, "gelu", norm_first=True, batch_first=True).eval()
    names = ("self_attn.", "attn."), ("linear1", "mlp.c_fc"), ("linear2", "mlp.c_proj"), ("norm", "ln_")
    block = {f"transformer.resblocks.0.{replaced(k, *names)}": v for k, v in layer.state_dict().items()}
    encoder = modules()["image_encoder"]
    missing, unexpected = encoder.load_state_dict(clip_image_state(block), strict=False)
    assert not unexpected
    assert all("encoder.layers" not in key for key in missing)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(
        encoder.encoder(inputs_embeds=x).last_hidden_state, layer(x), rtol=1e-5, atol=1e-5
    )
