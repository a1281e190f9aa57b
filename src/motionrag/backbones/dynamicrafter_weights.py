"""The published DynamiCrafter checkpoints (`Doubiiu/DynamiCrafter_1024`, `_512` and `DynamiCrafter`, 256 x 256).

One file holds every network. What its keys start with, and what becomes of them here:

| part | keys | module |
|---|---|---|
| unet | model.diffusion_model. | `DynamiCrafterUNet` |
| vae | first_stage_model. | diffusers' `AutoencoderKL` |
| image_resampler | image_proj_model. | `Resampler` with `video_length` |
| text | cond_stage_model.model. | transformers' `CLIPTextModel` (OpenCLIP ViT-H/14) |
| image_encoder | embedder.model.visual. | transformers' `CLIPVisionModel` (the same model's image half) |

The noise schedule's buffers are in there too; they are computed here, not read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from motionrag.checkpoint import check_state, read_pickled
from motionrag.errors import MotionRAGError

State = dict[str, Tensor]

# Switches of the original that every published model sets alike, so that they are no options of ours.
_FIXED = dict(
    use_linear=True, temporal_conv=True, temporal_attention=True, temporal_selfatt_only=True,
    temporal_self_att_only=True, use_relative_position=False, use_causal_attention=False, addition_attention=True,
    image_cross_attention=True, fs_condition=True,
)  # fmt: skip
# What has no counterpart: checkpointing is switched at run time, without position codes any number of frames will do,
# and motion enters through the motion adapter.
_LEFT_OUT = {"use_checkpoint", "temporal_length", "action_cross_attention"}
_SIZES = {
    "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
    "num_head_channels", "transformer_depth", "context_dim", "dropout", "image_cross_attention_scale_learnable",
    "default_fs",
}  # fmt: skip


def unet_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `DynamiCrafterUNet` from the `unet_config.params` of an original config file.

    Raises MotionRAGError for a switch that no published DynamiCrafter uses.
    """
    for key, value in params.items():
        if key in _FIXED and value != _FIXED[key]:
            raise MotionRAGError(f"unet_config {key}={value}: DynamiCrafter has {_FIXED[key]}, set it so")
        if key not in _FIXED and key not in _LEFT_OUT | _SIZES:
            raise MotionRAGError(f"unet_config {key}={value} is no setting of DynamiCrafter: remove it")
    return {key: value for key, value in params.items() if key in _SIZES}


