"""What a full-size configuration is and costs, without its weights: parameters, sites, FLOPs and memory.

Every network is built on the meta device, where tensors have shapes and no values, and the project's own code runs on
it: encoding, the backbone's loss, backward, an optimizer step. FLOPs are counted by `torch.utils.flop_counter` (matrix
products, convolutions and attention; a multiply-add is two). Memory is the peak of live tensors, followed from their
making to their freeing; an allocator's reserve, kernel workspaces and the CUDA context come on top.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from motionrag.backbones.base import Backbone
from motionrag.backbones.cogvideox import SentenceText
from motionrag.encoders import resolve_weights
from motionrag.errors import MotionRAGError
from motionrag.modules.cama import CAMA, cama_losses
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler
from motionrag.release import RELEASES

# The public models, as their config files have them (values that equal the class's defaults left out where long).
COGVIDEOX_TRANSFORMER = dict(
    num_attention_heads=48, attention_head_dim=64, in_channels=32, out_channels=16, time_embed_dim=512,
    text_embed_dim=4096, num_layers=42, sample_width=90, sample_height=60, sample_frames=49, patch_size=2,
    temporal_compression_ratio=4, max_text_seq_length=226, use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)  # fmt: skip
COGVIDEOX_VAE = dict(scaling_factor=0.7)
T5_XXL = dict(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu", vocab_size=32128,
)  # fmt: skip
SVD_UNET = dict(
    in_channels=8, out_channels=4, block_out_channels=(320, 640, 1280, 1280), num_attention_heads=(5, 10, 20, 20),
    cross_attention_dim=1024, addition_time_embed_dim=256, projection_class_embeddings_input_dim=768,
    layers_per_block=2, transformer_layers_per_block=1, num_frames=14, sample_size=96,
)  # fmt: skip
SVD_VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
    latent_channels=4, sample_size=768,
)  # fmt: skip
CLIP_VIT_H = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu",
    patch_size=14, image_size=224, projection_dim=1024,
)  # fmt: skip
ENCODERS = {  # path in conf/encoders/full.yaml -> config
    "MCG-NJU/videomae-base-finetuned-ssv2": dict(num_labels=174),  # the defaults are VideoMAE-B
    "facebook/dinov2-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518,
                                  patch_size=14),
}  # fmt: skip

# Values in the published files (bf16), by release; DynamiCrafter's adapter was saved without its queries.
PUBLISHED = {
    "cogvideox": {"motion adapter": 660_602_880, "motion Resampler": 48_026_624, "CAMA": 98_673_664},
    "svd": {"motion adapter": 37_949_440, "motion Resampler": 48_026_624, "CAMA": 98_673_664},
    "dynamicrafter": {"motion adapter": 25_559_040, "motion Resampler": 48_026_624, "CAMA": 98_673_664},
}


# --- networks on the meta device ---------------------------------------------------------------------------------


class _States(nn.Module):
    """A text encoder that needs no tokenizer: states (B, length, D) of empty prompts."""

    def __init__(self, model: nn.Module, length: int):
        super().__init__()
        self.model, self.length = model, length

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long, device=self.model.device)
        return self.model(ids).last_hidden_state


def _cogvideox() -> list[Any]:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    from motionrag.backbones.cogvideox import SCHEDULER

    return [
        AutoencoderKLCogVideoX(**COGVIDEOX_VAE),
        CogVideoXTransformer3DModel(**COGVIDEOX_TRANSFORMER),
        _scheduler(CogVideoXDPMScheduler, SCHEDULER),
        _States(T5EncoderModel(T5Config(**T5_XXL)), COGVIDEOX_TRANSFORMER["max_text_seq_length"]),
    ]


def _svd() -> list[Any]:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from motionrag.backbones.svd import SCHEDULER

    return [
        AutoencoderKLTemporalDecoder(**SVD_VAE),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_VIT_H)),
        UNetSpatioTemporalConditionModel(**SVD_UNET),
        _scheduler(EulerDiscreteScheduler, SCHEDULER),
    ]


def _dynamicrafter(sizes: Mapping[str, Any], frames: int) -> list[Any]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    from motionrag.backbones import dynamicrafter as dc

    text = CLIPTextConfig(**dc.CLIP_TEXT)
    return [
        AutoencoderKL(**dc.VAE),
        dc.DynamiCrafterUNet(**sizes.get("unet", {})),
        _States(CLIPTextModel(text), text.max_position_embeddings),
        dc.CLIPImage(CLIPVisionModel(CLIPVisionConfig(**dc.CLIP_IMAGE))),
        dc.ImageResampler(video_length=frames),
    ]


def _scheduler(kind: type, options: Mapping[str, Any]) -> Any:
    with torch.device("cpu"):  # its tables are values
        return kind(**options)


def backbone_on_meta(cfg: DictConfig) -> Backbone:
    """The backbone of a config (`conf/backbone/*.yaml`) with its networks on the meta device, in float32.

    Configs that read weights which do not ship get networks of the public model's sizes; the others are made as ever
    and moved, but for the sentence encoder of the tiny ones. Raises MotionRAGError for a backbone whose sizes are not known here.
    """
    target = str(cfg._target_)
    if target.endswith(".tiny") or str(cfg.get("path", "")).startswith("pkg:"):
        backbone = instantiate(cfg)
        for network in vars(backbone).values():
            if isinstance(network, nn.Module) and not isinstance(network, SentenceText):  # it looks at values
                network.to("meta")
        return backbone
    kind = get_method(target.removesuffix(".load"))
    known = inspect.signature(kind.__init__).parameters.keys() - {"text"}
    options = {k: instantiate(v) if OmegaConf.is_dict(v) else v for k, v in cfg.items() if k in known}
    with torch.device("meta"):
        match kind.__name__:
            case "CogVideoX":
                parts = _cogvideox()
            case "SVD":
                parts = _svd()
            case "DynamiCrafter":
                parts = _dynamicrafter(cfg.get("sizes", {}), int(cfg.frames))
            case name:
                raise MotionRAGError(
                    f"describe does not know the sizes of {name}: add them to motionrag.describe"
                )
    for part in parts:
        if isinstance(part, nn.Module):
            part.to("meta")  # what was made from values
    if kind.__name__ == "DynamiCrafter":
        parts.append(options.pop("schedule"))
    return kind(*parts, **options)


def encoders_on_meta(cfg: DictConfig) -> tuple[nn.Module, nn.Module]:
    """VideoMAE and DINOv2 of an encoders config on the meta device, from public sizes or a packaged config.json."""
    from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEForVideoClassification

    made = []
    for role, kind, config in (
        ("motion", VideoMAEForVideoClassification, VideoMAEConfig),
        ("appearance", Dinov2Model, Dinov2Config),
    ):
        path = str(cfg[role].path)
        if path in ENCODERS:
            sizes = config(**ENCODERS[path])
        elif path.startswith("pkg:"):
            sizes = config.from_pretrained(resolve_weights(path))
        else:
            raise MotionRAGError(
                f"describe does not know the sizes of {path}: expected one of {', '.join(ENCODERS)}"
            )
        with torch.device("meta"):
            made.append(kind(sizes).eval().requires_grad_(False))
    return made[0], made[1]


# --- counting ----------------------------------------------------------------------------------------------------


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as GPUs run it, its scores never kept; left alone, the meta device would write them all out.

    Replaces `scaled_dot_product_attention` for tensors on the meta device. (A TorchFunctionMode would be off during
    backward, where gradient checkpointing runs the network again.)
    """
    original = F.scaled_dot_product_attention

    def attend(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if query.device.type != "meta":
            return original(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def flops(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and the FLOPs of the tensors that it makes."""
    with fused_attention(), FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


class _Live(TorchDispatchMode):
    """Bytes of storages on the meta device that operations make and that are still there, and their peak."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = WeakIdKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = True
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.bytes -= size


def peak_bytes(work: Callable[[], Any], *held: nn.Module | torch.optim.Optimizer) -> int:
    """Most bytes alive at once during `work`: what it makes, and all along what modules and optimizers hold."""
    tensors = []
    for holder in held:
        if isinstance(holder, nn.Module):
            tensors += [*holder.parameters(), *holder.buffers()]
        else:
            tensors += [v for state in holder.state.values() for v in state.values() if isinstance(v, Tensor)]
    with fused_attention(), _Live(tensors) as live:
        work()
    return live.peak + sum(t.nbytes for t in tensors)


def parameters(module: nn.Module) -> int:
    """Number of values in a module's parameters."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradients for these modules, inside."""
    for module in modules:
        module.requires_grad_(False)
    try:
        yield
    finally:
        for module in modules:
            module.requires_grad_(True)


def _blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- the three things that cost ----------------------------------------------------------------------------------


@dataclass
class Configuration:
    """A backbone with all that MotionRAG adds, on the meta device in bfloat16."""

    backbone: Backbone
    motion_encoder: nn.Module
    appearance_encoder: nn.Module
    resampler: Resampler
    adapter: MotionAdapter
    cama: CAMA

    def __post_init__(self) -> None:
        networks = [n for n in vars(self.backbone).values() if isinstance(n, nn.Module)]
        for network in (*networks, self.motion_encoder, self.appearance_encoder):
            if not any(p.device.type != "meta" for p in network.parameters()):
                nn.Module.to(network, torch.bfloat16)  # diffusers' own warns about nothing
        for trained in (self.resampler, self.adapter, self.cama):
            trained.to("meta", torch.bfloat16)

    def frozen(self) -> dict[str, nn.Module]:
        """Name -> network, of everything that is never trained."""
        named = {k: v for k, v in vars(self.backbone).items() if isinstance(v, nn.Module)}
        return {**named, "motion encoder": self.motion_encoder, "appearance encoder": self.appearance_encoder}

    def trained(self) -> dict[str, nn.Module]:
        """Name -> module, of what MotionRAG trains."""
        return {"motion adapter": self.adapter, "motion Resampler": self.resampler, "CAMA": self.cama}

    def motion_features(self, clips: int) -> Tensor:
        """VideoMAE features (clips, N, D)."""
        config = self.motion_encoder.config
        pixels = _blank(
            clips, config.num_frames, 3, config.image_size, config.image_size, dtype=torch.bfloat16
        )
        return self.motion_encoder.videomae(pixels).last_hidden_state

    def appearance_features(self, images: int, size: int) -> Tensor:
        """DINOv2 features (images, N, D)."""
        return self.appearance_encoder(_blank(images, 3, size, size, dtype=torch.bfloat16)).last_hidden_state

    def conditions(self, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, image latents and context of `batch` clips, for the backbone's loss."""
        b = self.backbone
        video = _blank(batch, b.frames, 3, b.height, b.width)
        latents, image = b.encode_video(video), b.encode_image(video[:, 0])
        return latents, image, b.encode_context([""] * batch, video[:, 0])

    def tokens(self, batch: int) -> Tensor:
        """Motion tokens (batch, n, d)."""
        return _blank(batch, self.resampler.tokens, self.resampler.output_dim, dtype=torch.bfloat16)


def _optimizer(*modules: nn.Module) -> torch.optim.Optimizer:
    """AdamW with its states made, as after the first step."""
    optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()])
    for module in modules:
        for p in module.parameters():
            p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def stage_one(c: Configuration) -> dict[str, Any]:
    """Cost of one Stage 1 step at batch 1: FLOPs of its parts, and bytes while the network trains."""
    b, found = c.backbone, {}
    video = _blank(1, b.frames, 3, b.height, b.width)
    with torch.no_grad():
        (latents, image), found["autoencoder"] = flops(
            lambda: (b.encode_video(video), b.encode_image(video[:, 0]))
        )
        context, found["context encoders"] = flops(lambda: b.encode_context([""], video[:, 0]))
        features, found["motion encoder"] = flops(lambda: c.motion_features(1))
    tokens, found["motion Resampler"] = flops(lambda: c.resampler(features))
    conditions = latents, image, context
    with c.adapter.use(None):
        _, found["denoiser"] = flops(lambda: b.loss(*conditions))
    with c.adapter.use(tokens):
        loss, both = flops(lambda: b.loss(*conditions))
        found["motion adapter"] = both - found["denoiser"]
        _, found["backward"] = flops(loss.backward)
    optimizer = _optimizer(c.resampler, c.adapter)

    def step() -> None:
        with c.adapter.use(c.resampler(features)):
            b.loss(*conditions).backward()
        optimizer.step()
        optimizer.zero_grad()

    held = (b.denoiser, c.resampler, c.adapter, optimizer)
    memory = {"plain": peak_bytes(step, *held)}
    b.denoiser.enable_gradient_checkpointing()
    try:
        # one after the other: the counter holds on to what checkpointing would free
        memory["gradient checkpointing"] = peak_bytes(step, *held)
        _, again = flops(step)
    finally:
        b.denoiser.disable_gradient_checkpointing()
    whole = sum(found.values())
    recomputed = again - sum(found[k] for k in ("motion Resampler", "denoiser", "motion adapter", "backward"))
    return {"flops": found, "total_flops": whole, "recomputed_flops": recomputed, "peak_bytes": memory}


def stage_two(c: Configuration, k: int, size: int) -> dict[str, Any]:
    """Cost of one Stage 2 step at batch 1 with k references of `size` pixels."""
    found = {}
    with torch.no_grad(), frozen(c.resampler):
        motion, found["motion encoder"] = flops(lambda: c.motion_features(k + 1))
        tokens, found["motion Resampler"] = flops(lambda: c.resampler(motion))
        looks, found["appearance encoder"] = flops(lambda: c.appearance_features(k + 1, size))
    inputs = tokens[None, :k], looks[None, :k], looks[None, k]
    truth = tokens[None]
    optimizer = _optimizer(c.cama)

    def loss() -> Tensor:
        return cama_losses(c.cama(*inputs), truth)["mse"]

    value, found["CAMA"] = flops(loss)
    _, found["backward"] = flops(value.backward)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "flops": found,
        "total_flops": sum(found.values()),
        "peak_bytes": {"plain": peak_bytes(step, c.cama, optimizer)},
    }


@torch.no_grad()
def one_clip(c: Configuration, k: int, steps: int, size: int) -> dict[str, Any]:
    """Cost of one guided clip from k references that nothing is stored of, the adapter in its fast form."""
    with frozen(*c.trained().values()):
        return _one_clip(c, k, steps, size)


def _one_clip(c: Configuration, k: int, steps: int, size: int) -> dict[str, Any]:
    b, found = c.backbone, {}
    image = _blank(1, 3, b.height, b.width)
    motion, found["motion encoder"] = flops(lambda: c.motion_features(k + 1))  # and the zero clip
    tokens, found["motion Resampler"] = flops(lambda: c.resampler(motion))
    looks, found["appearance encoder"] = flops(lambda: c.appearance_features(k + 1, size))
    _, found["CAMA"] = flops(lambda: c.cama(tokens[None, :k], looks[None, :k], looks[None, k]))
    _, found["context encoders"] = flops(lambda: b.encode_context(["", ""], image.expand(2, -1, -1, -1)))
    _, encode = flops(lambda: b.encode_image(image))
    conditions = c.conditions(2)
    with c.adapter.use(None):
        _, bare = flops(lambda: b.loss(*conditions))
    with c.adapter.use(c.tokens(2)):
        _, first = flops(lambda: b.loss(*conditions))
        denoising, other = flops(lambda: peak_bytes(lambda: b.loss(*conditions), b.denoiser, c.adapter))
    found["denoiser"] = bare * steps
    found["motion adapter"] = first + other * (steps - 1) - bare * steps
    decoding, decode = flops(lambda: peak_bytes(lambda: b.decode(conditions[0][:1]), b.vae))
    found["autoencoder"] = encode + decode
    memory = {"denoising": denoising, "decoding": decoding}
    return {"flops": found, "total_flops": sum(found.values()), "peak_bytes": memory}


# --- all of it ---------------------------------------------------------------------------------------------------


def sites(c: Configuration) -> dict[str, int]:
    """Adapter site -> hidden width."""
    return {name: c.adapter.site(name).to_q.out_features for name in c.adapter.site_names}


def against_release(c: Configuration, release: str) -> dict[str, bool]:
    """What of a configuration equals the published files: sites with their widths, and parameter counts.

    CAMA's start tokens and DynamiCrafter's adapter queries are trained here and not in the files; they are left out.
    """
    counts = {name: parameters(module) for name, module in c.trained().items()}
    counts["CAMA"] -= c.cama.sos.numel()
    if release == "dynamicrafter":
        counts["motion adapter"] -= sum(c.adapter.site(s).to_q.weight.numel() for s in c.adapter.site_names)
    equal = {name: counts[name] == number for name, number in PUBLISHED[release].items()}
    return {"sites": sites(c) == dict(RELEASES[release].sites), **equal}


def describe(c: Configuration, *, k: int, steps: int, size: int, release: str | None) -> dict[str, Any]:
    """Everything as one JSON-able dict: parameters, sites, agreement with the published files, and the three costs.

    k references, `steps` denoising steps, appearance pictures of `size` pixels; release: the published backbone to
    compare with, None for a configuration that was never published.
    """
    c.adapter.attach(c.backbone.adapter_sites())
    try:
        return {
            "backbone": c.backbone.name,
            "clip": [c.backbone.frames, c.backbone.height, c.backbone.width],
            "parameters": {
                "frozen": {name: parameters(module) for name, module in c.frozen().items()},
                "trained": {name: parameters(module) for name, module in c.trained().items()},
            },
            "sites": sites(c),
            "as_published": None if release is None else against_release(c, release),
            "stage_1_step": stage_one(c),
            "stage_2_step": stage_two(c, k, size),
            "clip_of_steps": steps,
            "one_clip": one_clip(c, k, steps, size),
        }
    finally:
        c.adapter.detach()
