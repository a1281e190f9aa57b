"""Resampler, CAMA, fusion and the motion adapter against the reference's numbers."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0

from motionrag.modules.cama import (
    CAMA,
    SinusoidPositions,
    block_causal_mask,
    cama_losses,
    sequence_order,
    sinusoid_table,
)
from motionrag.modules.fusion import fuse_references
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler


def load(module, state):
    """Strict load into eval mode."""
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("case", ["resampler_plain", "resampler_video_length"], indirect=True)
def test_resampler(case):
    module = load(Resampler(**case.constructor), case.weights())
    case.check(y=module(case["in.x"]))


def test_resampler_cls_token(case):
    module = load(Resampler(**case.constructor), case.weights())
    cls, tokens = module(case["in.x"], return_cls_tokens=True)
    case.check(tokens=module(case["in.x"]), cls=cls, tokens_ret=tokens)


def test_sinusoid_pe(case):
    module = SinusoidPositions(**case.constructor)
    # the released motion position codes: 256 rows, width 1024
    table = sinusoid_table(256, case["out.table_1024_rows"].shape[1])[case["in.rows"]]
    case.check(y=module(case["in.x"]), pos_table=module.table, table_1024_rows=table)
    assert not module.state_dict()


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("case", ["cama_action_transformer"], indirect=True)
def test_cama(case, no_grad):
    sizes = case.constructor
    layer = sizes["transformer"]["encoder_layer"]
    motion_resampler = load(Resampler(**sizes["vision_proj"]), case.weights("vision_proj."))
    cama = CAMA(
        Resampler(**sizes["condition_proj"]),
        width=layer["d_model"],
        depth=sizes["transformer"]["num_layers"],
        heads=layer["nhead"],
        ff_dim=layer["dim_feedforward"],
        max_positions=sizes["vision_pe"]["max_length"],
        max_appearance_positions=sizes["condition_pe"]["max_length"],
    )
    names = {"condition_proj.": "appearance_resampler.", "transformer.": "transformer.", "sos_token": "sos"}
    load(cama, {b + k: v for a, b in names.items() for k, v in case.weights(a).items()})

    with torch.set_grad_enabled(not no_grad):
        features = case["in.ref_motion_features"]
        references = motion_resampler(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        truth = sequence_order(references, motion_resampler(case["in.target_motion_features"]))
        ref_look, look = case["in.ref_appearance_features"], case["in.target_appearance_features"]
        appearance = sequence_order(ref_look, look)
        null = motion_resampler(case["in.null_motion_features"][None])[0]
        prediction = cama(references, ref_look, look)
        predicted = cama.predict(references, ref_look, look)
        losses, last = cama_losses(prediction, truth), cama_losses(prediction, truth, target_only=True)
        case.check(
            mask=block_causal_mask(truth.shape[1], truth.shape[2]),
            motion_tokens=truth,
            condition_tokens=cama.appearance_tokens(appearance),
            transformer_input=cama.transformer_input(references.flip(1), appearance),
            pred=prediction,
            predict=predicted,
            null_motion_tokens=null,
            predict_cfg=torch.cat([null.expand_as(predicted), predicted]),
            loss_mse=losses["mse"],
            loss_smooth=losses["smooth_l1"],
            loss_last_mse=last["mse"],
            loss_last_smooth=last["smooth_l1"],
        )


def test_condition_fusion(case):
    x, distances = case["in.condition_emb"], case["in.distance"]
    case.check(**{how: fuse_references(x, how, distances) for how in ("mean", "weight", "concat", "top1")})


def test_stage1_motion_condition(case):
    resampler = load(Resampler(**case.constructor), case.weights())
    features, distances = case["in.ref_features"], case["in.distance"]
    null = resampler(case["in.null_features"][None])
    for how in ("mean", "weight", "concat", "top1"):
        tokens = resampler(fuse_references(features, how, distances))
        case.check(**{how: tokens})
        if how != "concat":  # the reference cannot run it with guidance; here it is no special case
            case.check(**{f"{how}_cfg": torch.cat([null.expand_as(tokens), tokens])})


def attach(adapter, modules, state, path):
    """Fill the adapter from the reference's processor weights and hook it in."""
    for name in modules:
        weights = {f"to_{p}.weight": state[path.format(name, p)] for p in "qkv"}
        adapter.site(name).load_state_dict(weights)
    return adapter.attach(modules)


