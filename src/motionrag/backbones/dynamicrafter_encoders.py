"""What DynamiCrafter reads besides latents: OpenCLIP ViT-H/14's text and image states, and image tokens for each frame.

Shapes: B batch, T frames, H x W pixels, N image states of width D_in, L text tokens, l image tokens of a frame, D
their width. The networks are transformers' classes; the published checkpoints hold their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from motionrag.backbones.svd import resize_for_clip
from motionrag.modules.resampler import Resampler

CLIP_TEXT = dict(  # ViT-H/14 without the last of its 24 layers
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu",
    projection_dim=1024,
)  # fmt: skip
CLIP_IMAGE = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu",
    patch_size=14, image_size=224, projection_dim=1024,
)  # fmt: skip


class CLIPText(nn.Module):
    """OpenCLIP's text states as DynamiCrafter reads them: the layer before the last, then the final norm.

    `model` is that transformer without its last layer (23 of 24 in ViT-H/14), so the states after its final norm are
    the ones wanted. Prompts are filled up with token 0 and no mask, as OpenCLIP does.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, 77, D)."""
        length = self.model.config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), truncation=True, max_length=length).input_ids
        ids = [F.pad(torch.tensor(row), (0, length - len(row))) for row in tokens]
        return self.model(torch.stack(ids).to(self.model.device)).last_hidden_state


class CLIPImage(nn.Module):
    """OpenCLIP's image states: all tokens of the last layer, class token first, without the final norm."""

    def __init__(self, model: CLIPVisionModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, N, D); squeezed into a square, nothing is cropped."""
        side = self.model.config.image_size
        images = (resize_for_clip(images.float(), side) + 1) / 2
        mean, std = (images.new_tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return self.model(((images - mean) / std).to(self.model.device, self.model.dtype)).last_hidden_state


class ImageResampler(Resampler, ModelMixin, ConfigMixin):
    """The image Resampler: `num_queries` tokens for each of `video_length` frames, frame by frame.

    The same network as `Resampler`, with sizes that are saved beside its weights; the defaults are the published ones.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 1024,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 12,
        num_queries: int = 16,
        embedding_dim: int = 1280,
        output_dim: int = 1024,
        ff_mult: int = 4,
        video_length: int = 16,
    ) -> None:
        super().__init__(
            dim, depth, dim_head, heads, num_queries, embedding_dim, output_dim, ff_mult, video_length
        )