def autoencoder_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKL` from the `first_stage_config.params` of an original config file.

    Raises MotionRAGError for a layout that it has not: attention outside the middle, or other widths of the latents.
    """
    sizes = params["ddconfig"]
    if sizes["attn_resolutions"] or not sizes["double_z"] or params["embed_dim"] != sizes["z_channels"]:
        raise MotionRAGError(
            "first_stage_config: expected no attn_resolutions, double_z and embed_dim equal to z_channels, got "
            f"{sizes['attn_resolutions']}, {sizes['double_z']}, {params['embed_dim']} and {sizes['z_channels']}"
        )
    levels = len(sizes["ch_mult"])
    return dict(
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_ch"],
        latent_channels=sizes["z_channels"],
        block_out_channels=tuple(sizes["ch"] * mult for mult in sizes["ch_mult"]),
        layers_per_block=sizes["num_res_blocks"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=sizes["resolution"],
        scaling_factor=0.18215,
    )


# --- names: each takes the original's tensors of one part, without what their keys start with -------------------------


def unet_state(original: Mapping[str, Tensor]) -> State:
    """The UNet's tensors under our names.

    Ours are the original's, but for two things: 1x1 convolutions over a sequence (the projections of `init_attn`) are
    linear layers here, and the 256 x 256 model calls its `fps_embedding` by an older name.
    """
    return {
        key.replace("framestride_embed", "fps_embedding"): value[..., 0] if value.ndim == 3 else value
        for key, value in original.items()
    }


def autoencoder_state(original: Mapping[str, Tensor]) -> State:
    """The autoencoder's tensors under diffusers' names; 1x1 convolutions in its attention are linear layers there."""
    top = max((int(key.split(".")[2]) for key in original if key.startswith("decoder.up.")), default=0)
    names = {f"decoder.up.{level}.": f"decoder.up_blocks.{top - level}." for level in range(top + 1)} | {
        "encoder.down.": "encoder.down_blocks.",
        ".downsample.": ".downsamplers.0.",
        ".upsample.": ".upsamplers.0.",
        ".block.": ".resnets.",
        ".mid.block_1.": ".mid_block.resnets.0.",
        ".mid.block_2.": ".mid_block.resnets.1.",
        ".nin_shortcut.": ".conv_shortcut.",
        ".norm_out.": ".conv_norm_out.",
        ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
        ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.",
        ".mid.attn_1.": ".mid_block.attentions.0.to_",
    }
    return {
        _replaced(key, names): value[:, :, 0, 0] if ".attn_1." in key and value.ndim == 4 else value
        for key, value in original.items()
    }


def clip_text_state(original: Mapping[str, Tensor]) -> State:
    """OpenCLIP's text transformer under transformers' names, without what it only needs to score images."""
    names = {
        "token_embedding.": "embeddings.token_embedding.",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.": "final_layer_norm.",
    }
    return _clip_state(original, names, {"text_projection", "logit_scale", "attn_mask"})


def clip_image_state(original: Mapping[str, Tensor]) -> State:
    """OpenCLIP's image transformer under transformers' names; the projection is left out."""
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.": "embeddings.patch_embedding.",
        "ln_pre.": "pre_layrnorm.",  # transformers' spelling
        "ln_post.": "post_layernorm.",
    }
    return _clip_state(original, names, {"proj"})


def _clip_state(original: Mapping[str, Tensor], names: Mapping[str, str], left_out: set[str]) -> State:
    names = {
        **names,
        "transformer.resblocks.": "encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".attn.": ".self_attn.",
        ".c_fc.": ".fc1.",
        ".c_proj.": ".fc2.",
    }
    state = {}
    for key, value in original.items():
        if key in left_out:
            continue
        key = _replaced(key, names)
        if ".in_proj_" in key:
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("in_proj_", f"{projection}_proj.")] = part
        else:
            state[key] = value
    return state


def _replaced(key: str, names: Mapping[str, str]) -> str:
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


_PARTS: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], State]]] = {
    "unet": ("model.diffusion_model.", unet_state),
    "vae": ("first_stage_model.", autoencoder_state),
    "image_resampler": ("image_proj_model.", dict),
    "text": ("cond_stage_model.model.", clip_text_state),
    "image_encoder": ("embedder.model.visual.", clip_image_state),
}


# --- files -----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, **modules: nn.Module) -> None:
    """Fill modules from a published file: `load_checkpoint(path, unet=unet, vae=vae, ...)`, parts as listed above.

    Every key of a part that is asked for must fit, except that a text model may have fewer layers (the last one's
    output is never used); other parts are left alone. Everything is checked before the first module is filled.
    Modules on the meta device take the file's tensors over as they are, mapped from the disk.

    Raises MotionRAGError when the file is missing, damaged or holds more than tensors, when it is no DynamiCrafter
    checkpoint, and when keys or shapes differ.
    """
    if unknown := modules.keys() - _PARTS.keys():
        raise ValueError(f"unknown parts {sorted(unknown)}: choose from {', '.join(_PARTS)}")
    tensors = _read(Path(path))
    states = {}
    for part, module in modules.items():
        prefix, rename = _PARTS[part]
        state = rename({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        if not state:
            held = sorted({key.split(".")[0] for key in tensors})
            raise MotionRAGError(
                f"{path} has no {prefix} keys but those of {', '.join(held[:5])}: give a published DynamiCrafter model.ckpt"
            )
        expected = module.state_dict()
        if part == "text":
            layers = {key.split(".")[2] for key in expected if key.startswith("encoder.layers.")}
            state = {
                k: v
                for k, v in state.items()
                if not k.startswith("encoder.layers.") or k.split(".")[2] in layers
            }
        check_state(expected, state, f"{path}, part {part},")
        states[part] = state
    for part, module in modules.items():
        module.load_state_dict(states[part], assign=any(p.is_meta for p in module.parameters()))


def _read(path: Path) -> State:
    """All tensors of a checkpoint, mapped from the file."""
    if not path.is_file():
        raise MotionRAGError(f"no checkpoint {path}: give the model.ckpt of Doubiiu/DynamiCrafter_1024")
    state = read_pickled(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise MotionRAGError(f"{path} holds no tensors by name: give a published DynamiCrafter model.ckpt")
    return state