@pytest.mark.parametrize("case", ["cog_adapter_attn_rotary", "cog_adapter_attn_norotary"], indirect=True)
def test_cog_attention(case):
    attention = Attention(**case.constructor["Attention"], processor=CogVideoXAttnProcessor2_0())
    state = case.weights()
    load(attention, {k: v for k, v in state.items() if not k.startswith("processor.")})
    modules = {"attn": attention}
    adapter = MotionAdapter.for_modules(modules, case["in.motion_tokens"].shape[-1])
    attach(adapter, modules, state, "processor.to_{1}_ip.0.weight")
    rotary = None
    if "in.rotary_cos" in case.tensors:
        rotary = (case["in.rotary_cos"], case["in.rotary_sin"])

    def run(tokens, scale=1.0):
        with adapter.use(tokens, scale):
            return attention(
                case["in.hidden_states"],
                encoder_hidden_states=case["in.encoder_hidden_states"],
                image_rotary_emb=rotary,
            )

    tokens, half = case["in.motion_tokens"], case["in.motion_tokens_half"]
    for suffix, out in {
        "": run(tokens),
        "_scale_half": run(tokens, 0.5),
        "_scale0": run(tokens, 0.0),
        "_batch_half": run(half),
    }.items():
        case.check(**{f"hidden{suffix}": out[0], f"encoder_hidden{suffix}": out[1]})
    with pytest.raises(ValueError, match="cannot serve"):  # the reference silently adds nothing here
        run(torch.cat([tokens, tokens]))


@torch.no_grad()
def test_cog_transformer_adapter(case):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import get_resize_crop_region_for_grid

    sizes = case.constructor["CogVideoXTransformer3DModel"]
    transformer = CogVideoXTransformer3DModel(**sizes)
    state = case.weights()
    load(transformer, {k: v for k, v in state.items() if ".processor." not in k})
    modules = {n: m for n, m in transformer.named_modules() if n.endswith("attn1")}
    adapter = MotionAdapter.for_modules(modules, case["in.motion_tokens"].shape[-1])
    attach(adapter, modules, state, "{0}.processor.to_{1}_ip.0.weight")

    def rotary(frames):
        picture, patch = case.constructor["rotary"], sizes["patch_size"]
        pixels = picture["vae_scale_factor_spatial"] * patch
        grid = picture["height_px"] // pixels, picture["width_px"] // pixels
        base = sizes["sample_width"] // patch, sizes["sample_height"] // patch
        return get_3d_rotary_pos_embed(
            embed_dim=sizes["attention_head_dim"],
            crops_coords=get_resize_crop_region_for_grid(grid, *base),
            grid_size=grid,
            temporal_size=frames,
        )

    seen = {}

    def keep(module, args, kwargs, output):
        seen["in_hidden"], seen["in_encoder_hidden"] = (
            kwargs["hidden_states"],
            kwargs["encoder_hidden_states"],
        )
        seen["out_hidden"], seen["out_encoder_hidden"] = output

    def run(hidden, scale=1.0):
        with adapter.use(case["in.motion_tokens"], scale):
            return transformer(
                hidden,
                case["in.encoder_hidden_states"],
                case["in.timestep"],
                image_rotary_emb=rotary(hidden.shape[1]),
                return_dict=False,
            )[0]

    cos, sin = rotary(case["in.hidden_states"].shape[1])
    hook = modules["transformer_blocks.0.attn1"].register_forward_hook(keep, with_kwargs=True)
    case.check(rotary_cos=cos, rotary_sin=sin, sample=run(case["in.hidden_states"]))
    hook.remove()
    case.check(**{f"block0_attn_{name}": value for name, value in seen.items()})
    case.check(sample_scale0=run(case["in.hidden_states"], 0.0))

    # other frame counts: diffusers replaces its learned position table, and so do we
    other = case["in.hidden_states_other_frames"]
    case.check(sample_other_frames=run(other))
    embed = transformer.patch_embed
    table = embed._get_positional_embeddings(
        sizes["sample_height"],
        sizes["sample_width"],
        (other.shape[1] - 1) * sizes["temporal_compression_ratio"] + 1,
    )
    case.check(pos_embedding_other_frames=table)


def test_svd_adapter_attn(case):
    attention = Attention(**case.constructor["Attention"])
    state = case.weights()
    load(attention, {k: v for k, v in state.items() if not k.startswith("processor.")})
    modules = {"attn2": attention}
    adapter = MotionAdapter.for_modules(modules, case["in.motion_tokens"].shape[-1])
    attach(adapter, modules, state, "processor.to_{1}_ip.0.weight")

    def run(image, scale=1.0):  # motion tokens of a sample serve all of its frames
        with adapter.use(case["in.motion_tokens"], scale):
            return attention(case["in.hidden_states"], encoder_hidden_states=image)

    one, several = case["in.image_embeds"], case["in.image_embeds_multi"]
    case.check(y=run(one), y_repeat=run(one), y_scale0=run(one, 0.0))
    case.check(y_multi=run(several), y_multi_scale_half=run(several, 0.5))
