"""DynamiCrafter's denoising UNet (Xing et al., arXiv 2310.12190): a 2D UNet with convolution and attention over time.

Shapes: B batch, T frames, C channels, h x w latent pixels, L text tokens, l image tokens of a frame, D their width.
The UNet takes and gives (B, C, T, h, w), as the original does; inside, every layer sees (B*T, C, h, w) with the
frames of a sample as neighbours, and only temporal layers take them apart. Parameters carry the original's names
(`temopral_conv` included), so published weights load almost as they are: see `dynamicrafter_weights`.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import Tensor, nn

# The published models differ in two values only; sizes are the defaults of `DynamiCrafterUNet`.
UNETS = {
    "1024": dict(default_fs=10),  # 576 x 1024 pixels
    "512": dict(default_fs=24),  # 320 x 512
    "256": dict(default_fs=3, image_cross_attention_scale_learnable=True),  # 256 x 256
}
TINY_UNET = dict(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1), num_head_channels=16,
    context_dim=384, norm_num_groups=8, text_tokens=24, dropout=0.0,
)  # fmt: skip


def zeroed(module: nn.Module) -> nn.Module:
    """Weights and biases set to zero: the branch that ends here starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of (N,) numbers: cosines first, then sines, then a zero if `dim` is odd -> (N, dim) float32."""
    return get_timestep_embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)


class CrossAttention(nn.Module):
    """Attention of a sequence to itself, or of its queries to text and to image tokens, the two results added.

    Args:
        dim: width of what comes in and goes out.
        heads, dim_head: attention sizes; `heads * dim_head` need not equal `dim`.
        context_dim: width of text and image tokens; None for self-attention.
        learn_image_scale: weigh the image branch by `1 + tanh(alpha)` with `alpha` learned, instead of by 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None = None,
        learn_image_scale: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        linear = partial(nn.Linear, out_features=inner, bias=False)
        self.to_q = linear(dim)
        self.to_k, self.to_v = linear(context_dim or dim), linear(context_dim or dim)
        if context_dim is not None:
            self.to_k_ip, self.to_v_ip = linear(context_dim), linear(context_dim)
        self.alpha = nn.Parameter(torch.zeros(())) if learn_image_scale else None
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def forward(self, x: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """x (N, n, dim), text (N, L, context_dim), image (N, l, context_dim) -> (N, n, dim)."""

        def split(tokens: Tensor) -> Tensor:
            return rearrange(tokens, "n l (h d) -> n h l d", h=self.heads)

        q = split(self.to_q(x))
        own = x if text is None else text
        out = F.scaled_dot_product_attention(q, split(self.to_k(own)), split(self.to_v(own)))
        if image is not None:
            seen = F.scaled_dot_product_attention(q, split(self.to_k_ip(image)), split(self.to_v_ip(image)))
            out = out + (seen if self.alpha is None else (1 + self.alpha.tanh()) * seen)
        return self.to_out(rearrange(out, "n h l d -> n l (h d)"))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context (or to itself once more), gated feed-forward; all pre-norm."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, context_dim: int | None, learn_image_scale: bool
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, heads, dim_head)
        self.attn2 = CrossAttention(dim, heads, dim_head, context_dim, learn_image_scale)
        self.ff = FeedForward(dim, activation_fn="geglu")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """x (N, n, dim) -> the same shape."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text, image)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Norm and projections around transformer blocks; what a sequence is, the two children decide."""

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        learn_image_scale: bool = False,
        groups: int = 32,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, heads, dim_head, context_dim, learn_image_scale) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Linear(inner, channels))

    def _blocks(self, h: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, text, image)
        return self.proj_out(h)


class SpatialTransformer(Transformer):
    """The pixels of a frame see each other, the text and the frame's image tokens."""

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """x (B*T, C, h, w), text (B*T, L, D), image (B*T, l, D) -> the shape of x."""
        h = rearrange(self.norm(x), "n c h w -> n (h w) c")
        h = self._blocks(h, text, image)
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])


class TemporalTransformer(Transformer):
    """Each pixel sees itself in the other frames, twice; without position codes, so any number of frames will do."""

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x (B*T, C, h, w), frames = T -> the shape of x."""
        height, width = x.shape[2:]
        h = self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=frames))  # all frames share one statistic
        h = self._blocks(rearrange(h, "b c t h w -> (b h w) t c"))
        return x + rearrange(h, "(b h w) t c -> (b t) c h w", h=height, w=width)


class ResBlock(nn.Module):
    """Two convolutions in space with the time step's embedding between them, then four over time."""

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, dropout: float = 0.0, groups: int = 32
    ) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        # the original's spelling; it fixes the dropout of these layers at 0.1
        self.temopral_conv = TemporalConvLayer(out_channels, dropout=0.1, norm_num_groups=groups)

    def spatial(self, x: Tensor, emb: Tensor) -> Tensor:
        """The part that treats frames one by one: x (N, C, h, w), emb (N, E) -> (N, out_channels, h, w)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        """x (B*T, C, h, w), emb (B*T, E), frames = T -> (B*T, out_channels, h, w)."""
        return self.temopral_conv(self.spatial(x, emb), num_frames=frames)


class Downsample(nn.Module):
    """Convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, C, h / 2, w / 2)."""
        return self.op(x)


class DynamiCrafterUNet(ModelMixin, ConfigMixin):
    """The UNet of DynamiCrafter; the defaults are the sizes of all published models (1.4 B parameters).

    Args:
        in_channels: channels of the noisy latents and, behind them, of the condition image's.
        out_channels: channels of the prediction.
        model_channels, channel_mult: width of the first level, and each level's multiple of it.
        num_res_blocks: residual blocks of a level on the way down (one more on the way up).
        attention_resolutions: downsampling rates of the levels that have transformers; the middle always has them.
        num_head_channels: width of an attention head.
        transformer_depth: blocks of a transformer.
        context_dim: width D of text and image tokens.
        dropout: of the residual blocks, in training.
        norm_num_groups: groups of all group norms; 32 in every published model.
        image_cross_attention_scale_learnable: learn each site's weight of the image branch (256 x 256 model).
        default_fs: frame-rate condition when the caller gives none.
        text_tokens: L; what follows in the context are image tokens.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_head_channels: int = 64,
        transformer_depth: int = 1,
        context_dim: int = 1024,
        dropout: float = 0.1,
        norm_num_groups: int = 32,
        image_cross_attention_scale_learnable: bool = False,
        default_fs: int = 10,
        text_tokens: int = 77,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        emb_channels = 4 * model_channels
        groups = norm_num_groups

        def embedding() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
            )

        def res(inp: int, out: int) -> ResBlock:
            return ResBlock(inp, emb_channels, out, dropout, groups)

        def transformers(width: int) -> list[nn.Module]:
            sizes = (width, width // num_head_channels, num_head_channels, transformer_depth)
            return [
                SpatialTransformer(*sizes, context_dim, image_cross_attention_scale_learnable, groups),
                TemporalTransformer(*sizes, groups=groups),
            ]

        self.time_embed, self.fps_embedding = embedding(), embedding()
        zeroed(self.fps_embedding[-1])

        width, skips, rate = model_channels, [model_channels], 1
        down = [[nn.Conv2d(in_channels, width, 3, padding=1)]]
        # always 8 heads: it is wider than what it works on
        self.init_attn = nn.ModuleList([TemporalTransformer(width, 8, num_head_channels, groups=groups)])
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res(width, mult * model_channels)]
                width = mult * model_channels
                down.append(layers + (transformers(width) if rate in attention_resolutions else []))
                skips.append(width)
            if level < len(channel_mult) - 1:
                down.append([Downsample(width)])
                skips.append(width)
                rate *= 2

        middle = [res(width, width), *transformers(width), res(width, width)]

        up = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(width + skips.pop(), mult * model_channels)]
                width = mult * model_channels
                layers += transformers(width) if rate in attention_resolutions else []
                if level and i == num_res_blocks:
                    layers.append(Upsample2D(width, use_conv=True))
                    rate //= 2
                up.append(layers)

        self.input_blocks = nn.ModuleList(map(nn.ModuleList, down))
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, up))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, width), nn.SiLU(), zeroed(nn.Conv2d(width, out_channels, 3, padding=1))
        )

    def adapter_sites(self) -> dict[str, CrossAttention]:
        """Name -> attention layer that motion may enter: every spatial `attn2`, 16 in the published models."""
        return {
            f"{name}.transformer_blocks.{i}.attn2": block.attn2
            for name, module in self.named_modules()
            if isinstance(module, SpatialTransformer)
            for i, block in enumerate(module.transformer_blocks)
        }

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, fs: Tensor | None = None) -> Tensor:
        """Predict v from noisy latents.

        Args:
            x: (B, in_channels, T, h, w), noisy latents and condition image on channels; h and w divide by the total
                downsampling (8 in the published models).
            timesteps: (B,), 0..999.
            context: (B, L + T*l, D), text tokens and then the image tokens of frame 1, frame 2, ...
            fs: (B,), the frame-rate condition (frames per second or frame stride, as the model was trained);
                `default_fs` if None.

        Returns:
            (B, out_channels, T, h, w).

        Raises ValueError when the latents' sides or the number of context tokens do not fit.
        """
        batch, _, frames, height, width = x.shape
        rate = 2 ** (len(self.config.channel_mult) - 1)
        if height % rate or width % rate:
            raise ValueError(
                f"latents of {height} x {width} do not divide by {rate}: choose other picture sizes"
            )
        text, image = context[:, : self.config.text_tokens], context[:, self.config.text_tokens :]
        if image.shape[1] == 0 or image.shape[1] % frames:
            raise ValueError(
                f"the context must hold {self.config.text_tokens} text tokens and then the same number of image "
                f"tokens for each of {frames} frames, got {context.shape[1]} tokens"
            )
        if fs is None:
            fs = torch.full((batch,), self.config.default_fs, device=x.device)

        def embed(numbers: Tensor, layers: nn.Module) -> Tensor:
            return layers(timestep_embedding(numbers, self.config.model_channels).to(x.dtype))

        emb = embed(timesteps, self.time_embed) + embed(fs, self.fps_embedding)
        emb = emb.repeat_interleave(frames, dim=0)
        text = text.repeat_interleave(frames, dim=0)
        image = rearrange(image, "b (t l) d -> (b t) l d", t=frames)
        inputs = {  # what each kind of layer reads besides the hidden states
            ResBlock: (emb, frames),
            SpatialTransformer: (text, image),
            TemporalTransformer: (frames,),
        }

        def run(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                args = (h, *inputs.get(type(layer), ()))
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    h = self._gradient_checkpointing_func(layer, *args)
                else:
                    h = layer(*args)
            return h

        h = rearrange(x, "b c t h w -> (b t) c h w")
        h = run(self.init_attn, run(self.input_blocks[0], h))
        skips = [h]
        for layers in self.input_blocks[1:]:
            h = run(layers, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, skips.pop()], dim=1))
        return rearrange(self.out(h), "(b t) c h w -> b c t h w", t=frames)
